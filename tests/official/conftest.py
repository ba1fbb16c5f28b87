"""A recording of the released code, cut to fit here, and recordings of another model at other sizes.

`recording.safetensors` was cut from a recording of eleven runs of github.com/Victorwz/LongMem, commit b7f3c6b, on a tiny
random model: kept are weights, inputs, logits, indices, counters, loss and gradients of every run, the last side hidden
state of float32 runs, and the first 2 to 5 steps of the longest runs; inner values and stored rows are left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kept_fast import fast
from official.reference import Sizes, write_recording

RECORDING = Path(__file__).parent / "recording.safetensors"
# Nothing in common with the sizes of the recording; factors that do not divide the depth, odd numbers of heads, two
# depths of reading.
OTHER_SIZES = {
    "reads last": Sizes(),
    "reads first": Sizes(num_layers=6, retrieval_layer=2, num_heads=2, chunk_size=3, k=9, memory_size=75, lanes=2),
    "one side layer": Sizes(
        num_layers=2, factor=2, side_layers=1, retrieval_layer=1, chunk_size=1, k=4, memory_size=90
    ),
    "factor 1": Sizes(num_layers=2, factor=1, side_layers=2, retrieval_layer=0, side_width=64, width=64, num_heads=4),
}


@pytest.fixture
def recording() -> Path:
    return RECORDING


@pytest.fixture(scope="session", params=fast(2, ["one side layer", "reads first", "factor 1", "reads last"]))
def other_recording(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "other.safetensors"
    write_recording(path, OTHER_SIZES[request.param])
    return path
