"""Saved memory banks: a folder of safetensors files, and one manifest that says which of them count.

A save writes new files under new names, and then replaces the manifest in one step. Until that step the folder holds
the bank that was there before, from then on the new one; a process killed in between leaves at most files that nobody
names, which the next save removes. Nothing is pickled, and no index is stored: the index is derived from the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longmem.memory.ledger import Document, IntQueue
from longmem.memory.store import Chunks

FORMAT = "longmem-memory-bank"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


class SavedBank(NamedTuple):
    """Return what a folder holds: all that a bank needs to be as it was when it was saved."""

    settings: dict[str, Any]
    documents: list[Document]
    runs: list[tuple[str, int]]
    layers: list[Chunks]


def write_bank(
    folder: str | PathLike[str],
    settings: dict[str, Any],
    documents: Sequence[Document],
    runs: Sequence[tuple[str, int]],
    layers: Sequence[Chunks],
) -> None:
    """Write a bank to `folder`, in place of the one that is there. Raises ValueError if that is not possible."""
    folder = Path(folder)
    # A name that no earlier save has used: files of the bank that is there are not touched before they are replaced.
    save_id = secrets.token_hex(8)
    names = [f"documents-{save_id}.safetensors", *(f"layer{i}-{save_id}.safetensors" for i in range(len(layers)))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One layer at a time, so that saving needs the memory of one layer and not of a second bank.
        files = {names[0]: _write_tensors(folder / names[0], _document_tensors(documents, runs))}
        for name, chunks in zip(names[1:], layers, strict=True):
            files[name] = _write_tensors(folder / name, chunks._asdict())
        contents = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "settings": settings,
            "documents": [[document.document_id, document.num_tokens] for document in documents],
            "files": files,
        }
        manifest = folder / f"manifest-{save_id}.json"
        names.append(manifest.name)
        manifest.write_text(json.dumps({**contents, "checksum": _checksum_of(contents)}, indent=1), encoding="utf-8")
        _flush(manifest)
        _flush(folder)
        os.replace(manifest, folder / MANIFEST)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        _remove(folder / name for name in names)
        raise ValueError(
            f"`folder` must be a folder that can be written, with room for the bank, got {str(folder)!r} ({error}); "
            "what was saved there before is unharmed. Free some room, or save elsewhere."
        ) from error
    kept = {MANIFEST, *files}
    patterns = ("documents-*.safetensors", "layer*-*.safetensors", "manifest-*.json")
    _remove(path for pattern in patterns for path in folder.glob(pattern) if path.name not in kept)


def read_bank(folder: str | PathLike[str], device: torch.device, fingerprint: str | None) -> SavedBank:
    """Return what was saved in `folder`. Raises ValueError if it is not whole, or not of the encoder `fingerprint`.

    `fingerprint` None: any encoder will do. On the CPU the tensors are memory-mapped: a page is private once it is
    written to, and the files never change.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    settings = manifest["settings"]
    if fingerprint is not None and fingerprint != settings["fingerprint"]:
        raise ValueError(
            f"`model` must be the encoder of the bank in {str(folder)!r}, {settings['fingerprint']}, got "
            f"{fingerprint}: its queries do not fit the stored keys. Memorize the documents again, in "
            "`MemoryBank.for_model(model)`; without `model` the bank opens for inspection."
        )
    for name, expected in manifest["files"].items():
        _check_file(folder / name, expected)
    files = [_read_tensors(folder / name) for name in manifest["files"]]
    layers = [Chunks(**{name: tensor.to(device) for name, tensor in tensors.items()}) for tensors in files[1:]]
    documents, runs = _documents_from(files[0], manifest["documents"], device)
    return SavedBank(settings, documents, runs, layers)


def _document_tensors(documents: Sequence[Document], runs: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    """Return rows, token ids and tails, named by the position of the document, and the order of writing."""
    position = {document.document_id: i for i, document in enumerate(documents)}
    run_list = [[position[document_id], count] for document_id, count in runs]
    tensors = {"runs": torch.tensor(run_list, dtype=torch.int64).view(-1, 2)}
    for i, document in enumerate(documents):
        tensors[f"{i}.rows"] = document.rows.values
        if document.token_ids is not None:
            tensors[f"{i}.token_ids"] = document.token_ids.values
        for layer, (keys, values) in enumerate(document.waiting):
            tensors |= {f"{i}.waiting_keys.{layer}": keys, f"{i}.waiting_values.{layer}": values}
    return tensors


def _documents_from(
    tensors: dict[str, Tensor], saved: Sequence[Sequence[Any]], device: torch.device
) -> tuple[list[Document], list[tuple[str, int]]]:
    """Return what `_document_tensors` was given."""
    documents = []
    for i, (document_id, num_tokens) in enumerate(saved):
        num_tails = sum(name.startswith(f"{i}.waiting_keys.") for name in tensors)
        ids = tensors.get(f"{i}.token_ids")
        document = Document(
            document_id,
            num_tokens=num_tokens,
            rows=IntQueue(tensors[f"{i}.rows"].clone()),
            token_ids=None if ids is None else IntQueue(ids.clone()),
            waiting=[
                (
                    tensors[f"{i}.waiting_keys.{layer}"].to(device, copy=True),
                    tensors[f"{i}.waiting_values.{layer}"].to(device, copy=True),
                )
                for layer in range(num_tails)
            ],
        )
        documents.append(document)
    return documents, [(saved[position][0], count) for position, count in tensors["runs"].tolist()]


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write one file to the disk itself; return what the manifest says about it."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
    _flush(path)
    return {"bytes": path.stat().st_size, "blake2b": _checksum(path)}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest, after a check of its format, schema version and checksum."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"`folder` must be a saved memory bank, got {str(folder)!r}, without a {MANIFEST}; `bank.save` writes one."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _damaged(path, f"cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(path, f"is not the manifest of a {FORMAT}")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"`folder` must hold a bank of schema version {SCHEMA_VERSION}, got version {version!r} in "
            f"{str(folder)!r}; use the version of longmem that wrote it, or a newer one."
        )
    expected = manifest.pop("checksum", None)
    if _checksum_of(manifest) != expected:
        raise _damaged(path, "was changed after it was written (checksum)")
    return manifest


def _check_file(path: Path, expected: dict[str, Any]) -> None:
    """Raise ValueError unless the file is there, byte for byte."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes != expected["bytes"]:
            raise _damaged(path, f"was cut or grew: {expected['bytes']} bytes were saved, there are {num_bytes}")
        if _checksum(path) != expected["blake2b"]:
            raise _damaged(path, "was changed after it was written (checksum)")
    except OSError as error:
        raise _damaged(path, f"cannot be read ({error})") from error


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"`folder` must hold a whole memory bank, but {str(path)!r} {problem}; restore the folder from a copy, or "
        "memorize the documents again."
    )


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _checksum_of(contents: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened, and needs no flush
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError:  # a file that is still mapped, where the system forbids that: the next save tries again
            continue
