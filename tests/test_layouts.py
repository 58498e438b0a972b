"""Serving layouts: patching what a rank of an engine holds gives the bits of patching the model and loading that."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import portllm
from portllm import PlanError
from portllm.layout_tables import SGLANG_EXPERTS, VLLM_EXPERTS, Dimension, Rule
from portllm.layouts import sglang, vllm
from portllm.ops import backend_for

from . import families
from .engine import Rank, experts, load, stage
from .families import FAMILIES

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

_SIZES = {"num_attention_heads": 8, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 93}
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _qwen2(**settings: Any) -> transformers.PreTrainedModel:
    """Qwen2: biases on query, key and value."""
    settings = {**families._DECODER, "tie_word_embeddings": False, **settings}
    return families._model(transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**settings))


def _qwen2_moe(**settings: Any) -> transformers.PreTrainedModel:
    """Qwen2-MoE: routed experts of one size, and a shared one of another."""
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4, "head_dim": 4}
    settings = {**families._DECODER, **sizes, "tie_word_embeddings": False, **settings}
    return families._model(transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig(**settings))


def _gpt2(**_: Any) -> transformers.PreTrainedModel:
    return families.gpt2(n_head=8, vocab_size=93)


def _deepseek(**settings: Any) -> transformers.PreTrainedModel:
    """DeepSeek V3: latent attention, a dense layer, then routed and shared experts."""
    sizes = {
        "vocab_size": 93, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 2,
        "n_routed_experts": 6, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 5, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    }  # fmt: skip
    model = families._model(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config(**{**sizes, **settings}))
    assert isinstance(model, transformers.PreTrainedModel)
    return model


@dataclass(frozen=True)
class Case:
    """A model, what an adapter for it targets, and what its loader has to know."""

    build: Callable[..., transformers.PreTrainedModel]
    lora: Mapping[str, Any]
    fused: bool = False


_MOE = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES = {
    "llama": Case(families.llama, {"target_modules": [*_PROJECTIONS, "embed_tokens", "lm_head"]}),
    "mistral": Case(families.mistral, {"target_modules": _PROJECTIONS, "modules_to_save": ["norm", "lm_head"]}),
    "qwen2": Case(_qwen2, {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}),
    "qwen2 biases": Case(_qwen2, {"target_modules": _PROJECTIONS, "bias": "all"}),
    "qwen3": Case(families.qwen3, {"target_modules": _PROJECTIONS}),
    "gemma2": Case(families.gemma2, {"target_modules": [*_PROJECTIONS, "embed_tokens"]}),
    "tokens": Case(families.llama, {"target_modules": ["o_proj"], "trainable_token_indices": [0, 5, 31, 70, 92]}),
    "phi3": Case(families.phi3, FAMILIES["phi3"].lora),
    "mixtral": Case(families.mixtral, {**FAMILIES["mixtral"].lora}),
    "deepseek": Case(
        _deepseek,
        {
            "target_modules": [
                "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *_PROJECTIONS[4:],
            ],
            **_MOE,
        },
    ),
    "qwen2 moe": Case(
        _qwen2_moe,
        {
            "target_modules": [*_PROJECTIONS, "shared_expert_gate"],
            "target_parameters": [*_MOE["target_parameters"], "mlp.gate.weight"],
        },
    ),
    "gpt2": Case(_gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


class Facts:
    """What the loader reads from a config."""

    def __init__(self, config: Any) -> None:
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.tied = config.tie_word_embeddings
        for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"):
            setattr(self, key, getattr(config, key, None))


def _loaded(model: transformers.PreTrainedModel, rank: Rank) -> dict[str, Tensor]:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if model.config.model_type == "gpt2":  # its layers store [in, out], and the loader turns them
        state = {n: t.T if ".c_" in n and t.dim() == 2 else t for n, t in state.items()}
    return load(state, Facts(model.config), rank)


def _same_bits(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert torch.equal(_bits(got[name]), _bits(tensor)), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _patch(path: Path) -> portllm.Patch:
    patch = portllm.Patch.load(path)
    factors = {key: _exact(value) if "lora_" in key else value for key, value in patch.tensors.items()}
    return portllm.Patch.from_tensors(factors, patch.config)


def _exact(factor: Tensor) -> Tensor:
    """Matrix libraries add up in another order in another slice; with factors of few bits the order does not matter.

    The compiled library has one order for all, so it gets the factors as they are.
    """
    return factor if backend_for(factor) == "cpu" else (factor * 8).round().clamp(-32, 32) / 8


def _prepared(
    name: str, path: Path, dtype: torch.dtype, **changes: Any
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel, portllm.Patch]:
    """A model, the same with a patch on it, and the patch."""
    case = CASES[name]
    base = case.build(**{**_SIZES, **changes}).to(dtype)
    lora = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **case.lora}
    adapter = _patch(
        families.save_adapter(base, peft.LoraConfig(**lora), path / "adapter", save_embedding_layers=False)
    )
    whole = copy.deepcopy(base)
    portllm.apply(whole, adapter)
    return base, whole, adapter


def _layout(config: Any, rank: Rank, **more: Any) -> Any:
    options = {"moe_backend": "triton", "derived_follow": True, **more}
    return vllm(
        config, tp_rank=rank.tp_rank, tp_size=rank.tp_size, ep_rank=rank.ep_rank, ep_size=rank.ep_size, **options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_the_bits_of_the_whole_model(name: str, size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Grouped query attention with two key heads: with four and eight ranks they are replicated."""
    sizes = {"intermediate_size": 16} if name == "mixtral" else {}
    base, whole, adapter = _prepared(name, tmp_path, dtype, **sizes)
    changed: set[str] = set()
    for index in range(size):
        rank = Rank(index, size)
        before, expected, got = _loaded(base, rank), _loaded(whole, rank), _loaded(base, rank)
        portllm.apply(got, adapter, layout=_layout(base.config, rank))
        _same_bits(got, expected)
        changed |= {n for n in got if not torch.equal(_bits(got[n]), _bits(before[n]))}
        if index == size - 1 and size > 1:
            vocabulary = next(n for n in got if n.endswith(("embed_tokens.weight", "wte.weight")))
            assert got[vocabulary].isnan().any()  # 93 tokens never fill the last rank
    assert any("qkv_proj" in n or "c_attn" in n or "fused_qkv_a" in n for n in changed) or name == "tokens"
    if "embed_tokens" in str(CASES[name].lora) or name == "tokens":
        assert "model.embed_tokens.weight" in changed


@pytest.mark.parametrize("placement", ["linear", "round_robin", "map"])
@pytest.mark.parametrize("count, size", [(4, 2), (4, 4), (5, 2), (7, 4)])
@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_expert_parallelism(name: str, count: int, size: int, placement: str, tmp_path: Path) -> None:
    more = {"n_routed_experts": count, "n_group": 1} if name == "deepseek" else {"num_local_experts": count}
    base, whole, adapter = _prepared(name, tmp_path, torch.bfloat16, **more)
    seen = 0
    for index in range(size):
        rank = Rank(index, size, index, size, round_robin=placement != "linear")
        here = experts(count, rank)
        options: dict[str, Any] = {"expert_placement": placement}
        if placement == "map":
            options = {"expert_map": torch.tensor([here.index(e) if e in here else -1 for e in range(count)])}
        got = _loaded(base, rank)
        portllm.apply(got, adapter, layout=_layout(base.config, rank, **options))
        _same_bits(got, _loaded(whole, rank))
        seen += len(here)
    assert seen == count


@pytest.mark.parametrize("backend", [b for b, form in VLLM_EXPERTS.items() if not isinstance(form, str)])
@pytest.mark.parametrize("size", [1, 2])
def test_each_kernels_order_of_the_experts(backend: str, size: int, tmp_path: Path) -> None:
    base, whole, adapter = _prepared("mixtral", tmp_path, torch.bfloat16, intermediate_size=20)
    for index in range(size):
        rank = Rank(index, size, up_first=backend == "flashinfer_cutlass", transposed=backend == "xpu")
        got = _loaded(base, rank)
        portllm.apply(got, adapter, layout=_layout(base.config, rank, moe_backend=backend))
        _same_bits(got, _loaded(whole, rank))


@pytest.mark.parametrize("name, prefix", [("mixtral", "block_sparse_moe.experts."), ("deepseek", "mlp.experts.")])
def test_names_that_vllm_has_given_to_its_expert_layers(name: str, prefix: str, tmp_path: Path) -> None:
    """Newer versions have the weights in a layer of their own, and name the shared experts twice."""
    base, whole, adapter = _prepared(name, tmp_path, torch.bfloat16, num_local_experts=4)

    def renamed(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
        tensors = {n.replace("mlp.experts.", f"{prefix}routed_experts."): t for n, t in _loaded(model, Rank()).items()}
        twice = {
            n.replace("mlp.shared_experts.", "mlp.experts._shared_experts._layer."): t for n, t in tensors.items()
        } | {n.replace("mlp.gate.", "mlp.experts.gate."): t for n, t in tensors.items()}
        return twice | tensors

    got = renamed(base)
    portllm.apply(got, adapter, layout=_layout(base.config, Rank()))
    _same_bits(got, renamed(whole))


def test_experts_are_cut_over_data_parallel_ranks_too(tmp_path: Path) -> None:
    base, whole, adapter = _prepared("mixtral", tmp_path, torch.bfloat16, intermediate_size=16)
    for dp_rank in range(2):
        for tp_rank in range(2):
            attention, cut = Rank(tp_rank, 2), Rank(dp_rank * 2 + tp_rank, 4)
            got, expected = (
                {n: _loaded(m, cut if "experts" in n else attention)[n] for n in _loaded(m, attention)}
                for m in (base, whole)
            )
            portllm.apply(got, adapter, layout=_layout(base.config, attention, dp_rank=dp_rank, dp_size=2))
            _same_bits(got, expected)


@pytest.mark.parametrize("backend", [b for b, form in SGLANG_EXPERTS.items() if not isinstance(form, str)])
def test_sglang_divides_experts_and_cuts_them(backend: str, tmp_path: Path) -> None:
    """Four ranks: two parts of the experts, each cut in two; attention by two groups of two."""
    base, whole, adapter = _prepared("mixtral", tmp_path, torch.bfloat16, intermediate_size=16)

    def loaded(model: transformers.PreTrainedModel, index: int) -> dict[str, Tensor]:
        form = {"up_first": backend == "flashinfer_cutlass", "transposed": backend == "triton_kernel"}
        attention, whole_group = _loaded(model, Rank(index % 2, 2)), _loaded(model, Rank(index, 4))
        cut = _loaded(model, Rank(index % 2, 2, **form))
        here = slice(0, 2) if index < 2 else slice(2, 4)
        tensors = {n: cut[n][here].clone() if "experts" in n else attention[n] for n in attention}
        return tensors | {n: whole_group[n] for n in tensors if "lm_head" in n}

    for index in range(4):
        got = loaded(base, index)
        layout = sglang(base.config, tp_rank=index, tp_size=4, ep_size=2, dp_size=2, moe_backend=backend)
        portllm.apply(got, adapter, layout=layout)
        _same_bits(got, loaded(whole, index))


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "deepseek"])
def test_pipeline_stages(name: str, tmp_path: Path) -> None:
    """The middle stage has layers only; where the embedding is tied, the last stage has a copy of it as its head."""
    base, whole, adapter = _prepared(name, tmp_path, torch.bfloat16, num_hidden_layers=4)
    written: set[str] = set()
    for layers in (range(1), range(1, 2), range(2, 4)):
        got, expected = (stage(_loaded(m, Rank(1, 2)), layers, 4) for m in (base, whole))
        if base.config.tie_word_embeddings and layers.stop == 4:
            for tensors, model in ((got, base), (expected, whole)):
                tensors["lm_head.weight"] = _loaded(model, Rank(1, 2))["model.embed_tokens.weight"]
        handle = portllm.apply(got, adapter, layout=_layout(base.config, Rank(1, 2), pp_size=3))
        _same_bits(got, expected)
        written |= set(handle.plan.tensors)
        if layers.stop == 4 and name == "gemma2":
            assert "lm_head.weight" in handle.plan.tensors
    assert {n for n in written if n.startswith("model.layers.3.")}
    with pytest.raises(PlanError, match="names of the patch are"):
        portllm.plan(got, adapter, layout=_layout(base.config, Rank(1, 2)))


def test_a_stage_that_the_patch_has_nothing_for(tmp_path: Path) -> None:
    base, _, _ = _prepared("llama", tmp_path, torch.bfloat16)
    adapter = families.save_adapter(
        base,
        peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights=False),
        tmp_path / "0",
    )
    got = stage(_loaded(base, Rank()), range(1, 2), 2)
    before = {name: tensor.clone() for name, tensor in got.items()}
    assert portllm.apply(got, adapter, layout=_layout(base.config, Rank(), pp_size=2)).plan.tensors == ()
    assert portllm.apply(got, adapter, undo="exact", layout=_layout(base.config, Rank(), pp_size=2)).plan.tensors == ()
    _same_bits(got, before)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "qwen2 biases"])
def test_exact_undo_and_the_bank(name: str, tmp_path: Path) -> None:
    base, whole, adapter = _prepared(name, tmp_path, torch.bfloat16, intermediate_size=16)
    rank = Rank(1, 2)
    got, before, expected = _loaded(base, rank), _loaded(base, rank), _loaded(whole, rank)
    layout = _layout(base.config, rank)
    with portllm.applied(got, adapter, layout=layout):
        _same_bits(got, expected)
    _same_bits(got, before)
    bank = portllm.PatchBank(got)
    bank.add("one", adapter, layout=layout)
    bank.add("half", adapter, 0.5, layout=layout)
    bank.use("half")
    bank.use("one")
    _same_bits(got, expected)
    bank.use()
    _same_bits(got, before)


def test_subtracting_takes_it_off_to_rounding(tmp_path: Path) -> None:
    base, _, adapter = _prepared("llama", tmp_path, torch.float32)
    layout = _layout(base.config, Rank(1, 4))
    got, before = _loaded(base, Rank(1, 4)), _loaded(base, Rank(1, 4))
    portllm.apply(got, adapter, layout=layout)
    portllm.remove(got, adapter, layout=layout)
    for name, tensor in before.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_tied_weights_share_their_memory(tmp_path: Path) -> None:
    """vLLM's lm_head is the embedding's own parameter; whichever name comes first, it is patched once."""
    base, whole, adapter = _prepared("gemma2", tmp_path, torch.bfloat16)
    for head_first in (False, True):
        got, expected = _loaded(base, Rank(0, 2)), _loaded(whole, Rank(0, 2))
        tied = {"lm_head.weight": got["model.embed_tokens.weight"]}
        got = tied | got if head_first else got | tied
        portllm.apply(got, adapter, layout=_layout(base.config, Rank(0, 2)))
        _same_bits({n: t for n, t in got.items() if n != "lm_head.weight"}, expected)


@pytest.mark.parametrize("padding, extra", [(64, 16), (64, 300), (256, 256), (8, 0)])
def test_rows_for_tokens_of_adapters(padding: int, extra: int, tmp_path: Path) -> None:
    base, whole, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    for index in range(2):
        rank = Rank(index, 2, vocab_padding=padding, extra_vocab=extra)
        got = _loaded(base, rank)
        portllm.apply(got, adapter, layout=_layout(base.config, rank, vocab_padding=padding, extra_vocab=extra))
        _same_bits(got, _loaded(whole, rank))


def test_layers_that_the_engine_has_wrapped_for_its_own_lora(tmp_path: Path) -> None:
    base, whole, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    got, expected = (
        {n.replace("proj.weight", "proj.base_layer.weight"): t for n, t in _loaded(m, Rank(1, 2)).items()}
        for m in (base, whole)
    )
    portllm.apply(got, adapter, layout=_layout(base.config, Rank(1, 2)))
    _same_bits(got, expected)


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """Nested config, other prefix, and a vision tower whose layers have the same names and other sizes."""
    base, whole, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    got, expected = ({f"language_model.{n}": t for n, t in _loaded(m, Rank(1, 2)).items()} for m in (base, whole))
    tower = {"vision_tower.encoder.layers.0.self_attn.qkv_proj.weight": torch.randn(15, 5)}
    got, expected = got | tower, expected | copy.deepcopy(tower)
    config = {"model_type": "of no class", "text_config": {**base.config.to_dict(), "model_type": "llama"}}
    portllm.apply(got, adapter, layout=_layout(config, Rank(1, 2)))
    _same_bits(got, expected)


def test_the_config_from_disk_has_the_defaults_of_its_class(tmp_path: Path) -> None:
    base, whole, adapter = _prepared("mistral", tmp_path, torch.bfloat16)
    base.config.save_pretrained(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    for source in (tmp_path / "model", str(tmp_path / "model"), tmp_path / "model" / "config.json", raw, base.config):
        got = _loaded(base, Rank(1, 2))
        portllm.apply(got, adapter, layout=_layout(source, Rank(1, 2)))
        _same_bits(got, _loaded(whole, Rank(1, 2)))


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[dict[str, int], int]:
    size = draw(st.sampled_from([1, 2, 3, 4]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 9) if n % size == 0 or size % n == 0]))
    per_group = size // min(size, kv_heads)  # query heads must be divisible by the ranks as well
    return {
        "num_attention_heads": kv_heads * per_group * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.integers(1, 9)),
        "hidden_size": draw(st.integers(1, 40)),
        "intermediate_size": size * draw(st.integers(1, 20)),
        "vocab_size": draw(st.integers(1, 200)),
        "num_hidden_layers": 1,
    }, size  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(_shapes(), st.integers(1, 6), st.integers(0, 2**31))
def test_any_shape(case: tuple[dict[str, int], int], r: int, seed: int) -> None:
    sizes, ranks = case
    generator = torch.Generator().manual_seed(seed)
    hidden, dim = sizes["hidden_size"], sizes["head_dim"]
    rows = {"q_proj": sizes["num_attention_heads"] * dim, "k_proj": sizes["num_key_value_heads"] * dim}
    rows["v_proj"] = rows["k_proj"]
    shapes = {f"model.layers.0.self_attn.{n}": (m, hidden) for n, m in rows.items()} | {
        "model.layers.0.self_attn.o_proj": (hidden, rows["q_proj"]),
        "model.layers.0.mlp.gate_proj": (sizes["intermediate_size"], hidden),
        "model.layers.0.mlp.up_proj": (sizes["intermediate_size"], hidden),
        "model.layers.0.mlp.down_proj": (hidden, sizes["intermediate_size"]),
        "lm_head": (sizes["vocab_size"], hidden),
    }
    state = {f"{n}.weight": torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    state["model.embed_tokens.weight"] = torch.randn(sizes["vocab_size"], hidden, generator=generator).bfloat16()
    factors: dict[str, Tensor] = {}
    for name, (m, n) in shapes.items():
        factors[f"base_model.model.{name}.lora_A.weight"] = _exact(torch.randn(r, n, generator=generator))
        factors[f"base_model.model.{name}.lora_B.weight"] = _exact(torch.randn(m, r, generator=generator))
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}
    patch = portllm.Patch.from_tensors(factors, settings)
    whole = {name: tensor.clone() for name, tensor in state.items()}
    portllm.apply(whole, patch)
    facts = Facts(SimpleNamespace(**sizes, tie_word_embeddings=False))
    for index in range(ranks):
        padding = 64 if 64 % ranks == 0 else 64 * ranks
        rank = Rank(index, ranks, vocab_padding=padding)
        got = load(state, facts, rank)
        portllm.apply(got, patch, layout=vllm(sizes, tp_rank=index, tp_size=ranks))
        _same_bits(got, load(whole, facts, rank))


# -- what is refused, before anything is written ----------------------------------------------------------------------


def _refused(
    got: dict[str, Tensor], adapter: Any, layout: Any, message: str, strict: bool = True, **options: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in got.items()}
    with pytest.raises(PlanError, match=message):
        portllm.apply(got, adapter, layout=layout, strict=strict, **options)
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), got[name].view(torch.uint8)), name


@pytest.mark.parametrize("strict", [True, False])
def test_ranks_that_do_not_fit_the_tensors(strict: bool, tmp_path: Path) -> None:
    base = families.llama(**_SIZES)
    adapter = families.save_adapter(base, peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "adapter")
    message = (
        r"qkv_proj.weight is \[24, 32\], but by the config and rank 1 of 4 \(attention\) it should be \[16, 32\]; "
        "give the ranks and sizes that vLLM runs with"
    )
    _refused(_loaded(base, Rank(1, 2)), adapter, _layout(base.config, Rank(1, 4)), message, strict)


def test_another_models_config(tmp_path: Path) -> None:
    base, _, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    config = {**base.config.to_dict(), "intermediate_size": 64}
    message = (
        r"_proj: lora_B @ lora_A is .*; model.layers.0.mlp.gate_up_proj.weight is \[48, 32\], but by the config and "
        r"rank 1 of 2 \(dense\) it should be \[64, 32\]"
    )
    _refused(_loaded(base, Rank(1, 2)), adapter, _layout(config, Rank(1, 2)), message)


def test_quantised_weights(tmp_path: Path) -> None:
    base, _, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    got = _loaded(base, Rank())
    name = "model.layers.1.self_attn.o_proj.weight"
    got[name] = got[name].to(torch.float8_e4m3fn).T
    _refused(
        got, adapter, _layout(base.config, Rank()), f"{name} is float8_e4m3fn: quantised weights cannot be patched"
    )


def test_a_tensor_that_no_rule_speaks_of(tmp_path: Path) -> None:
    base, whole, adapter = _prepared("llama", tmp_path, torch.bfloat16)

    def renamed(model: Any) -> dict[str, Tensor]:
        return {n.replace(".o_proj.", ".wo."): t for n, t in _loaded(model, Rank(1, 2)).items()}

    message = (
        r"2 names of the patch are in no tensor here that the layout knows: model.layers.0.self_attn.o_proj, "
        r"model.layers.1.self_attn.o_proj; it leaves alone model.layers.0.self_attn.wo.weight \(no rule speaks of it\)"
    )
    _refused(renamed(base), adapter, _layout(base.config, Rank(1, 2)), message)
    rule = Rule(
        r"(.+\.)wo\.weight", ((r"\1o_proj.weight", Dimension(("hidden_size",))),), "heads", "columns", "attention"
    )
    got = renamed(base)
    portllm.apply(got, adapter, layout=_layout(base.config, Rank(1, 2), rules=[rule]))
    _same_bits(got, renamed(whole))


@pytest.mark.parametrize(
    "backend, message",
    [
        (None, "how experts are stored depends on their kernel; say moe_backend= one of triton, batched_triton"),
        ("flashinfer_trtllm", "moe_backend='flashinfer_trtllm', which stores them in blocks .* run vLLM with one of"),
        ("unheard of", "cannot be patched for moe_backend='unheard of'; run vLLM with one of triton"),
    ],
)
def test_experts_whose_order_is_not_known(backend: str | None, message: str, tmp_path: Path) -> None:
    base, _, adapter = _prepared("mixtral", tmp_path, torch.bfloat16)
    layout = _layout(base.config, Rank(), moe_backend=backend)
    _refused(_loaded(base, Rank()), adapter, layout, f"model.layers.0.mlp.experts.w.*weight.*{message}")
    attention = families.save_adapter(base, peft.LoraConfig(target_modules=["q_proj"]), tmp_path / "attention")
    portllm.plan(_loaded(base, Rank()), attention, layout=layout)


def test_what_the_engine_derives_from_a_weight(tmp_path: Path) -> None:
    base, _, adapter = _prepared("deepseek", tmp_path, torch.bfloat16)
    message = "vLLM has computed .*W_UK_T.* from model.layers.0.self_attn.kv_b_proj.weight, .* derived_follow=True"
    _refused(_loaded(base, Rank()), adapter, _layout(base.config, Rank(), derived_follow=False), message)


def test_dora_where_its_norms_are_divided(tmp_path: Path) -> None:
    base, _, _ = _prepared("llama", tmp_path, torch.float32)
    config = peft.LoraConfig(target_modules=_PROJECTIONS[:3], use_dora=True, init_lora_weights=False)
    adapter = families.save_adapter(base, config, tmp_path / "columns")
    whole = copy.deepcopy(base)
    portllm.apply(whole, adapter)
    got = _loaded(base, Rank(1, 2))
    portllm.apply(got, adapter, layout=_layout(base.config, Rank(1, 2)))
    for name, tensor in _loaded(whole, Rank(1, 2)).items():  # sums of other blocks: not the same to the last bit
        torch.testing.assert_close(got[name], tensor, atol=1e-5, rtol=1e-5, equal_nan=True)
    config = peft.LoraConfig(target_modules=["down_proj"], use_dora=True, init_lora_weights=False)
    adapter = families.save_adapter(base, config, tmp_path / "rows")
    message = (
        "down_proj: DoRA needs the norms of whole vectors of model.layers.0.mlp.down_proj.weight, which are divided"
    )
    _refused(_loaded(base, Rank(1, 2)), adapter, _layout(base.config, Rank(1, 2)), message)
    portllm.plan(_loaded(base, Rank()), adapter, layout=_layout(base.config, Rank()))


def test_untying(tmp_path: Path) -> None:
    base, _, adapter = _prepared("gemma2", tmp_path, torch.bfloat16)
    message = "tied='untie': vLLM has tied its weights already"
    _refused(_loaded(base, Rank()), adapter, _layout(base.config, Rank()), message, tied="untie")


def test_what_cannot_be_divided(tmp_path: Path) -> None:
    base, _, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    _refused(_loaded(base, Rank(0, 2)), adapter, _layout(base.config, Rank(0, 3)), "num_attention_heads = 8 cannot be")


def test_a_config_without_a_number(tmp_path: Path) -> None:
    base, _, adapter = _prepared("llama", tmp_path, torch.bfloat16)
    config = {k: v for k, v in base.config.to_dict().items() if k not in ("intermediate_size", "model_type")}
    _refused(
        _loaded(base, Rank()), adapter, _layout(config, Rank()), "the model's config has no number 'intermediate_size'"
    )


def test_layouts_that_there_cannot_be(tmp_path: Path) -> None:
    config = {"hidden_size": 8, "num_local_experts": 4}
    (tmp_path / "config.json").write_text("{")
    for make, message in (
        (lambda: vllm(config, tp_rank=2, tp_size=2), "rank 2 of 2 ranks does not exist"),
        (lambda: vllm(config, ep_rank=-1, ep_size=2), "rank -1 of 2"),
        (lambda: vllm({"hidden_size": 8}, ep_size=2), "config has no number of experts"),
        (lambda: vllm(config, expert_map=[0, 2, -1, -1]), "expert_map must give each expert its place"),
        (lambda: vllm(config, ep_size=2, expert_placement="other"), "must be 'linear' or 'round_robin'"),  # type: ignore[arg-type]
        (lambda: vllm(tmp_path), "config.json: no model's config can be read"),
        (lambda: vllm(tmp_path / "nowhere"), "nowhere: no model's config can be read"),
        (lambda: vllm(3), "a int is no config"),
        (lambda: sglang(config, tp_size=4, ep_size=3), "ep_size=3 and dp_size=1 must divide tp_size=4"),
    ):
        with pytest.raises(PlanError, match=message):
            make()
