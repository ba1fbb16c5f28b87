"""The encoder path: the tensors of a backbone that stored keys and values depend on, what else does, and hashes of them.

Keys and values of memory layer m depend on the embeddings, on the layers below m, and in layer m on its norm and its
key and value projections. Everything else may be trained and nothing goes stale.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from longmem.backbone.capture import Backbone
from longmem.backbone.structure import probe_ids
from longmem.encoder.stamp import WEIGHTS, plain

# Fields of a configuration that change nothing that is stored: names, versions, how it is run, what is generated.
WITHOUT_EFFECT = frozenset(
    ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map")
    + ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "id2label", "label2id")
    + ("quantization_config",)
)
DTYPES_BY_SIZE = (torch.float32, torch.bfloat16, torch.float16)
SUMMED_PIECES, SUMMED_PIECE = 16, 4096  # of a weight, and numbers of each


@dataclass(frozen=True)
class EncoderPath:
    """The tensors that stored keys and values depend on, and the modules that hold them or stand above those."""

    leaves: tuple[tuple[str, nn.Module, str], ...]  # name, module, name in it, of every parameter and saved buffer
    modules: tuple[tuple[str, nn.Module], ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and tensors as they are now, on the CPU; those that a device map has offloaded are fetched."""
        for name, module, leaf in self.leaves:
            yield name, on_cpu(module, leaf)


@torch.inference_mode(False)
@torch.no_grad()
def encoder_path(backbone: Backbone, memory_layers: Sequence[int]) -> EncoderPath:
    """Return the encoder path of these memory layers, found by running the backbone over a few tokens.

    Layers below the highest memory layer belong to it as a whole: a router may send other tokens to other experts. So does
    a module that is entered before that layer's keys are there; in that layer itself only tensors with a gradient of keys or
    values, where gradients can be asked for (not of quantized or offloaded weights).
    """
    highest = max(memory_layers)
    layer = backbone.structure.layers[highest].layer
    below = {module for each in backbone.structure.layers[:highest] for module in each.layer.modules()}
    entered: dict[nn.Module, None] = {}
    unread: set[int] = set()

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.setdefault(module)

    handles = [module.register_forward_pre_hook(enter) for module in backbone.model.modules()]
    try:
        with _watching_gradients(layer) as can_ask:
            keys, values = backbone.encode(probe_ids(backbone.model), [highest])
            if can_ask:
                with torch.enable_grad():
                    parameters = list(layer.parameters())
                    total = keys[0].float().sum() + values[0].float().sum()
                    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
                unread = {id(each) for each, found in zip(parameters, gradients, strict=True) if found is None}
    finally:
        for handle in handles:
            handle.remove()
    on_path = {module: name for name, module in backbone.model.named_modules() if module in entered or module in below}
    leaves = [
        (f"{name}.{leaf}" if name else leaf, module, leaf)
        for module, name in on_path.items()
        for leaf in own_tensors(module)
        if id(getattr(module, leaf)) not in unread
    ]
    return EncoderPath(tuple(sorted(leaves, key=lambda each: each[0])), tuple((n, m) for m, n in on_path.items()))


@contextlib.contextmanager
def _watching_gradients(layer: nn.Module) -> Iterator[bool]:
    """Record gradients from the entry of `layer` to the end of the block; yield whether all its weights can have some."""
    parameters = list(layer.parameters())
    can_ask = bool(parameters) and all(
        each.is_floating_point() and not each.is_meta and not each.is_inference() and type(each.data) is Tensor
        for each in parameters
    )
    before = [parameter.requires_grad for parameter in parameters]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if can_ask:
            torch.set_grad_enabled(True)  # until the run's own `no_grad` ends
            for parameter in parameters:
                parameter.requires_grad_(True)

    handle = layer.register_forward_pre_hook(enter)
    try:
        yield can_ask
    finally:
        handle.remove()
        if can_ask:
            for parameter, requires_grad in zip(parameters, before, strict=True):
                parameter.requires_grad_(requires_grad)


def whole_path(model: PreTrainedModel) -> EncoderPath:
    """Return all tensors of a model: what its last hidden states and its logits depend on."""
    modules = tuple(model.named_modules())
    leaves = ((f"{name}.{leaf}", module, leaf) for name, module in modules for leaf in own_tensors(module))
    return EncoderPath(tuple(leaves), modules)


def own_tensors(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters and of its buffers that belong to a checkpoint."""
    hidden = module._non_persistent_buffers_set
    named = {**module._parameters, **{name: each for name, each in module._buffers.items() if name not in hidden}}
    return [name for name, tensor in named.items() if tensor is not None]


def hash_tensors(tensors: Iterator[tuple[str, Tensor]]) -> str:
    """Return a hash of names, dtypes, shapes and bytes of tensors on the CPU, in the order given."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in tensors:
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def configuration_recipe(model: PreTrainedModel) -> dict[str, Any]:
    """Return the backbone's configuration (rotary scaling, activations, ...) where it is not its type's default."""
    settings = model.config.get_text_config().to_diff_dict()
    return {f"backbone.{name}": value for name, value in settings.items() if name not in WITHOUT_EFFECT}


@dataclass(frozen=True)
class BackboneStamp:
    """Which backbone a side network was trained beside: a sum over its weights for some dtypes, and its configuration.

    A sum is of the weights' bits after they were cast, so it is the same on every device. Of a large weight it is of
    `SUMMED_PIECES` pieces at even distances: training moves every number, and a model opens in the time it did.
    """

    sums: Mapping[str, int]
    recipe: Mapping[str, Any]

    @classmethod
    def of(cls, backbone: PreTrainedModel) -> "BackboneStamp":
        """Return the stamp of a backbone, for its own dtype and those that it may be cast to."""
        kept = DTYPES_BY_SIZE[DTYPES_BY_SIZE.index(backbone.dtype) :] if backbone.dtype in DTYPES_BY_SIZE else ()
        kept = kept[:1] if backbone.dtype == torch.bfloat16 else kept
        sums = {str(dtype): found for dtype in kept if (found := weight_sum(backbone, dtype)) is not None}
        return cls(sums, plain(configuration_recipe(backbone)))

    def diff(self, backbone: PreTrainedModel) -> list[str]:
        """Return in what a backbone differs from the one of this stamp, as far as that can be known."""
        config = backbone.config.get_text_config()
        default, now = plain(type(config)().to_dict()), plain(config.to_dict())  # a recipe leaves out what is default
        names = []
        for name in sorted(self.recipe.keys() | configuration_recipe(backbone).keys()):
            field = name.removeprefix("backbone.")
            if field in now and (name in self.recipe or field in default):
                names += [name] * (self.recipe.get(name, default.get(field)) != now[field])
        same = str(backbone.dtype) if str(backbone.dtype) in self.sums else None
        if backbone.dtype == torch.float32:  # it may have been cast when the side network was saved
            same = next((dtype for dtype in self.sums), None)
        if same is not None:
            found = weight_sum(backbone, getattr(torch, same.removeprefix("torch.")))
            names += [WEIGHTS] * (found not in (None, self.sums[same]))
        return names

    def to_json(self) -> dict[str, Any]:
        """Return plain values for `from_json`."""
        return {"sums": dict(self.sums), "recipe": dict(self.recipe)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "BackboneStamp":
        return cls(content["sums"], content["recipe"])


@torch.no_grad()
def weight_sum(model: nn.Module, dtype: torch.dtype) -> int | None:
    """Return the sum of the bits of a model's weights as numbers of a dtype; None where weights are quantized or offloaded."""
    total, bits = 0, torch.int32 if dtype == torch.float32 else torch.int16
    for weight in model.parameters():
        if weight.is_meta or type(weight.data) is not Tensor or not weight.is_floating_point():
            return None
        numbers = weight.detach().reshape(-1)
        if (apart := len(numbers) // SUMMED_PIECES) > SUMMED_PIECE:
            numbers = numbers[: apart * SUMMED_PIECES].view(SUMMED_PIECES, apart)[:, :SUMMED_PIECE]
        total += int(numbers.to(dtype).contiguous().view(bits).sum(dtype=torch.int64))
    return total


def on_cpu(module: nn.Module, leaf: str) -> Tensor:
    """Return the values of a module's tensor; one that a device map has offloaded is fetched for the moment."""
    tensor = getattr(module, leaf)
    if not tensor.is_meta:
        values = tensor.detach().cpu()
        return (values if type(values) is Tensor else values.dequantize()).contiguous()
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, leaf).detach().clone()
