"""A serving engine's weights, cut from a model's state dict the way that vLLM's weight loaders do it.

Written from what these loaders do, and knows nothing of portllm: names are replaced, each tensor is narrowed by the
loader of its layer, and copied to its place in a parameter that was allocated before. The allocations are full of NaN
(as engines' are of whatever was there), so padding that something writes to, or reads, shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rank:
    """Which process of the engine this is."""

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    round_robin: bool = False
    up_first: bool = False  # FlashInfer's CUTLASS kernel wants [up; gate]
    transposed: bool = False  # [E, in, out], as Intel's GPUs want it
    vocab_padding: int = 64
    extra_vocab: int = 0


def load(state: Mapping[str, Tensor], config: Any, rank: Rank) -> dict[str, Tensor]:
    """The engine's parameters on one rank, by name.

    Args:
        state: the model's own state dict, each weight under its own name.
        config: heads, kv_heads, head_dim, tied, fused (query, key and value in one weight, gate and up in another).
    """
    loaded: dict[str, Tensor] = {}
    for name, weight in state.items():
        if config.tied and name == "lm_head.weight":
            continue
        for engine_name, shape, corner, part in _place(name, weight, config, rank):
            if engine_name not in loaded:
                loaded[engine_name] = torch.full(shape, torch.nan, dtype=weight.dtype)
            parameter = loaded[engine_name]
            assert tuple(parameter.shape) == tuple(shape)
            for axis, (first, size) in enumerate(zip(corner, part.shape, strict=True)):
                parameter = parameter.narrow(axis, first, size)
            parameter.copy_(part)
    if rank.up_first:
        for name in loaded:
            if name.endswith("w13_weight"):
                up, gate = loaded[name].chunk(2, dim=1)[::-1]
                loaded[name] = torch.cat([up, gate], dim=1)
    if rank.transposed:
        loaded.update({n: w.mT.contiguous() for n, w in loaded.items() if n.endswith(("w13_weight", "w2_weight"))})
    return loaded


_Part = tuple[str, Sequence[int], Sequence[int], Tensor]  # engine's name, its shape, where the part goes, the part


def _place(name: str, weight: Tensor, config: Any, rank: Rank) -> Iterator[_Part]:
    """One weight's parts on this rank."""
    leaf = name.split(".")[-2] if name.endswith((".weight", ".bias")) else name.split(".")[-1]
    size, index = rank.tp_size, rank.tp_rank
    heads, dim = config.heads // size, config.head_dim
    kv_heads = max(1, config.kv_heads // size)
    replicas = max(1, size // config.kv_heads)
    rest = tuple(weight.shape[1:])
    if leaf in ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn"):
        # QKVParallelLinear
        fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}.get(leaf, leaf)
        shape = ((heads + 2 * kv_heads) * dim, *rest)
        parts = {leaf[0]: weight}
        if leaf in ("qkv_proj", "c_attn"):
            rows = [n * dim for n in (config.heads, config.kv_heads, config.kv_heads)]
            parts = dict(zip("qkv", weight.split(rows), strict=True))
        offsets = {"q": 0, "k": heads * dim, "v": (heads + kv_heads) * dim}
        for kind, part in parts.items():
            mine = heads * dim if kind == "q" else kv_heads * dim
            shard = index if kind == "q" else index // replicas
            corner = (offsets[kind], *[0] * len(rest))
            yield name.replace(f".{leaf}.", f".{fused}."), shape, corner, part.narrow(0, shard * mine, mine)
    elif leaf in ("gate_proj", "up_proj") or (leaf == "gate_up_proj" and name.endswith(".weight")):
        # MergedColumnParallelLinear
        parts = weight.chunk(2) if leaf == "gate_up_proj" else [weight]
        rows = parts[0].shape[0] // size
        for i, part in enumerate(parts):
            second = i == 1 or leaf == "up_proj"
            engine_name = name.replace("up_proj", "gate_up_proj") if leaf == "up_proj" else name
            engine_name = engine_name.replace(".gate_proj.", ".gate_up_proj.")
            yield engine_name, (2 * rows, *rest), (rows * second, *[0] * len(rest)), part.narrow(0, index * rows, rows)
    elif leaf in ("o_proj", "down_proj", "c_proj") and weight.dim() == 2:
        # RowParallelLinear
        columns = weight.shape[1] // size
        yield name, (weight.shape[0], columns), (0, 0), weight.narrow(1, index * columns, columns)
    elif leaf in ("c_fc", "q_b_proj", "kv_b_proj"):
        # ColumnParallelLinear
        rows = weight.shape[0] // size
        yield name, (rows, *rest), (0, *[0] * len(rest)), weight.narrow(0, index * rows, rows)
    elif leaf in ("q_a_proj", "kv_a_proj_with_mqa"):
        # DeepSeek's fused_qkv_a_proj, which is not divided
        total = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim
        first = 0 if leaf == "q_a_proj" else config.q_lora_rank
        yield name.replace(leaf, "fused_qkv_a_proj"), (total, *rest), (first, 0), weight
    elif leaf in ("embed_tokens", "lm_head", "wte"):
        # VocabParallelEmbedding: the vocabulary is padded, then divided; rows for LoRA's own tokens come after that.
        padded = _up(len(weight), rank.vocab_padding)
        each = padded // size
        total = _up(padded + rank.extra_vocab, rank.vocab_padding) // size
        part = weight[index * each : (index + 1) * each]
        yield name, (total, *rest), (0, *[0] * len(rest)), part
    elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        yield from _place_experts(name, weight, rank)
    else:
        yield name, weight.shape, [0] * weight.dim(), weight


def _place_experts(name: str, weight: Tensor, rank: Rank) -> Iterator[_Part]:
    """Expert by expert: w1 (gate) and w3 (up) into w13_weight, w2 (down) into w2_weight."""
    here = experts(len(weight), rank)
    size, index = (1, 0) if rank.ep_size > 1 else (rank.tp_size, rank.tp_rank)
    for slot, expert in enumerate(here):
        if name.endswith("gate_up_proj"):
            for half, part in enumerate(weight[expert].chunk(2)):
                rows = len(part) // size
                shape = (len(here), 2 * rows, part.shape[1])
                mine = part.narrow(0, index * rows, rows).unsqueeze(0)
                yield name.replace("gate_up_proj", "w13_weight"), shape, (slot, half * rows, 0), mine
        else:
            columns = weight.shape[2] // size
            mine = weight[expert].narrow(1, index * columns, columns).unsqueeze(0)
            yield name.replace("down_proj", "w2_weight"), (len(here), *mine.shape[1:]), (slot, 0, 0), mine


def experts(count: int, rank: Rank) -> list[int]:
    """The experts of one rank, in its order: in blocks, of which the first take one more each, or dealt out in turn."""
    if rank.round_robin:
        return [e for e in range(count) if e % rank.ep_size == rank.ep_rank]
    local = [count // rank.ep_size + (i < count % rank.ep_size) for i in range(rank.ep_size)]
    first = sum(local[: rank.ep_rank])
    return list(range(first, first + local[rank.ep_rank]))


def stage(loaded: Mapping[str, Tensor], layers: range, last: int) -> dict[str, Tensor]:
    """One pipeline stage: its layers; the first stage has the embedding, the last the norm and the head."""
    kept = {}
    for name, tensor in loaded.items():
        match = re.search(r"\.layers\.(\d+)\.", name)
        first, final = layers.start == 0, layers.stop == last
        if (int(match[1]) in layers) if match else (first if "embed_tokens" in name else final):
            kept[name] = tensor
    return kept


def _up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple
