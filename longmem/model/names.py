"""What the name of a model stands for, wherever one is given: in Python, in settings, on the command line.

A name stands for a backbone and, where there is one, for a side network that belongs to it:

1. A packaged name, such as `smollm2-135m`: the backbone that its package carries, and the trained side network that comes with
   this package. A folder of yours that bears the same name is reached as `./smollm2-135m`.
2. A folder that `save_pretrained` wrote, or a repository of the hub with the same files: the side network in it, and the
   backbone that its configuration names.
3. Any other folder, or repository of the hub: the causal LM in it is the backbone, and there is no side network.

`from_pretrained` opens both, so it needs a side network. `from_backbone` opens the backbone alone and makes a new side network.
`open_model` does the first where there is a side network, the second where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, snapshot_download

from longmem.backbone.packaged import PACKAGED_BACKBONES
from longmem.files import current, damaged, read_json

# Trained side networks that come with this package, each in a folder named like its packaged backbone.
TRAINED_FOLDER = Path(__file__).parents[1] / "trained"
# Settings that a side network may have otherwise than it was trained with: no weight has to do with them.
CHANGEABLE = frozenset(("num_neighbours",))
# What is downloaded of a saved model: weights, settings, tokenizer.
PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class NamedModel:
    """What a name stands for.

    Args:
        name: as it was given.
        origin: of the side network: "saved" in a folder or repository, "packaged" with this package; "new": there is none.
        backbone: name of the backbone; None for a saved side network whose backbone has none.
        backbone_revision: of the hub, where the configuration of a saved side network names one.
        side_network: folder of the side network, None where there is none.
        problem: why a name of the hub could not be looked up, empty if it could; it is taken for a causal LM.
    """

    name: str
    origin: Literal["saved", "packaged", "new"]
    backbone: str | None
    backbone_revision: str | None = None
    side_network: Path | None = None
    problem: str = ""

    def require_side_network(self) -> Path:
        """Return the folder of the side network.

        Raises:
            ValueError: there is none.
            OSError: the name is of no folder, and the hub has no such repository or can't be reached.
        """
        if self.side_network is not None:
            return self.side_network
        if self.name in PACKAGED_BACKBONES:
            there = sorted(path.parent.name for path in TRAINED_FOLDER.glob("*/config.json"))
            raise ValueError(
                f"no trained side network comes with this package for `{self.name}` (there is one for: "
                f'{", ".join(there) or "none"}); `from_backbone("{self.name}")` makes an untrained one, and a folder of yours '
                f"of that name is reached as `./{self.name}`."
            )
        if self.problem:
            raise OSError(
                f"`{self.name}` is not a local folder, and could not be downloaded from the hub: {self.problem}"
            )
        if Path(self.name).is_dir() and not (Path(self.name) / "config.json").is_file():
            raise ValueError(f"{self.name} holds no config.json, so it is not a model that `save_pretrained` wrote.")
        raise ValueError(
            f"{self.name} has no side network: `save_pretrained` of a LongMem model did not write it. If it is a causal LM, "
            "`from_backbone` makes a new side network for it."
        )


def look_up(name: str | PathLike[str], revision: str | None = None, subfolder: str = "", **hub: Any) -> NamedModel:
    """Return what a name stands for; of a side network on the hub the files are downloaded, of a backbone none.

    Args:
        name: packaged name, folder or name on the hub.
        revision: hub revision.
        subfolder: where in the folder or repository the model is.
        hub: where files come from (cache_dir, force_download, local_files_only, token).

    Raises:
        ValueError: the folder's config.json is damaged.
    """
    if not isinstance(name, str | PathLike) or not str(name).strip():
        raise ValueError(
            f"a model must be named by a folder, a name on the hub or one of {', '.join(PACKAGED_BACKBONES)}, got {name!r}; "
            'the current folder is "./".'
        )
    if isinstance(name, str) and name in PACKAGED_BACKBONES:
        trained = TRAINED_FOLDER / name
        if (trained / "config.json").is_file():
            return NamedModel(name, "packaged", name, side_network=trained)
        return NamedModel(name, "new", name)
    name = str(name)
    is_local = Path(name).is_dir()
    if is_local and subfolder:
        name = str(Path(name) / subfolder)
    here = current(Path(name))
    place = {"subfolder": subfolder} if subfolder else {}
    try:
        config = _config_in(here) if is_local else _config_on_hub(name, revision=revision, **place, **hub)
    except OSError as error:
        return NamedModel(name, "new", name, problem=str(error))
    if config.get("model_type") != "longmem":
        return NamedModel(name, "new", name)
    folder = here
    if not is_local:
        patterns = [f"{subfolder}/{each}" if subfolder else each for each in PATTERNS]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **hub)) / subfolder
    backbone = config.get("backbone_name_or_path")
    if not isinstance(backbone, str | None):
        raise damaged(folder / "config.json", f"it names the backbone {backbone!r:.80}")
    if backbone:
        backbone = backbone_location(folder, backbone)
    return NamedModel(name, "saved", backbone, config.get("backbone_revision"), folder)


def backbone_location(folder: Path, name: str) -> str:
    """Return where to open the backbone of a saved model: inside its folder if the name is a folder there, else by name."""
    return str((folder / name).resolve()) if (folder / name).is_dir() else name


def lasting_name(name: str, beside: Path | None = None) -> str:
    """Return a name that means the same wherever a program is started: a folder by its whole path.

    Args:
        name: of a model.
        beside: folder in which the name is to be written down; what lies inside it is named by the path from there, so that
            both can move together.
    """
    if name in PACKAGED_BACKBONES or not Path(name).is_dir():
        return name
    place = Path(name).resolve()
    if beside is not None and place.is_relative_to(beside.resolve()):
        return place.relative_to(beside.resolve()).as_posix()
    return place.as_posix()


def _config_in(folder: Path) -> dict[str, Any]:
    """Return the configuration in a folder, empty if it has none, as a folder of adapters alone."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _config_on_hub(name: str, **place: Any) -> dict[str, Any]:
    """Return the configuration of a repository. Raises OSError if there is none, or the hub can't be reached."""
    try:
        path = Path(hf_hub_download(name, "config.json", **place))
    except Exception as error:  # not only of the hub: a path that is no folder is no valid name of a repository
        raise OSError(str(error)) from error
    return _config_in(path.parent)
