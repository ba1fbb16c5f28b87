"""The Triton kernel that reads stored chunks in place, in Triton's interpreter: what the plain path computes of copies."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="comes with torch for CUDA, not with that for the CPU")

from model.conftest import SETTINGS, build_backbone

from longmem import LongMemForCausalLM, MemoryBank
from longmem.memory.rows.storage import cut_into_chunks, decode
from longmem.model import attention
from longmem.model.attention import NO_MEMORY, attend_block
from longmem.model.fused_read import attend_rows

HEADS, ROWS, SIZE, DIM, VALUE_DIM, QUERIES, CHUNKS = 2, 11, 3, 6, 5, 4, 13
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "options", [(), ("sizes",), ("log_weights", "softcap"), ("sizes", "log_weights", "softcap")], ids=str
)
def test_it_computes_what_copies_give(device, dtype, options):
    if (device == "cpu") != (os.environ["TRITON_INTERPRET"] == "1"):
        pytest.skip("a GPU needs TRITON_INTERPRET=0, which compiles, and a CPU needs 1")
    chunks = cut_into_chunks(some(HEADS, ROWS * SIZE, DIM), some(HEADS, ROWS * SIZE, VALUE_DIM, seed=1), SIZE, dtype)
    queries = some(HEADS, QUERIES, DIM, seed=2)
    rows = torch.randint(-1, ROWS, (HEADS, QUERIES, CHUNKS), generator=torch.Generator().manual_seed(3))
    rows[0, 1] = -1  # nothing was found
    sizes = torch.randint(1, SIZE + 1, rows.shape) if "sizes" in options else None
    log_weights = -some(*rows.shape, seed=4).abs() if "log_weights" in options else None
    softcap = 1.5 if "softcap" in options else None
    given = [queries, chunks.keys, chunks.values, rows, sizes, log_weights]
    given = [None if each is None else each.to(device) for each in given]
    found = attend_rows(*given, 0.4, softcap, NO_MEMORY)
    heads = torch.arange(HEADS)[:, None, None]
    keys, values = (decode(each[heads, rows.clamp(min=0)]).float().flatten(2, 3) for each in chunks[:2])
    is_found = (rows >= 0).repeat_interleave(SIZE, dim=-1)
    if sizes is not None:
        is_found &= (torch.arange(SIZE) < sizes.unsqueeze(-1)).flatten(2)
    spread = None if log_weights is None else log_weights.repeat_interleave(SIZE, dim=-1)
    output, logsumexp, weights = attend_block(queries, keys, values, ~is_found, 0.4, softcap, spread)
    expected = output, logsumexp, weights.unflatten(-1, (CHUNKS, SIZE)).sum(-1)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)
    assert found[1][0, 1] == NO_MEMORY


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("gemma2", {"search": "token", "storage_dtype": "int8"})],  # the second has soft-capped scores
)
def test_a_model_reads_by_it_as_by_copies(settings, model_type, input_ids, document, monkeypatch):
    input_ids = input_ids[:1, :5]
    fields = {"search": settings["search"]} if "search" in settings else {}
    model = LongMemForCausalLM.from_backbone(build_backbone(model_type), **SETTINGS, **fields).eval()
    options = {name: value for name, value in settings.items() if name != "search"}
    bank = MemoryBank.for_model(model, **options, index="exact")
    model.memorize(bank, document[:-1], document_id="a")  # its last chunk is a shorter one

    def read(memory):
        with torch.no_grad():
            output = model(input_ids, memory=memory, output_memory_reads=True)
        return output.logits, torch.stack([each.chunk_weights for each in output.memory_reads])

    plain = [read(memory) for memory in (bank, bank.select(["a"]))]
    ran = []
    monkeypatch.setattr(attention, "reads_fused", lambda queries: ran.append(1) or True)
    gather = MemoryBank.gather
    monkeypatch.setattr(MemoryBank, "gather", lambda *given: pytest.fail("copied what it read"))
    for memory, expected in zip((bank, bank.select(["a"])), plain, strict=True):
        for one, other in zip(read(memory), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert ran
    monkeypatch.setattr(MemoryBank, "gather", gather)
    bank.to("cpu")
    training = model.train()(input_ids, memory=bank, labels=input_ids)  # with gradients by the plain way
    training.loss.backward()
    assert any(each.grad is not None and each.grad.any() for each in model.side_network.parameters())


def test_nobody_takes_it_unasked(monkeypatch):
    queries = torch.zeros(1, 1, 4)
    assert not attention.reads_fused(queries)
    monkeypatch.setenv("LONGMEM_FUSED_READ", "1")
    assert not attention.reads_fused(queries)  # not on a CPU
