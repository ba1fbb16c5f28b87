"""How keys and values are stored: as floats of the storage dtype, or in one byte a number with a scale for each vector.

int8: a vector (of one token and head) becomes `dim` whole numbers from -127 to 127 and, in the two bytes behind them, the
bfloat16 scale to multiply them by. One tensor holds all, so whoever copies, moves or saves rows need not know of scales.
"""

import torch
from jaxtyping import Float, Num
from torch import Tensor

FLOATING_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
STORAGE_DTYPES = {**FLOATING_DTYPES, "int8": torch.int8}

LARGEST_STEP = 127
# bfloat16 for its range, that of float32: a float16 scale is inf for vectors that reach 1e7 and 0 for those below 4e-6.
SCALE_DTYPE = torch.bfloat16
# Scales below it would be subnormal, and zero on some devices; it makes zeros of zeros.
SMALLEST_SCALE = torch.finfo(SCALE_DTYPE).tiny


def stored_width(dim: int, storage_dtype: torch.dtype) -> int:
    """Return the width of the stored form of vectors of `dim` numbers.

    >>> stored_width(64, torch.int8), stored_width(64, torch.float16)
    (66, 64)
    """
    return dim + (SCALE_DTYPE.itemsize if storage_dtype == torch.int8 else 0)


def vector_width(stored: int, storage_dtype: torch.dtype) -> int:
    """Return the `dim` whose `stored_width` is `stored`."""
    return stored - stored_width(0, storage_dtype)


def largest_number(storage_dtype: torch.dtype) -> float:
    """Return the largest number that `decode` can give back."""
    return torch.finfo(torch.float32 if storage_dtype == torch.int8 else storage_dtype).max


def encode(vectors: Float[Tensor, "*axes dim"], storage_dtype: torch.dtype) -> Num[Tensor, "*axes stored_dim"]:
    """Return vectors as they are stored: a cast or, for int8, absmax / 127 as the scale of each and rounding to nearest.

    No number is then further than absmax / 254 * (1 + 1/256) from its decoded form, and none needs clipping: the scale,
    rounded to nearest like the rest, is at most 1/257 short, which makes 127.496 of 127. Vectors below 1e-36 are kept to
    6e-39.

    >>> encode(torch.tensor([[254.0, -3.0, 0.0], [0.0, 0.0, 0.0]]), torch.int8)[:, :3]
    tensor([[127,  -2,   0],
            [  0,   0,   0]], dtype=torch.int8)
    """
    if storage_dtype != torch.int8:
        return vectors.to(storage_dtype)
    vectors = vectors.float()
    scale = (vectors.abs().amax(dim=-1, keepdim=True) / LARGEST_STEP).to(SCALE_DTYPE).clamp_min(SMALLEST_SCALE)
    return torch.cat([(vectors / scale).round().to(torch.int8), scale.view(torch.int8)], dim=-1)


def decode(stored: Num[Tensor, "*axes stored_dim"]) -> Float[Tensor, "*axes dim"]:
    """Return the vectors that `encode` was given, rounded: float32 for int8, else as they are stored.

    float32, because the product of seven and eight bits is exact there, because nothing overflows, and because a CPU
    computes attention in it: products in half precision take it twice the time, and would then be cast.
    """
    if stored.dtype != torch.int8:
        return stored
    dim = vector_width(stored.shape[-1], stored.dtype)
    # A copy, always: the bytes of a single vector are contiguous as they are, but may start at an odd address.
    scale = stored[..., dim:].clone(memory_format=torch.contiguous_format).view(SCALE_DTYPE)
    return stored[..., :dim].float().mul_(scale)
