"""The released model in plain torch and double precision, straight from what it is said to compute, recording itself.

Nothing of longmem is used. It shares no code with what it tests, but its author knew both.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm


@dataclasses.dataclass(frozen=True)
class Sizes:
    vocabulary: int = 53
    hidden: int = 24
    num_heads: int = 3
    num_layers: int = 7
    width: int = 56
    factor: int = 3
    side_layers: int = 2
    side_width: int = 40
    retrieval_layer: int = 5
    chunk_size: int = 2
    k: int = 6
    memory_size: int = 41
    lanes: int = 3
    pad: int = 1


def slopes(num_heads: int) -> Tensor:
    """ALiBi, arXiv 2108.12409: a power of two, then every other slope of the next power."""

    def of_power(count: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(count) - 3)))
        return [start * start**i for i in range(count)]

    power = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(of_power(power) + of_power(2 * power)[0::2][: num_heads - power], dtype=torch.float64)


class Reference:
    """Weights and memory of one model; `step` runs a batch and returns every tensor that a recording holds."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        self.sizes, draw = sizes, torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
            return (around + scale * torch.randn(shape, generator=draw)).double()

        d, own, side = sizes.hidden, {}, {}
        own["transformer.wte.weight"] = normal(sizes.vocabulary, d)
        for i in range(sizes.num_layers):
            for name in "qkv":
                own[f"transformer.h.{i}.attn.{name}_proj.weight"] = normal(d, d, scale=d**-0.5)
            own[f"transformer.h.{i}.attn.out_proj.weight"] = normal(d, d, scale=d**-0.5)
            self.add_mlp(own, f"transformer.h.{i}", ("mlp.fc_in", "mlp.fc_out"), d, sizes.width, normal)
        for name, module in ((own, "transformer.ln_f"), (side, "decoder.layer_norm")):
            name[f"{module}.weight"], name[f"{module}.bias"] = normal(d, scale=0.2, around=1), normal(d, scale=0.2)
        own["lm_head.weight"] = normal(sizes.vocabulary, d, scale=d**-0.5)
        own["lm_head.bias"] = normal(sizes.vocabulary, scale=0.2)
        self.reader = sizes.retrieval_layer // sizes.factor
        for i in range(sizes.side_layers):
            for name in ("q", "k", "v", "out"):
                side[f"decoder.layers.{i}.self_attn.{name}_proj.weight"] = normal(d, d, scale=d**-0.5)
            self.add_mlp(side, f"decoder.layers.{i}", ("fc1", "fc2"), d, sizes.side_width, normal)
        side[f"decoder.layers.{self.reader}.self_attn.memory_bias"] = normal(sizes.num_heads)
        # A recording holds float32; from here on the same numbers in double precision.
        self.backbone = {name: tensor.float().double() for name, tensor in own.items()}
        self.side = {name: tensor.float().double().requires_grad_() for name, tensor in side.items()}
        self.capacity = sizes.memory_size // sizes.chunk_size
        self.reset()

    @staticmethod
    def add_mlp(weights: dict, prefix: str, names: tuple[str, str], d: int, width: int, normal) -> None:
        for name, rows, columns in ((names[0], width, d), (names[1], d, width)):
            weights[f"{prefix}.{name}.weight"] = normal(rows, columns, scale=columns**-0.5)
            weights[f"{prefix}.{name}.bias"] = normal(rows, scale=0.2)
        weights[f"{prefix}.ln_1.weight"] = normal(d, scale=0.2, around=1)
        weights[f"{prefix}.ln_1.bias"] = normal(d, scale=0.2)

    def reset(self) -> None:
        s = self.sizes
        self.stored = 0
        self.rows = torch.zeros(2, s.num_heads, self.capacity, s.chunk_size, s.hidden // s.num_heads)
        self.index = torch.zeros(s.num_heads, 0, s.hidden // s.num_heads)

    def heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.sizes.num_heads, -1)).transpose(1, 2)

    def block(self, weights: dict, prefix: str, names: tuple, x: Tensor, mask: Tensor, eps: float, form: str, memory):
        """`attention(n) + mlp(n) + x`; returns attention's output and the block's, and what a recording names."""
        attention, into, out = names
        d = self.sizes.hidden
        normed = layer_norm(x, (d,), weights[f"{prefix}.ln_1.weight"], weights[f"{prefix}.ln_1.bias"], eps)
        q, k, v = (normed @ weights[f"{prefix}.{attention}.{name}_proj.weight"].T for name in "qkv")
        scale = (d // self.sizes.num_heads) ** -0.5
        scores = self.heads(q) @ self.heads(k).transpose(-1, -2) * scale + mask
        mixed = scores.softmax(-1) @ self.heads(v)
        seen = {"ln_out": normed, "query": q, "q": q, "k": k, "v": v}
        if memory is not None:
            mixed = self.read(self.heads(q), mixed, scale, weights[f"{prefix}.{attention}.memory_bias"], seen)
        attended = mixed.transpose(1, 2).flatten(2) @ weights[f"{prefix}.{attention}.out_proj.weight"].T
        inner = normed @ weights[f"{prefix}.{into}.weight"].T + weights[f"{prefix}.{into}.bias"]
        mlp = gelu(inner, approximate=form) @ weights[f"{prefix}.{out}.weight"].T + weights[f"{prefix}.{out}.bias"]
        return attended, attended + mlp + x, seen

    def read(self, query: Tensor, local: Tensor, scale: float, bias: Tensor, seen: dict) -> Tensor:
        """Two softmaxes, mixed per head; a missing slot is the last row, which is zero."""
        wanted, chunk = self.sizes.k // self.sizes.chunk_size, self.sizes.chunk_size
        scores = torch.einsum("bhtd,hnd->hbtn", query.detach(), self.index.double())
        best = scores.topk(min(wanted, self.stored), dim=-1)
        missing = (0, wanted - best.indices.shape[-1])
        rows = torch.nn.functional.pad(best.indices, missing, value=-1)  # heads lanes tokens chunks
        keys, values = (
            torch.stack([part[h][rows[h]] for h in range(len(part))], dim=1).double().flatten(3, 4)
            for part in self.rows
        )  # lanes heads tokens k dim; row -1 is the last one
        weights = (torch.einsum("bhtd,bhtkd->bhtk", query, keys) * scale).softmax(-1)
        memory = torch.einsum("bhtk,bhtkd->bhtd", weights, values)
        seen["knn_index"] = rows.transpose(1, 2).flatten(1, 2)
        padded = torch.nn.functional.pad(best.values, missing, value=torch.finfo(torch.float32).min)
        seen["knn_score"] = padded.transpose(1, 2).flatten(1, 2)
        assert keys.shape[3] == wanted * chunk
        for letter, part in zip("kv", (keys, values), strict=True):
            seen[f"retrieved_{letter}"] = part.flatten(0, 1).to(self.rows.dtype)
        gate = torch.sigmoid(bias)[:, None, None]
        return local * (1 - gate) + memory * gate

    def write(self, key: Tensor, value: Tensor) -> None:
        """All rows one after the other, cut into chunks, the tail dropped; two batches' worth leaves at once."""
        chunk, tokens = self.sizes.chunk_size, key.shape[0] * key.shape[1]
        new = tokens // chunk
        if self.stored + new >= self.capacity:
            gone = math.floor(2 * tokens / chunk)
            assert gone <= self.stored, "the released code would go wrong here"
            self.rows = torch.cat([self.rows[:, :, gone:], torch.zeros_like(self.rows[:, :, :gone])], dim=2)
            self.index, self.stored = self.index[:, gone:], self.stored - gone
        cut = [
            part.float().flatten(0, 1)[: new * chunk].view(new, chunk, self.sizes.num_heads, -1).permute(2, 0, 1, 3)
            for part in (key, value)
        ]
        self.rows[:, :, self.stored : self.stored + new] = torch.stack(cut).to(self.rows.dtype)
        self.index = torch.cat([self.index, cut[0].mean(2)], dim=1)
        self.stored += new

    def step(self, ids: Tensor, *, read_only: bool = False, target: Tensor | None = None) -> dict[str, Tensor]:
        s, real = self.sizes, ids.ne(self.sizes.pad)
        positions = (real.long().cumsum(1) - 1) * real
        alibi = slopes(s.num_heads)[:, None, None] * positions[:, None, None, :]
        future = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        hidden_keys = future | ~real[:, None, None, :]
        out: dict[str, Tensor] = {"input_ids": ids, "alibi": alibi}
        for name in ("ntotal_before", "dstore_before"):
            out[f"memory/{name}"] = torch.tensor(self.stored)
        x = self.backbone["transformer.wte.weight"][ids]
        hidden, mask = [x], alibi.masked_fill(hidden_keys, torch.finfo(torch.float32).min)
        names = ("attn", "mlp.fc_in", "mlp.fc_out")
        for i in range(s.num_layers):
            _, x, seen = self.block(self.backbone, f"transformer.h.{i}", names, x, mask, 1e-6, "tanh", None)
            hidden.append(x)
            if i == s.retrieval_layer:
                key, value = seen["k"], seen["v"]
                out |= {f"backbone_qkv/{name}": seen[name] for name in "qkv"}
        ln_f = (self.backbone[f"transformer.ln_f.{name}"] for name in ("weight", "bias"))
        hidden[-1] = layer_norm(x, (s.hidden,), *ln_f, 1e-6)
        out |= {f"backbone_hidden/{i}": state for i, state in enumerate(hidden)}
        head = self.backbone["lm_head.weight"].T, self.backbone["lm_head.bias"]
        out["backbone_logits"] = hidden[-1] @ head[0] + head[1]
        x = hidden[0]
        out["side_hidden/0"] = x
        for i in range(s.side_layers):
            reads = i == self.reader
            memory = self if reads and self.stored else None
            # The memory path knows no padding: there, padding sees padding.
            mask = alibi.masked_fill(future if memory else hidden_keys, -math.inf)
            arguments = f"decoder.layers.{i}", ("self_attn", "fc1", "fc2"), x, mask, 1e-5, "none", memory
            attended, x, seen = self.block(self.side, *arguments)
            x = x + hidden[s.factor * (i + 1)] - hidden[s.factor * i]
            out[f"side_hidden/{i + 1}"], out[f"side_attn_out/{i}"] = x, attended
            if reads:
                out["mem_layer/attn_out"], out["mem_layer/ln_out"] = attended, seen["ln_out"]
                found = ("knn_index", "knn_score", "retrieved_k", "retrieved_v", "query") if memory else ()
                out |= {f"mem_layer/{name}": seen[name] for name in found}
        norm = (self.side[f"decoder.layer_norm.{name}"] for name in ("weight", "bias"))
        out["features"] = layer_norm(x, (s.hidden,), *norm, 1e-5)
        logits = out["logits"] = out["features"] @ head[0] + head[1]
        if target is not None:
            loss = cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=s.pad)
            gradients = torch.autograd.grad(loss, list(self.side.values()), allow_unused=True)
            pairs = zip(self.side, gradients, strict=True)
            out |= {f"grad/{name}": gradient for name, gradient in pairs if gradient is not None}
            out["target"], out["loss_sum"] = target, loss
        if not read_only:
            self.write(key, value)
        for name in ("ntotal_after", "dstore_after"):
            out[f"memory/{name}"] = torch.tensor(self.stored)
        rows = {"keys": self.rows[0], "vals": self.rows[1], "index_keys": self.index}
        out |= {f"memory/{name}": part for name, part in rows.items()}
        return {name: as_recorded(tensor) for name, tensor in out.items()}


def as_recorded(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.dtype == torch.float64 else tensor).detach().clone().contiguous()


def write_recording(path: Path, sizes: Sizes) -> None:
    """Write runs of every kind, and the settings that no tensor tells."""
    model, draw = Reference(sizes), torch.Generator().manual_seed(1)
    tensors = {f"bb_sd/decoder.model.{name}": as_recorded(tensor) for name, tensor in model.backbone.items()}
    tensors |= {f"sd/{name}": as_recorded(tensor) for name, tensor in model.side.items()}

    def ids(lanes: int, tokens: int) -> Tensor:
        return torch.randint(sizes.pad + 1, sizes.vocabulary, (lanes, tokens), generator=draw)

    def record(run: str, steps: list[dict]) -> None:
        model.reset()
        model.rows = model.rows.to(torch.float16 if run.endswith("f16") else torch.float32)
        for number, options in enumerate(steps):
            batch = options.pop("ids")
            for name, tensor in model.step(batch, **options).items():
                tensors[f"{run}/s{number:02d}/{name}"] = tensor

    short = 3 * sizes.chunk_size
    texts = [ids(1, short + i % 2) for i in range(9)]
    batches = [ids(sizes.lanes, 1 + sizes.chunk_size) for _ in range(7)]
    padded = [ids(sizes.lanes, 2 + sizes.chunk_size) for _ in range(3)]
    padded[1][1, 1:] = padded[2][-1, -1:] = sizes.pad
    for ending in ("f32", "f16"):
        record(f"seq_{ending}", [{"ids": text} for text in texts])
        record(f"batch_{ending}", [{"ids": batch} for batch in batches])
        record(f"padded_{ending}", [{"ids": batch} for batch in padded])
    record("quiet_f16", [{"ids": text, "read_only": i == 2} for i, text in enumerate(texts[:4])])
    target = ids(1, short)
    record("grad_f32", [{"ids": texts[0]}, {"ids": texts[2], "target": target}])
    record("gradempty_f32", [{"ids": texts[0], "target": target}])
    save_file(tensors, path)
    settings = {"layer_reduction_factor": sizes.factor, "retrieval_layer_index": sizes.retrieval_layer}
    path.with_suffix(".json").write_text(json.dumps({"config": settings}))
