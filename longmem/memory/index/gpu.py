"""FAISS on a GPU: its resources, made once for each device, and searches of tensors where they are.

FAISS is given pointers. Its own `faiss.contrib.torch_utils` would do that as well, but replaces methods of all indexes, also on
the CPU, by some that take no search parameters.
"""

from __future__ import annotations

import functools
from typing import Any

import faiss
import torch
from jaxtyping import Float, Int
from torch import Tensor

SCRATCH_BYTES = 2**28  # of a GPU's memory, for all searches there; FAISS's default is 1.5 GiB
MOST_FOUND = 2_048  # that FAISS finds for one query on a GPU; also the clusters that it looks into

Ranked = tuple[Float[Tensor, "queries found"], Int[Tensor, "queries found"]]


def searches_on(device: torch.device) -> bool:
    """Return whether FAISS searches on this device: a CUDA GPU, and the GPU build of FAISS."""
    return device.type == "cuda" and hasattr(faiss, "StandardGpuResources")


@functools.cache
def _made_resources(device: torch.device) -> Any:
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(SCRATCH_BYTES)
    return resources


def resources_of(device: torch.device) -> Any:
    """Return FAISS's resources on a device, made once, with bounded scratch memory, on torch's current stream."""
    resources = _made_resources(device)
    if device.type == "cuda":
        stream = faiss.cast_integer_to_cudastream_t(torch.cuda.current_stream(device).cuda_stream)  # type: ignore[attr-defined]
        resources.setDefaultStream(device.index, stream)
    return resources


def knn(queries: Float[Tensor, "queries dim"], keys: Float[Tensor, "rows dim"], num_found: int) -> Ranked:
    """Return the largest inner products of each query and their rows, best first, without a copy; `num_found` <= MOST_FOUND."""
    queries, keys = queries.contiguous(), keys.contiguous()
    scores, rows = _room(queries, num_found)
    asked = faiss.GpuDistanceParams()
    asked.metric, asked.k, asked.dims = faiss.METRIC_INNER_PRODUCT, num_found, queries.shape[1]
    asked.vectors, asked.numVectors = _floats(keys), len(keys)
    asked.queries, asked.numQueries = _floats(queries), len(queries)
    asked.outDistances, asked.outIndices, asked.device = _floats(scores), _integers(rows), queries.device.index
    faiss.bfKnn(resources_of(queries.device), asked)
    return scores, rows


def copy_of(index: Any, device: torch.device) -> Any:
    """Return a copy of an inverted file on a GPU. Raises RuntimeError where FAISS has no such index there."""
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True  # tables of codes, which in float32 are too large for 64 codes of a key
    return faiss.index_cpu_to_gpu(resources_of(device), device.index, index, options)


def search(copy: Any, queries: Float[Tensor, "queries dim"], num_found: int, probes: int) -> Ranked:
    """Return what an index on the queries' GPU finds in so many clusters: scores and labels, -1 where it finds no more."""
    queries = queries.contiguous()
    scores, labels = _room(queries, num_found)
    resources_of(queries.device)
    copy.nprobe = min(probes, MOST_FOUND)
    copy.search_c(len(queries), _floats(queries), num_found, _floats(scores), _integers(labels))
    return scores, labels


def _room(queries: Tensor, num_found: int) -> Ranked:
    scores = queries.new_empty(len(queries), num_found)
    return scores, torch.empty_like(scores, dtype=torch.int64)


def _floats(tensor: Tensor) -> Any:
    return faiss.cast_integer_to_float_ptr(tensor.data_ptr())


def _integers(tensor: Tensor) -> Any:
    return faiss.cast_integer_to_idx_t_ptr(tensor.data_ptr())
