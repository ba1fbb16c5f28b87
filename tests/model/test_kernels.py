"""Which attention kernel computes the local context with the memory as one more key: one fused one, as without memory.

On the CPU the kernels are PyTorch's own for it, and its flash kernel takes what that of a GPU takes: no scores, no mask in the
way of a prompt, keys and values of one width. On a GPU the same tests look for the kernel there (`-m gpu`).
"""

from collections import Counter

import pytest
import torch
from model.conftest import SETTINGS, build_backbone
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from longmem import LongMemForCausalLM, MemoryBank
from longmem.backbone.cache_names import cache_of

LAYERS = 4
KERNELS = {"cpu": "_scaled_dot_product_flash_attention_for_cpu", "cuda": "_scaled_dot_product_flash_attention"}
CASES = [
    ("cpu", torch.float32),
    ("cpu", torch.bfloat16),
    pytest.param(("cuda", torch.bfloat16), marks=pytest.mark.gpu),
]


class Kernels(TorchDispatchMode):
    """Counts the attention kernels that run, and notes which of them were given a mask."""

    def __init__(self):
        super().__init__()
        self.counts, self.masked = Counter(), 0

    def __torch_dispatch__(self, operation, types, given=(), options=None):
        name = operation.overloadpacket.__name__
        if "scaled_dot_product" in name and "backward" not in name:
            self.counts[name] += 1
            self.masked += any(
                isinstance(each, torch.Tensor) for each in [*given[3:], (options or {}).get("attn_mask")]
            )
        return operation(*given, **(options or {}))


@pytest.fixture(params=CASES, ids=str)
def reader(request, document):
    device, dtype = request.param
    backbone = build_backbone("llama", attn_implementation="sdpa").to(device, dtype)
    model = LongMemForCausalLM.from_backbone(backbone, memory_layers=[1, 2], **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    return model, bank, KERNELS[device]


def kernels_of(call):
    """Return what ran in a call in which no unfused attention may run."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), Kernels() as kernels:
        call()
    return kernels


def test_a_prompt_is_read_by_one_flash_kernel_a_layer(reader, input_ids):
    model, bank, kernel = reader
    ids = input_ids.to(model.device)
    with torch.no_grad():
        for options in ({}, {"memory": bank}):
            kernels = kernels_of(lambda options=options: model(ids, **options))
            assert set(kernels.counts) == {kernel}
            assert kernels.masked == 0  # causal by position, with the memory's key before the others
            # Frozen layers below the first that reads run once; the side network's own stand in for those above.
            assert kernels.counts[kernel] == (LAYERS if not options else kernels.counts[kernel])
            assert kernels.counts[kernel] <= LAYERS + 1


def test_training_takes_the_same_kernel_forward_and_backward(reader, input_ids):
    model, bank, kernel = reader
    ids = input_ids.to(model.device)
    model.train()
    kernels = kernels_of(lambda: model(ids, memory=bank, labels=ids).loss.backward())
    assert set(kernels.counts) == {kernel}
    assert kernels.masked == 0
    gradients = [each.grad for each in model.side_network.parameters() if each.grad is not None]
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_decoding_takes_it_as_well(reader, input_ids):
    model, bank, kernel = reader
    ids = input_ids[:1].to(model.device)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :12], memory=bank, use_cache=True))
        kernels = kernels_of(lambda: model(ids[:, 12:13], memory=bank, cache=cache, use_cache=True))
    assert set(kernels.counts) == {kernel}


def test_a_written_out_softmax_is_no_fused_kernel(document, input_ids):
    """The tests above can fail: attention that is written out runs none of these kernels."""
    backbone = build_backbone("llama", attn_implementation="eager")
    model = LongMemForCausalLM.from_backbone(backbone, memory_layers=[1, 2], **SETTINGS).eval()
    bank = MemoryBank.for_model(model)
    model.memorize(bank, document, document_id="a")
    with torch.no_grad():
        assert not kernels_of(lambda: model(input_ids, memory=bank)).counts
