"""Safetensors files that are written once, synced to the disk, mapped, and checked tensor by tensor."""

import ctypes
import hashlib
import json
import math
import mmap
import os
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from longmem.memory.folder.foreign import damaged, fits, not_read, open_plain, parse_json, said_by

DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
# The name, in the digests of a file, of everything before its first tensor.
HEADER = ""
LARGEST_HEADER = 2**20
PLACE = {"dtype": str, "shape": [int], "data_offsets": [int]}


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
            with open(open_plain(path), "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != num_bytes:
                    raise damaged(path, f"was cut or grew: {num_bytes} bytes were written, there are {found}")
                first = file.read(8)
                start = 8 + int.from_bytes(first, "little")
                header = first + file.read(start - 8) if start <= min(num_bytes, LARGEST_HEADER) else b""
            if digest(header) != digests.get(HEADER):
                raise damaged(path, "was changed after it was written (header)")
            with said_by(path):
                self._places = _places(header, num_bytes)
            if not digests.keys() >= self._places.keys():
                raise damaged(path, "has tensors that the catalogue does not know of")
            if mapped or not hasattr(os, "preadv"):
                # A private mapping: nobody writes to it, but torch wants memory that could be written to.
                storage = torch.UntypedStorage.from_file(str(path), False, num_bytes)
                self._bytes = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[arg-type]
            else:
                self._descriptor = open_plain(path)
                weakref.finalize(self, os.close, self._descriptor)
        except (OSError, RuntimeError) as error:  # torch's error is a RuntimeError
            raise not_read(path, error) from error

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return the type and the shape of each tensor."""
        return {name: (dtype, tuple(shape)) for name, (dtype, shape, _, _) in self._places.items()}

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

    def take(self, name: str, places: Int[Tensor, " pieces"], into: Shaped[Tensor, "pieces ..."], check: bool) -> None:
        """Copy the pieces of a tensor that its first two axes, as one, have at these places; what is `check`ed is let go of."""
        if check and name not in self._checked:
            self.tensor(name, check=True)
        if self._descriptor is None:
            torch.index_select(self.tensor(name).flatten(0, 1), 0, places, out=into)
            if check:
                self._let_go(name)
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
            self._let_go(name)

    def distrust(self) -> None:
        """Compare tensors with their digests again when they are next checked."""
        self._checked.clear()

    def _let_go(self, name: str) -> None:
        """Hold the pages of a mapped tensor no longer: they are the file's, and come back when they are touched."""
        if self._descriptor is None and sys.platform == "linux":  # elsewhere they go when the system wants them
            first, stop = (self._bytes.data_ptr() + place for place in self._places[name][2:])
            first -= first % mmap.PAGESIZE
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED)

    def _read(self, view: memoryview, start: int) -> None:
        assert self._descriptor is not None
        while len(view):  # Linux reads 2 GiB at most
            count = os.preadv(self._descriptor, [view], start)
            if not count:
                raise damaged(self.path, "was cut while it was read")
            view, start = view[count:], start + count


def _places(header: bytes, num_bytes: int) -> dict[str, tuple[torch.dtype, list[int], int, int]]:
    """Return type, shape and first and last byte of each tensor. Raises ValueError where one is not inside the file."""
    places = {}
    for name, place in parse_json(header[8:].decode()).items():
        if name == "__metadata__":
            continue
        if not fits(place, PLACE) or place["dtype"] not in DTYPES or len(place["data_offsets"]) != 2:
            raise ValueError(f"{name!r} is no tensor of a bank")
        dtype, (start, stop) = DTYPES[place["dtype"]], (len(header) + offset for offset in place["data_offsets"])
        fills = math.prod(place["shape"]) * dtype.itemsize == stop - start
        if not fills or stop > num_bytes or start % dtype.itemsize or len(place["shape"]) > 8:
            raise ValueError(f"{name!r} is not inside the file")
        places[name] = dtype, place["shape"], start, stop
    return places
