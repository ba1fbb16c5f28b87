"""Safetensors files that are written once, synced to the disk, mapped, and checked tensor by tensor."""

import errno
import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
}
# The name, in the digests of a file, of everything before its first tensor.
HEADER = ""


def damaged(path: Path, problem: str) -> ValueError:
    """Return the error for a file of a bank that is not as it was written."""
    return ValueError(
        f"the bank needs {str(path)!r} as it was written, but the file {problem}; restore the folder from a copy, or "
        "memorize its documents again."
    )


def not_read(path: Path, error: OSError | RuntimeError) -> ValueError:
    """Return the error for a file of a bank that the system does not open."""
    if isinstance(error, PermissionError):
        return denied(path, error)
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return ValueError(
            f"the bank in {str(path.parent.parent)!r} has more files than this process may open at once ({error}); nothing "
            "is damaged. Allow more (`ulimit -n 65536` in the shell), or close other banks."
        )
    return damaged(path, f"cannot be read ({error})")


def denied(path: Path, error: Exception) -> ValueError:
    """Return the error for a part of a bank that this user may not read."""
    return ValueError(
        f"this user may not read {str(path)!r} of a bank ({error}), and nothing is damaged: a bank is its owner's alone unless "
        "`LONGMEM_ACCESS` said otherwise when it was made; its owner can give access, for example by `chmod -R g+rX`."
    )


def not_written(folder: Path, error: Exception) -> ValueError:
    """Return the error for a folder that cannot take a change."""
    return ValueError(
        f"`folder` must be a folder that can be written, with room for the bank, got {str(folder)!r} ({error}); what was "
        "committed there before is unharmed. Free some room, or use another folder."
    )


def digest(data: Any) -> str:
    """Return 16 bytes of BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write tensors to a new file in the format of safetensors; return the digest of each, and of the header."""
    # Wide numbers first, so that each tensor begins at a multiple of its numbers' size.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, start = {}, 0
    for name in names:
        stop = start + tensors[name].nbytes
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == tensors[name].dtype)
        header[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    file.write(head)
    digests = {HEADER: digest(head)}
    for name in names:
        data = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        file.write(memoryview(data))  # type: ignore[arg-type]  # arrays are buffers
        digests[name] = digest(data)
    return digests


class TensorFile:
    """A file of tensors that is read piece by piece, as pieces are asked for.

    A mapped file is read by touching its pages, which then count as memory of this process until the system wants them for
    something else. Without mapping the system is asked for each piece, which takes longer, leaves nothing behind, and keeps the
    file open. Either way the file can be read on when somebody has removed it. Opening it checks its length (`num_bytes`) and
    its header by `digests`, and raises ValueError, which names the file, if these are not as written.
    """

    def __init__(self, path: Path, num_bytes: int, digests: Mapping[str, str], mapped: bool = True) -> None:
        self.path, self.num_bytes, self.digests = path, num_bytes, digests
        self._descriptor: int | None = None
        self._checked: set[str] = set()
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != num_bytes:
                    raise damaged(path, f"was cut or grew: {num_bytes} bytes were written, there are {found}")
                first = file.read(8)
                start = 8 + int.from_bytes(first, "little")
                header = first + file.read(start - 8) if start <= num_bytes else b""
            if digest(header) != digests[HEADER]:
                raise damaged(path, "was changed after it was written (header)")
            if mapped or not hasattr(os, "preadv"):
                # A private mapping: nobody writes to it, but torch wants memory that could be written to.
                storage = torch.UntypedStorage.from_file(str(path), False, num_bytes)
                self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
            else:
                self._descriptor = os.open(path, os.O_RDONLY)
                weakref.finalize(self, os.close, self._descriptor)
        except (OSError, RuntimeError) as error:  # torch's error is a RuntimeError
            raise not_read(path, error) from error
        self._places = {
            name: (DTYPES[place["dtype"]], place["shape"], *(start + offset for offset in place["data_offsets"]))
            for name, place in json.loads(header[8:]).items()
            if name != "__metadata__"
        }

    def tensor(self, name: str, *, check: bool = False) -> Tensor:
        """Return one tensor; `check` compares it with its digest, the first time."""
        dtype, shape, start, stop = self._places[name]
        if self._descriptor is None:
            data = self._bytes[start:stop]
        else:
            data = torch.empty(stop - start, dtype=torch.uint8)
            self._read(memoryview(data.numpy()), start)  # type: ignore[arg-type]  # arrays are buffers
        if check and name not in self._checked:
            if digest(data.numpy()) != self.digests[name]:
                raise damaged(self.path, f"was changed after it was written (tensor {name!r})")
            self._checked.add(name)
        return data.view(dtype).view(shape)

    def empty(self, name: str, num_pieces: int) -> Shaped[Tensor, "pieces ..."]:
        """Return room for pieces of a tensor."""
        dtype, shape, _, _ = self._places[name]
        return torch.empty(num_pieces, *shape[2:], dtype=dtype)

    def take(self, name: str, places: Int[Tensor, " pieces"], into: Shaped[Tensor, "pieces ..."]) -> None:
        """Copy the pieces of a tensor that its first two axes, counted as one, have at these places."""
        if self._descriptor is None:
            torch.index_select(self.tensor(name).flatten(0, 1), 0, places, out=into)
            return
        start, size = self._places[name][2], into[0].nbytes
        view = memoryview(into.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        for number, place in enumerate(places.tolist()):
            self._read(view[number * size : (number + 1) * size], start + place * size)

    def verify(self) -> None:
        """Raise ValueError unless every byte is as it was written."""
        self.distrust()
        for name in self._places:
            self.tensor(name, check=True)

    def distrust(self) -> None:
        """Compare tensors with their digests again when they are next checked."""
        self._checked.clear()

    def _read(self, view: memoryview, start: int) -> None:
        assert self._descriptor is not None
        while len(view):  # Linux reads 2 GiB at most
            count = os.preadv(self._descriptor, [view], start)
            if not count:
                raise damaged(self.path, "was cut while it was read")
            view, start = view[count:], start + count
