"""Where a patch's weight lies: parts cover a fused weight exactly, prefixes and spellings meet, ties are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from portllm import PlanError
from portllm.naming import FUSIONS, PREFIXES, Names, Placement, canonical, readings, split, tied_names

SEGMENTS = [
    "model", "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "layers", "0", "13", "mlp",
    "block_sparse_moe", "experts", "w1", "w2", "w3", "gate_up_proj", "gate_proj", "q_proj", "qkv_proj", "input_linear",
    "output_linear", "LayerNorm", "gamma", "beta", "weight", "bias", "embed_out", "lm_head", "xmodule",
]  # fmt: skip
names = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=8).map(".".join)
fusions = st.sampled_from(sorted(FUSIONS))


@settings(max_examples=1000)
@given(names)
def test_canonical_is_idempotent(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)


@given(names, st.lists(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module", "module"]), max_size=3))
def test_wrappers_leave_no_trace(name: str, wrappers: list[str]) -> None:
    assert canonical(".".join([*wrappers, name])) == canonical(name)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("_orig_mod.module.model.layers.0.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("model.layers.0._checkpoint_wrapped_module.q_proj.weight", "model.layers.0.q_proj.weight"),
        ("model.layers.0._orig_mod._fsdp_wrapped_module.mlp.weight", "model.layers.0.mlp.weight"),
        ("model.module.weight", "model.module.weight"),
        ("model.layers.1.block_sparse_moe.experts.7.w1.weight", "model.layers.1.mlp.experts.7.gate_proj.weight"),
        ("model.layers.1.block_sparse_moe.experts.7.w2", "model.layers.1.mlp.experts.7.down_proj"),
        ("model.layers.1.block_sparse_moe.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("model.layers.1.block_sparse_moe.input_linear.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("embed_out.weight", "lm_head.weight"),
        ("block_sparse_moe_x.w1.weight", "block_sparse_moe_x.w1.weight"),
    ],
)
def test_one_spelling(name: str, expected: str) -> None:
    assert canonical(name) == expected


@given(names)
def test_split_puts_together_what_it_takes_apart(name: str) -> None:
    parent, leaf, attribute = split(name)
    assert parent + leaf + attribute == name
    assert "." not in leaf


@st.composite
def sizes(draw: st.DrawFn) -> tuple[str, dict[str, int]]:
    """A fused weight and the rows of its parts: queries are a multiple of key and value; gate and up of one size."""
    fused = draw(fusions)
    last = draw(st.integers(1, 20))
    parts = FUSIONS[fused]
    first = last if len(parts) == 2 else last * draw(st.integers(1, 6))
    return fused, {part: first if i == 0 else last for i, part in enumerate(parts)}


@given(sizes(), st.sampled_from([".weight", ".bias"]))
def test_parts_cover_the_fused_weight_exactly_and_in_order(case: tuple[str, dict[str, int]], attribute: str) -> None:
    fused, rows = case
    matrices = {part: torch.randn(n, 3) for part, n in rows.items()}
    whole = torch.cat(list(matrices.values()))
    index = Names({f"a.{fused}{attribute}": whole}, {})
    covered = torch.zeros(len(whole))
    for part, matrix in matrices.items():
        spelling, (placement,) = index.place(f"a.{part}{attribute}", len(matrix))
        assert spelling == f"a.{part}{attribute}"
        assert placement.name == f"a.{fused}{attribute}"
        assert placement.rows is not None
        assert torch.equal(whole[slice(*placement.rows)], matrix)
        covered[slice(*placement.rows)] += 1
    assert bool((covered == 1).all())


@given(sizes())
def test_a_fused_patch_is_cut_into_its_parts(case: tuple[str, dict[str, int]]) -> None:
    fused, rows = case
    target: dict[str, Tensor] = {f"a.{part}.weight": torch.randn(n, 3) for part, n in rows.items()}
    whole = torch.cat(list(target.values()))
    _, placements = Names(target, {}).place(f"a.{fused}.weight", len(whole))
    assert [p.name for p in placements] == list(target)
    for placement in placements:
        assert placement.part is not None
        assert torch.equal(whole[slice(*placement.part)], target[placement.name])
    with pytest.raises(PlanError, match="its parts in the target have"):
        Names(target, {}).place(f"a.{fused}.weight", len(whole) + 1)
    target.popitem()
    assert Names(target, {}).place(f"a.{fused}.weight", len(whole))[1] == []


@given(sizes(), st.integers(1, 200), st.integers(0, 2))
def test_parts_that_do_not_fit_are_refused(case: tuple[str, dict[str, int]], wrong: int, which: int) -> None:
    """A part of other rows is placed only where the rest still makes a layout of its kind."""
    fused, rows = case
    total = sum(rows.values())
    index = Names({f"a.{fused}.weight": torch.zeros(total, 2)}, {})
    part = FUSIONS[fused][which % len(rows)]
    first, last = (wrong, (total - wrong) / 2) if part == "q_proj" else (total - 2 * wrong, wrong)
    fits = 2 * wrong == total if len(rows) == 2 else last > 0 and first > 0 and last % 1 == first % last == 0
    if fits:
        assert index.place(f"a.{part}.weight", wrong)[1]
        return
    with pytest.raises(PlanError, match=f"{part}.weight has {wrong} rows .* does not fit into the {total} rows"):
        index.place(f"a.{part}.weight", wrong)


@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 4))
def test_experts_of_a_stack(count: int, rows: int, expert: int) -> None:
    target = {
        "m.mlp.experts.gate_up_proj": torch.zeros(count, 2 * rows, 3),
        "m.mlp.experts.down_proj": torch.zeros(count, 3, rows),
    }
    index = Names(target, {})
    found = {
        part: index.place(f"m.block_sparse_moe.experts.{expert}.{part}.weight", rows)[1] for part in ("w1", "w2", "w3")
    }
    if expert >= count:
        assert found == {"w1": [], "w2": [], "w3": []}
        return
    gate_up, down = target
    assert found["w1"] == [Placement(gate_up, expert, rows=(0, rows))]
    assert found["w3"] == [Placement(gate_up, expert, rows=(rows, 2 * rows))]
    assert found["w2"] == [Placement(down, expert)]
    assert index.count_experts("m.block_sparse_moe.experts.gate_up_proj") == count
    assert index.count_experts("m.mlp.experts.other") == 0


@given(st.integers(1, 5), st.integers(1, 8))
def test_stacked_patch_on_experts_one_by_one(count: int, rows: int) -> None:
    target = {
        f"m.block_sparse_moe.experts.{e}.{part}.weight": torch.zeros(rows, 3)
        for e in range(count)
        for part in ("w1", "w3")
    }
    index = Names(target, {})
    assert index.count_experts("m.mlp.experts.gate_up_proj") == count
    for expert in range(count):
        _, placements = index.place_expert("m.mlp.experts.gate_up_proj", expert, 2 * rows)
        prefix = f"m.block_sparse_moe.experts.{expert}"
        assert placements == [
            Placement(f"{prefix}.w1.weight", part=(0, rows)),
            Placement(f"{prefix}.w3.weight", part=(rows, 2 * rows)),
        ]


@given(st.sampled_from(PREFIXES), st.sampled_from(PREFIXES))
def test_one_prefix_may_stand_for_another(old: str, new: str) -> None:
    target = {f"{new}layers.3.q_proj.weight": torch.zeros(4, 4), "visual.layers.3.q_proj.weight": torch.zeros(4, 4)}
    spelling, placements = Names(target, {}).place(f"{old}layers.3.q_proj.weight", 4)
    assert placements == [Placement(f"{new}layers.3.q_proj.weight")]
    assert spelling == f"{new}layers.3.q_proj.weight"


def test_a_name_as_it_stands_comes_before_other_prefixes() -> None:
    target = {f"{prefix}q_proj.weight": torch.zeros(4, 4) for prefix in ("model.", "transformer.", "")}
    index = Names(target, {})
    for name in target:
        assert index.place(name, 4)[1] == [Placement(name)]
    with pytest.raises(PlanError, match=r"could be .* or .*; rename the patch's keys"):
        index.place("bert.q_proj.weight", 4)


def test_an_alias_is_spoken_of_under_its_own_name() -> None:
    index = Names({"model.embed_tokens.weight": torch.zeros(6, 4)}, {"lm_head.weight": "model.embed_tokens.weight"})
    assert index.place("lm_head.weight", 6)[1] == [Placement("lm_head.weight")]
    assert index.shape("lm_head.weight") == (6, 4)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.down_proj.weight", [({"a.down_proj"}, {"a.down_proj"})]),
        (
            "a.up_proj.weight",
            [({"a.up_proj"}, {"a.up_proj", "a.gate_proj"}), ({"a.gate_up_proj"}, {"a.gate_up_proj"})],
        ),
        (
            "a.gate_up_proj",
            [({"a.gate_up_proj"}, {"a.gate_up_proj"}), ({"a.gate_proj", "a.up_proj"}, {"a.gate_proj", "a.up_proj"})],
        ),
    ],
)
def test_readings(name: str, expected: Any) -> None:
    assert readings(name) == expected


_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 1, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TIED = {**_SMALL, "tie_word_embeddings": True}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 6, "d_ff": 44, "num_layers": 1, "num_heads": 4}
_BART = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
}  # fmt: skip
_DISTIL = {"vocab_size": 96, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32}
_TIED_MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", _TIED),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**_SMALL, "head_dim": 8}),
    "GPT2LMHeadModel": ("GPT2Config", _GPT),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", _TIED),
    "OPTForCausalLM": ("OPTConfig", {**_SMALL, "ffn_dim": 32, "word_embed_proj_dim": 32}),
    "BloomForCausalLM": ("BloomConfig", {"vocab_size": 96, "hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "FalconForCausalLM": ("FalconConfig", _SMALL),
    "MambaForCausalLM": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1}),
    "BertForMaskedLM": ("BertConfig", _SMALL),
    "RobertaForMaskedLM": ("RobertaConfig", _SMALL),
    "DistilBertForMaskedLM": ("DistilBertConfig", _DISTIL),
    "AlbertForMaskedLM": ("AlbertConfig", {**_SMALL, "embedding_size": 16}),
    "ElectraForMaskedLM": ("ElectraConfig", {**_SMALL, "embedding_size": 16}),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", _SMALL),
    "ModernBertForMaskedLM": ("ModernBertConfig", {**_SMALL, "cls_token_id": 1, "sep_token_id": 2}),
    "BartForConditionalGeneration": ("BartConfig", _BART),
    "T5ForConditionalGeneration": ("T5Config", _T5),
    "T5EncoderModel": ("T5Config", _T5),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _TIED_MODELS)
def test_tied_names_are_those_that_transformers_leaves_out(name: str, tmp_path: Path) -> None:
    config, values = _TIED_MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**values))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    tensors = model.state_dict()
    left_out = set(tensors) - stored
    assert left_out
    aliases = tied_names(stored)
    index = Names(dict.fromkeys(stored, torch.zeros(2, 2)), aliases)
    for alias in left_out:
        _, (placement,) = index.place(alias, 0)
        assert tensors[aliases[placement.name]].data_ptr() == tensors[alias].data_ptr(), alias
