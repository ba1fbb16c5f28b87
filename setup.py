"""What pyproject.toml can't say: `configs/`, which readers look for beside the code, is installed as `longmem/configs/`."""

from setuptools import find_namespace_packages, setup

setup(
    # Not the scripts in train/, eval/ and benchmarks/: they are run, never imported.
    packages=[*find_namespace_packages(include=["longmem", "longmem.*"]), "longmem.configs"],
    package_dir={"longmem.configs": "configs"},
    package_data={
        "longmem": ["trained/*/*"],  # trained side networks of the packaged backbones
        "longmem.configs": ["**/*.yaml"],
    },
)
