"""Patches for pruned and grown models: cut to an index map, which is given or found. Truth: pruning written out here."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import portllm
from portllm import IndexMap, Patch, _native, cut, ops
from portllm.errors import PatchError, PlanError, UnsupportedPatchError

from . import families, tiny
from .families import FAMILIES, VOCAB
from .tiny import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")
BF16, FP32 = torch.bfloat16, torch.float32
Kept = Sequence["int | None"]

# How the tiny models of tests/families.py store their weights: (first axis, second axis) by the name's end.
_LLAMA = {
    "embed_tokens.weight": "vh", "lm_head.weight": "vh", "q_proj.weight": "qh", "k_proj.weight": "kh",
    "v_proj.weight": "kh", "o_proj.weight": "hq", "gate_proj.weight": "fh", "up_proj.weight": "fh",
    "down_proj.weight": "hf", "layernorm.weight": "h", "model.norm.weight": "h", "q_norm.weight": "-",
    "k_norm.weight": "-",
}  # fmt: skip
STORED = {
    **dict.fromkeys(("llama", "mistral", "gemma2", "qwen3"), _LLAMA),
    "phi3": {**_LLAMA, "qkv_proj.weight": ("qkk", "h"), "gate_up_proj.weight": ("ff", "h")},
    "mixtral": {**_LLAMA, "mlp.gate.weight": "eh", "gate_up_proj": ("e", "ff", "h"), "experts.down_proj": "ehf"},
    "gpt2": {
        "wte.weight": "vh", "lm_head.weight": "vh", "wpe.weight": "-h", "c_attn.weight": ("h", "qqq"),
        "c_attn.bias": ("qqq",), "attn.c_proj.weight": "qh", "c_fc.weight": "hf", "c_fc.bias": "f",
        "mlp.c_proj.weight": "fh", "c_proj.bias": "h", "ln_1.weight": "h", "ln_2.weight": "h", "ln_f.weight": "h",
        "ln_1.bias": "h", "ln_2.bias": "h", "ln_f.bias": "h",
    },
    "bert": {
        "word_embeddings.weight": "vh", "position_embeddings.weight": "-h", "token_type_embeddings.weight": "-h",
        "query.weight": "qh", "key.weight": "qh", "value.weight": "qh", "query.bias": "q", "key.bias": "q",
        "value.bias": "q", "attention.output.dense.weight": "hq", "intermediate.dense.weight": "fh",
        "intermediate.dense.bias": "f", "output.dense.weight": "hf", "output.dense.bias": "h",
        "LayerNorm.weight": "h", "LayerNorm.bias": "h", "pooler.dense.weight": "hh", "pooler.dense.bias": "h",
        "classifier.weight": "-h", "classifier.bias": "-",
    },
    "t5": {
        "shared.weight": "vh", "embed_tokens.weight": "vh", "lm_head.weight": "vh", "Attention.q.weight": "qh",
        "Attention.k.weight": "qh", "Attention.v.weight": "qh", "Attention.o.weight": "hq",
        "relative_attention_bias.weight": "-q1", "wi_0.weight": "fh", "wi_1.weight": "fh", "wo.weight": "hf",
        "layer_norm.weight": "h",
    },
}  # fmt: skip
SIZES = {"layers": 2, "heads": 4, "kv_heads": 2, "hidden": 32, "intermediate": 44, "vocabulary": VOCAB}
FAMILY_SIZES = {
    **{name: SIZES for name in FAMILIES},
    "mixtral": {**SIZES, "intermediate": 20, "experts": 4},
    "gpt2": {k: v for k, v in {**SIZES, "intermediate": 128}.items() if k != "kv_heads"},
    "bert": {k: v for k, v in SIZES.items() if k != "kv_heads"},
    "t5": {k: v for k, v in SIZES.items() if k != "kv_heads"},
}
HEAD_DIM = {"llama": 8, "mistral": 12, "gemma2": 8, "qwen3": 12, "phi3": 8, "mixtral": 8, "gpt2": 8, "bert": 8, "t5": 6}
_LETTERS = {"v": "vocabulary", "h": "hidden", "q": "heads", "k": "kv_heads", "f": "intermediate", "e": "experts"}


def axis(family: str, letters: str, kept: Mapping[str, Kept], size: int) -> list[int]:
    """The base's indices along one stored axis; -1 for what is added."""
    if letters == "-":
        return list(range(size))
    found: list[int] = []
    start = 0
    for letter in letters:
        kind = _LETTERS[letter]
        unit = HEAD_DIM[family] if letter in "qk" else 1
        count = FAMILY_SIZES[family][kind]
        for index in kept.get(kind, range(count)):
            found += [-1] * unit if index is None else range(start + index * unit, start + (index + 1) * unit)
        start += count * unit
    assert start == size
    return found


def axes(family: str, name: str, tensor: Tensor, kept: Mapping[str, Kept]) -> list[list[int]]:
    spec = max((s for s in STORED[family].items() if name.endswith(s[0])), key=lambda s: len(s[0]))[1]
    if spec == "-q1":  # one column for each head, not head_dim of them
        return [list(range(tensor.shape[0])), [-1 if i is None else i for i in kept.get("heads", range(4))]]
    assert len(spec) == tensor.dim()
    return [axis(family, letters, kept, tensor.shape[i]) for i, letters in enumerate(spec)]


def prune(
    family: str, state: Mapping[str, Tensor], kept: Mapping[str, Kept], new: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The pruned or grown model's tensors; what is added takes the values of ``new``, or is random."""
    made: dict[str, Tensor] = {}
    layers = kept.get("layers", range(2))
    for name, tensor in state.items():
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        numbers = [None] if place is None else [n for n, old in enumerate(layers) if old == int(parts[place])]
        if place is not None and int(parts[place]) == 0:  # a layer that is new looks like the first one
            numbers += [n for n, old in enumerate(layers) if old is None]
        for number in numbers:
            renamed = ".".join(str(number) if i == place else part for i, part in enumerate(parts))
            added = torch.zeros((), dtype=torch.bool)
            value = tensor
            for i, indices in enumerate(axes(family, name, tensor, kept)):
                index = torch.tensor(indices)
                value = value.index_select(i, index.clamp(min=0))
                added = added | (index < 0).view([-1 if j == i else 1 for j in range(tensor.dim())])
            if number is not None and layers[number] is None:
                added = torch.ones((), dtype=torch.bool)
            fresh = torch.randn(value.shape).to(value) if new is None else new[renamed]
            made[renamed] = torch.where(added, fresh, value)
    return made


def index_map(family: str, kept: Mapping[str, Kept], **more: Any) -> IndexMap:
    kinds = {kind: (FAMILY_SIZES[family][kind], list(keep)) for kind, keep in kept.items()}
    return IndexMap.of(**kinds, **more)


def state_of(family: str, dtype: torch.dtype = FP32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in families.state(FAMILIES[family].build()).items()}


def adapter(family: str, path: Path, **changes: Any) -> Patch:
    """What PEFT saves of the family's adapter."""
    return Patch.load(families.save_adapter(FAMILIES[family].build(), FAMILIES[family].config(**changes), path))


def exact_backends() -> list[str]:
    """Those that sum each element in the same order wherever it stands; matrix libraries do not."""
    return ["cpu"] if ops.unavailable("cpu") is None and _native.isa() != "amx_bf16" else []


def applied(state: Mapping[str, Tensor], patch: Patch, backend: str, **options: Any) -> dict[str, Tensor]:
    named = {name: tensor.clone() for name, tensor in state.items()}
    portllm.apply(named, patch, backend=backend, **options)
    return named


def assert_commutes(family: str, base: Mapping[str, Tensor], patch: Patch, kept: Mapping[str, Kept], **o: Any) -> Patch:
    """Apply, then prune: the same bits as to prune and then apply the cut patch. Added entries stay as they are."""
    cut_patch = cut(patch, index_map(family, kept))
    pruned = prune(family, base, kept)
    for backend in ("torch", *exact_backends()):
        got = applied(pruned, cut_patch, backend, **o)
        truth = prune(family, applied(base, patch, backend, **o), kept, new=pruned)
        assert got.keys() == truth.keys()
        for name, expected in truth.items():
            if backend == "torch":  # one bf16 rounding, or the rounding of a few fp32 sums of order one
                tolerance = 2**-7 if expected.dtype == BF16 else 1e-5
                torch.testing.assert_close(got[name], expected, rtol=tolerance, atol=1e-5)
            else:
                assert same_bits(got[name], expected), name
        assert any(not torch.equal(got[name], pruned[name]) for name in got)
    return cut_patch


def drawn(count: int, keep: int, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(count), keep))


def random_kept(family: str, kinds: Sequence[str], rng: random.Random) -> dict[str, Kept]:
    """A random pruning of these kinds, query heads with the key/value heads that they read."""
    kept: dict[str, Kept] = {}
    sizes = FAMILY_SIZES[family]
    for kind in kinds:
        if kind == "heads" and "kv_heads" in sizes:
            keys = drawn(2, rng.choice((1, 2)), rng)
            each = rng.choice((1, 2))
            kept["kv_heads"] = keys
            kept["heads"] = [2 * key + head for key in keys for head in drawn(2, each, rng)]
        elif kind != "kv_heads":
            kept[kind] = drawn(sizes[kind], rng.randint(1, sizes[kind]), rng)
    return kept


KINDS = [
    (name, kind) for name, sizes in FAMILY_SIZES.items() for kind in sizes if kind not in ("kv_heads", "vocabulary")
]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family, kind", KINDS)
def test_pruning_and_applying_commute_in_each_dimension(
    family: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    patch = adapter(family, tmp_path)
    kept = random_kept(family, [kind], random.Random(torch.initial_seed()))
    assert_commutes(family, state_of(family, dtype), patch, kept)


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from((BF16, FP32)))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
def test_all_dimensions_at_once(
    family: str, seed: int, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    kinds = [kind for kind in FAMILY_SIZES[family] if rng.random() < 0.7]
    kept = random_kept(family, kinds, rng)
    patch = adapter(family, tmp_path_factory.mktemp("adapter"))
    assert_commutes(family, state_of(family, dtype), patch, kept)
