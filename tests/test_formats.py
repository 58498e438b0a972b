"""Every setting and key that PEFT writes: adapters saved by PEFT, its merge in float64 as the truth."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import portllm
from portllm import Patch, PatchError, PlanError, UnsupportedPatchError
from portllm.checkpoint import plan_checkpoint

from . import families as tiny
from .families import FAMILIES, VOCAB, assert_close, changed, peft_merged, save_adapter, state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
MODEL, OUT = "model", "out"


def lora(*targets: str, **settings: Any) -> peft.LoraConfig:
    """A config on ``targets`` whose factors are all random."""
    chosen: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    if targets:
        chosen["target_modules"] = list(targets)
    return peft.LoraConfig(**{**chosen, **settings})


def check(
    base: Any, config: peft.LoraConfig, tmp_path: Path, *, disk: bool = True, tolerance: float = 3e-6, **options: Any
) -> nn.Module:
    """Save an adapter, apply it live and on disk, hold both against PEFT's float64 merge; returns the live model."""
    adapter = save_adapter(base, config, tmp_path / "adapter")
    return check_adapter(base, adapter, tmp_path, disk=disk, tolerance=tolerance, **options)


def check_adapter(
    base: Any, adapter: Path, tmp_path: Path, *, disk: bool = True, tolerance: float = 3e-6, **options: Any
) -> nn.Module:
    """As ``check``, with an adapter that is there already."""
    live = copy.deepcopy(base)
    portllm.apply(live, adapter, **options)
    truth = peft_merged(base, adapter, dtype=torch.float64)
    assert_close(state(live), state(truth), tolerance)
    moved = changed(state(base), state(truth))
    assert moved
    assert changed(state(base), state(live)) == moved
    if disk:
        base.save_pretrained(tmp_path / MODEL, max_shard_size="20KB")
        portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, **options)
        assert not changed(state(live), state(type(base).from_pretrained(tmp_path / OUT)))
    return live


def edit_config(adapter: Path, **settings: Any) -> Path:
    """Change settings in adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return adapter


def edit_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """Rewrite adapter_model.safetensors."""
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return adapter


def keys(adapter: Path) -> set[str]:
    return set(load_file(adapter / "adapter_model.safetensors"))


# -- rank, scaling and the choice of modules -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        # PEFT writes its settings sorted, so only sorted patterns mean the same in training and in the file.
        {"rank_pattern": {"model.layers.1.*": 3, "o_proj": 5, "q_proj": 2}},
        {"rank_pattern": {r"^model\.layers\.0\.mlp\.up_proj": 7, "layers.1.mlp.up_proj": 1}},
        {"alpha_pattern": {r"(k|v)_proj": 11, ".*1.self_attn.k_proj": 5, "o_proj": 0.5}},
        {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"self_attn.k_proj": 9, "proj": 100}, "use_rslora": True},
        {"use_rslora": True},
        {"target_modules": r".*\.layers\.1\..*(q|v)_proj"},
        {"target_modules": r"model\.layers\.\d+\.mlp\.(?:gate|up)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.down_proj"]},
        {"exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]},
        {"exclude_modules": r".*layers\.1.*"},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"layers_to_transform": [1], "layers_pattern": ["(blocks|layers)"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [1]},
    ],
    ids=lambda s: "-".join(s),
)
def test_settings_of_rank_scaling_and_targets(settings: dict[str, Any], tmp_path: Path) -> None:
    check(tiny.llama(), FAMILIES["llama"].config(**settings), tmp_path)


def test_the_first_pattern_in_the_file_holds(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, FAMILIES["llama"].config(use_rslora=True), tmp_path / "adapter")
    patterns = {"q_proj": 2.5, r"model\.layers\.1\..*": -3, r".*\.(o|up)_proj": 50, "_proj": 1000, ".*_proj": 7}
    live = check_adapter(base, edit_config(adapter, alpha_pattern=patterns), tmp_path)
    other = copy.deepcopy(base)
    portllm.apply(other, edit_config(adapter, alpha_pattern=dict(reversed(patterns.items()))))
    assert changed(state(live), state(other))


def test_a_rank_that_the_settings_do_not_give_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj", "v_proj"), tmp_path / "adapter")
    with pytest.raises(PatchError, match=r"v_proj: lora_A \[4, 32\] and lora_B \[16, 4\] are not of rank 8"):
        Patch.load(edit_config(adapter, rank_pattern={"v_proj": 8}))


def test_all_linear_as_it_stands_in_a_file(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, FAMILIES["llama"].config(target_modules="all-linear"), tmp_path / "adapter")
    check_adapter(base, edit_config(adapter, target_modules="all-linear"), tmp_path)


def test_factors_outside_of_target_modules_are_an_error(tmp_path: Path) -> None:
    """PEFT would leave them out in silence."""
    adapter = save_adapter(tiny.llama(), lora("q_proj", "v_proj"), tmp_path / "adapter")
    edit_config(adapter, target_modules=["q_proj"])
    with pytest.raises(PatchError, match=r"v_proj has factors, but target_modules"):
        Patch.load(adapter)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_gpt2_is_transposed_by_its_class_whatever_the_setting_says(fan_in_fan_out: bool, tmp_path: Path) -> None:
    """c_proj of the attention is square: only the layer's class, or its siblings on disk, tell how it is stored."""
    base = tiny.gpt2()
    adapter = save_adapter(base, lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True), tmp_path / "adapter")
    check_adapter(base, edit_config(adapter, fan_in_fan_out=fan_in_fan_out), tmp_path)


def test_a_square_conv1d_alone_is_told_by_fan_in_fan_out_on_disk(tmp_path: Path) -> None:
    check(tiny.gpt2(), lora("attn.c_proj", fan_in_fan_out=True), tmp_path)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_square_linear_layers_are_not_transposed(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    targets = {"bert": ["query"], "t5": ["k"]}[family]
    base = chosen.build() if family == "bert" else chosen.build(d_kv=8)
    check(base, chosen.config(target_modules=targets), tmp_path)


# -- embeddings, tied and untied -------------------------------------------------------------------------------------


def test_lora_on_embedding_and_head(tmp_path: Path) -> None:
    base = tiny.llama()
    live = check(base, lora("embed_tokens", "lm_head", "q_proj"), tmp_path)
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed(state(base), state(live))
    stored = keys(tmp_path / "adapter")
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in stored
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored


def test_an_embedding_saved_without_its_base(tmp_path: Path) -> None:
    base = tiny.llama()
    config = lora("embed_tokens")
    adapter = save_adapter(base, config, tmp_path / "adapter", save_embedding_layers=False)
    assert len(keys(adapter)) == 2
    check_adapter(base, adapter, tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2"])
@pytest.mark.parametrize("target", ["embedding", "head"])
def test_one_name_of_a_tied_weight_patches_it_once(family: str, target: str, tmp_path: Path) -> None:
    base = FAMILIES[family].build()
    name = {"embedding": "wte" if family == "gpt2" else "embed_tokens", "head": "lm_head"}[target]
    adapter = save_adapter(base, lora(name), tmp_path / "adapter", save_embedding_layers=False)
    live = check_adapter(base, adapter, tmp_path)
    assert live.get_output_embeddings().weight is live.get_input_embeddings().weight
    assert any("tied" in warning for warning in portllm.plan(base, adapter).warnings)


def test_ensure_weight_tying_patches_the_shared_weight_once(tmp_path: Path) -> None:
    """PEFT saves the same factors under both names, and its merge adds them twice; its own forward pass is right."""
    family = FAMILIES["qwen3"]
    base = family.build()
    config = lora("embed_tokens", "lm_head", "q_proj", ensure_weight_tying=True)
    model = tiny.train(base, config)
    model.save_pretrained(tmp_path / "adapter")
    assert {f"base_model.model.lm_head.lora_{factor}.weight" for factor in "AB"} < keys(tmp_path / "adapter")
    live = copy.deepcopy(base)
    portllm.apply(live, tmp_path / "adapter")
    torch.testing.assert_close(family.logits(live), family.logits(model), atol=1e-5, rtol=1e-5)
    assert live.get_output_embeddings().weight is live.get_input_embeddings().weight
    base.save_pretrained(tmp_path / MODEL)
    portllm.apply_checkpoint(tmp_path / MODEL, tmp_path / "adapter", tmp_path / OUT)
    assert not changed(state(live), state(type(base).from_pretrained(tmp_path / OUT)))


def _untied(base: Any) -> Any:
    """The same model with a head of its own, made without portllm."""
    config = copy.deepcopy(base.config)
    config.tie_word_embeddings = False
    model = type(base)(config)
    model.load_state_dict(base.state_dict())
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    return model.eval()


def test_different_factors_for_one_tied_weight_are_refused_or_untied(tmp_path: Path) -> None:
    family = FAMILIES["qwen3"]
    base = family.build()
    untied = _untied(base)
    adapter = save_adapter(untied, lora("embed_tokens", "lm_head", "k_proj"), tmp_path / "adapter")
    base.save_pretrained(tmp_path / MODEL)
    before = state(base)
    with pytest.raises(PlanError, match=r"one tied weight .*tied='untie'"):
        portllm.apply(base, adapter)
    with pytest.raises(PlanError, match=r"one tied weight .*tied='untie'"):
        portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT)
    assert not changed(before, state(base))
    assert not (tmp_path / OUT).exists()

    merged = peft_merged(untied, adapter, dtype=torch.float64)
    live = copy.deepcopy(base)
    portllm.apply(live, adapter, tied="untie")
    assert_close(state(live), state(merged))
    assert live.config.tie_word_embeddings is False
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, tied="untie")
    again = type(base).from_pretrained(tmp_path / OUT)
    assert not changed(state(live), state(again))
    expected = family.logits(merged).float()
    torch.testing.assert_close(family.logits(live), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(family.logits(again), expected, atol=1e-5, rtol=1e-5)


def test_untying_leaves_the_name_that_is_not_patched_as_it_was(tmp_path: Path) -> None:
    base = tiny.gemma2()
    adapter = save_adapter(_untied(base), lora("lm_head"), tmp_path / "adapter", save_embedding_layers=False)
    truth = peft_merged(_untied(base), adapter, dtype=torch.float64)
    live = copy.deepcopy(base)
    portllm.apply(live, adapter, tied="untie")
    assert_close(state(live), state(truth))
    assert changed(state(base), state(live)) == {"lm_head.weight"}
    base.save_pretrained(tmp_path / MODEL)
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, tied="untie")
    assert not changed(state(live), state(type(base).from_pretrained(tmp_path / OUT)))


@pytest.mark.parametrize("tied", ["once", "untie"])
def test_t5_shares_one_embedding_three_times(tied: str, tmp_path: Path) -> None:
    base = tiny.t5()
    adapter = save_adapter(base, lora("shared"), tmp_path / "adapter", save_embedding_layers=False)
    live = copy.deepcopy(base)
    portllm.apply(live, adapter, tied=tied)
    touched = changed(state(base), state(live))
    names = {"shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert touched == (names if tied == "once" else {"shared.weight"})
    if tied == "once":
        assert_close(state(live), state(peft_merged(base, adapter, dtype=torch.float64)))
    base.save_pretrained(tmp_path / MODEL)
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, tied=tied)
    assert not changed(state(live), state(type(base).from_pretrained(tmp_path / OUT)))


# -- tensors that are replaced ---------------------------------------------------------------------------------------


def test_modules_to_save_classifier(tmp_path: Path) -> None:
    base = tiny.bert()
    live = check(base, lora("query", modules_to_save=["classifier"]), tmp_path)
    assert {"classifier.weight", "classifier.bias"} <= changed(state(base), state(live))


def test_modules_to_save_holds_modules_within(tmp_path: Path) -> None:
    """A saved module may have children, and PEFT matches the end of the name, without regard to dots."""
    live = check(tiny.bert(), lora("query", modules_to_save=["ooler", "1.output"]), tmp_path)
    assert isinstance(live.bert.pooler.dense, nn.Linear)


def test_modules_to_save_embedding_and_head(tmp_path: Path) -> None:
    check(tiny.llama(), lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]), tmp_path)


def test_modules_to_save_tied_embedding(tmp_path: Path) -> None:
    base = tiny.qwen3()
    config = lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    adapter = save_adapter(base, config, tmp_path / "adapter")
    stored = load_file(adapter / "adapter_model.safetensors")
    live = copy.deepcopy(base)
    portllm.apply(live, adapter)
    new = next(tensor for key, tensor in stored.items() if "embed_tokens" in key)
    assert torch.equal(live.get_input_embeddings().weight, new)
    assert live.get_output_embeddings().weight is live.get_input_embeddings().weight
    base.save_pretrained(tmp_path / MODEL)
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT)
    assert not changed(state(live), state(type(base).from_pretrained(tmp_path / OUT)))


def test_old_spelling_of_saved_modules(tmp_path: Path) -> None:
    base = tiny.bert()
    adapter = save_adapter(base, lora("query", modules_to_save=["classifier"]), tmp_path / "adapter")
    expected = state(peft_merged(base, adapter))

    def respell(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.replace(".classifier.", ".classifier.modules_to_save.default."): v for k, v in tensors.items()}

    live = copy.deepcopy(base)
    portllm.apply(live, edit_tensors(adapter, respell))
    assert_close(state(live), expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bias(bias: str, family: str, tmp_path: Path) -> None:
    base = FAMILIES[family].build()
    targets = {"bert": ["query"], "gpt2": ["attn.c_proj"]}[family]
    settings = FAMILIES[family].config(target_modules=targets, bias=bias, task_type=None)
    live = check(base, settings, tmp_path)
    biases = {name for name in changed(state(base), state(live)) if name.endswith("bias")}
    assert len(biases) == 2 if bias == "lora_only" else len(biases) > 10


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lora_bias(family: str, tmp_path: Path) -> None:
    base = FAMILIES[family].build()
    targets = {"bert": ["query"], "gpt2": ["c_attn"]}[family]
    live = check(base, FAMILIES[family].config(target_modules=targets, lora_bias=True, task_type=None), tmp_path)
    assert sum(name.endswith("bias") for name in changed(state(base), state(live))) == 2


def test_lora_bias_on_a_layer_without_bias_is_an_error(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.bert(), lora("query", lora_bias=True), tmp_path / "adapter")
    edit_tensors(adapter, lambda t: {k.replace("bert.encoder.layer", "model.layers"): v for k, v in t.items()})
    target = {f"model.layers.{i}.attention.self.query.weight": torch.zeros(32, 32) for i in range(2)}
    with pytest.raises(PlanError, match=r"query\.bias \(lora_bias, but the target's layer has no bias\)"):
        portllm.apply(target, adapter)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_trainable_tokens(family: str, as_dict: bool, tmp_path: Path) -> None:
    """Tied heads change with the embedding; untied ones do not."""
    base = FAMILIES[family].build()
    name = "wte" if family == "gpt2" else "embed_tokens"
    indices = [3, 90, 17]
    config = FAMILIES[family].config(trainable_token_indices={name: indices} if as_dict else indices)
    live = check(base, config, tmp_path)
    rows = (live.get_input_embeddings().weight != base.get_input_embeddings().weight).any(1).nonzero().flatten()
    assert rows.tolist() == sorted(indices)


def test_trainable_tokens_of_an_untied_head(tmp_path: Path) -> None:
    config = lora("q_proj", trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [5]})
    check(tiny.llama(), config, tmp_path)


def test_trainable_tokens_with_wrong_indices_are_refused(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj", trainable_token_indices=[4, 6]), tmp_path / "adapter")
    with pytest.raises(PatchError, match=r"does not fit trainable_token_indices \(3 distinct rows"):
        Patch.load(edit_config(adapter, trainable_token_indices=[4, 6, 7]))
    with pytest.raises(PlanError, match=f"indices up to {VOCAB} do not fit"):
        portllm.apply(base, edit_config(adapter, trainable_token_indices=[4, VOCAB]))


# -- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, targets",
    [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("phi3", ["qkv_proj"]), ("bert", ["key"])],
)
def test_dora(family: str, targets: list[str], tmp_path: Path) -> None:
    config = FAMILIES[family].config(target_modules=targets, use_dora=True, task_type=None)
    check(FAMILIES[family].build(), config, tmp_path, tolerance=1e-5)


def test_dora_on_an_embedding(tmp_path: Path) -> None:
    base = tiny.llama()
    config = lora("embed_tokens", use_dora=True)
    adapter = save_adapter(base, config, tmp_path / "adapter", save_embedding_layers=False)
    check_adapter(base, adapter, tmp_path, tolerance=1e-5)


class Convolutions(nn.Module):
    """1x1 and 3x3 convolutions, one of them square, and a linear layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.point = nn.Conv2d(6, 10, 1)
        self.square = nn.Conv2d(8, 8, 3)
        self.wide = nn.Conv2d(6, 12, (3, 5), groups=groups)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("use_dora", [False, True])
def test_convolutions(use_dora: bool, tmp_path: Path) -> None:
    config = lora("point", "square", "wide", "line", "head", use_dora=use_dora)
    check(Convolutions(), config, tmp_path, disk=False, tolerance=1e-5)


def test_convolutions_on_disk(tmp_path: Path) -> None:
    base = Convolutions()
    adapter = save_adapter(base, lora("point", "square", "wide", "head"), tmp_path / "adapter")
    live = copy.deepcopy(base)
    portllm.apply(live, adapter)
    (tmp_path / MODEL).mkdir()
    save_file(base.state_dict(), tmp_path / MODEL / "model.safetensors")
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT)
    assert not changed(state(live), load_file(tmp_path / OUT / "model.safetensors"))


class Attention(nn.Module):
    """torch's own attention, whose input projections are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)
        self.line = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_multihead_attention_is_refused(tmp_path: Path) -> None:
    """PEFT adds the output projection's factors twice whenever it merges, and it merges for each forward pass."""
    base = Attention()
    adapter = save_adapter(base, lora("attn", "line"), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model.attn.base_layer.out_proj.lora_"
    delta = 1.5 * tensors[f"{prefix}B.weight"] @ tensors[f"{prefix}A.weight"]
    merged = peft_merged(base, adapter)
    torch.testing.assert_close(merged.attn.out_proj.weight.detach(), base.attn.out_proj.weight.detach() + 2 * delta)
    with pytest.raises(UnsupportedPatchError, match=r"attn\.base_layer\.out_proj lies within a layer .*twice"):
        portllm.apply(base, adapter)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    base = Convolutions(groups=2)
    adapter = save_adapter(base, lora("wide", r=4), tmp_path / "adapter")
    before = state(base)
    with pytest.raises(UnsupportedPatchError, match=r"wide: .* in 2 groups; grouped convolutions cannot be merged"):
        portllm.apply(base, adapter)
    assert not changed(before, state(base))


def test_convolutions_of_another_shape_or_memory_format_are_refused(tmp_path: Path) -> None:
    adapter = save_adapter(Convolutions(), lora("square"), tmp_path / "adapter")
    for other in (nn.Conv2d(8, 8, 5), nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)):
        with pytest.raises(PlanError, match=r"square.*(\[8, 8, 5, 5\]; the patch was made|not channels_last)"):
            portllm.apply({"square.weight": other.weight.detach()}, adapter)


def test_two_dora_adapters_do_not_depend_on_their_order(tmp_path: Path) -> None:
    """Each is measured against the base: together they are the sum of what each does alone."""
    base = tiny.gpt2()
    config = lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True)
    first = save_adapter(base, config, tmp_path / "first")
    second = save_adapter(base, config, tmp_path / "second")
    start = {name: tensor.double() for name, tensor in state(base).items()}
    alone = [state(peft_merged(base, a, dtype=torch.float64)) for a in (first, second)]
    truth = {name: w + sum(merged[name] - w for merged in alone) for name, w in start.items()}
    for order in ([first, second], [second, first]):
        live = copy.deepcopy(base)
        portllm.apply(live, order)
        assert_close(state(live), truth, 1e-5)
    weighted = {name: w + 0.5 * (alone[0][name] - w) - 0.25 * (alone[1][name] - w) for name, w in start.items()}
    live = copy.deepcopy(base)
    portllm.apply(live, [(first, 0.5), (second, -0.25)])
    assert_close(state(live), weighted, 1e-5)


def test_dora_without_its_magnitudes_is_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj", use_dora=True), tmp_path / "adapter")
    edit_tensors(adapter, lambda t: {k: v for k, v in t.items() if "layers.1" not in k or "magnitude" not in k})
    with pytest.raises(PatchError, match=r"layers\.1.*lora_magnitude_vector is missing"):
        Patch.load(adapter)


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS[::-1], "rank_pattern": {"gate_up_proj": 2}},
        {"target_parameters": EXPERTS[:1]},
        {"target_parameters": EXPERTS[1:], "use_rslora": True},
        {"target_parameters": ["gate_up_proj", "down_proj", "gate.weight"], "rank_pattern": {r".*gate\.weight": 2}},
        {"target_parameters": ["mlp.gate.weight"]},
        {
            "target_parameters": EXPERTS,
            "target_modules": ["q_proj", "lm_head"],
            "rank_pattern": {r"model\.layers\.1\.mlp\.experts\.down_proj": 3},
            "alpha_pattern": {r".*experts\.gate_up_proj": 11},
        },
    ],
    ids=str,
)
def test_target_parameters(settings: dict[str, Any], tmp_path: Path) -> None:
    """In memory the experts are stacked, on disk transformers writes them one by one."""
    config = lora(*settings.pop("target_modules", []), **settings)
    if not config.target_modules:
        config.target_modules = set()
    check(tiny.mixtral(), config, tmp_path)


class Experts(nn.Module):
    """Stacked matrices [E, a, b] of the shapes given, declared in the order given."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], is_transposed: bool = False) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.is_transposed = is_transposed

    def forward(self, x: Tensor) -> Tensor:
        return x


class Layers(nn.Module):
    """Two layers of experts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], is_transposed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts(shapes, is_transposed)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x


def _expert_config(*parameters: str, **settings: Any) -> peft.LoraConfig:
    return lora(target_parameters=[f"experts.{name}" for name in parameters], target_modules=[], **settings)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_experts_stored_in_out(is_transposed: bool, tmp_path: Path) -> None:
    base = Layers({"gate_up_proj": (3, 6, 10), "down_proj": (3, 5, 6)}, is_transposed)
    check(base, _expert_config("gate_up_proj", "down_proj"), tmp_path, disk=False)


@pytest.mark.parametrize("names", [("beta", "alpha"), ("alpha", "beta")])
def test_factors_that_fit_both_parameters_follow_the_declared_order(names: tuple[str, str], tmp_path: Path) -> None:
    """PEFT nests its wrappers in the order in which the module declares its parameters, whatever their names."""
    base = Layers(dict.fromkeys(names, (3, 4, 6)))
    check(base, _expert_config(*sorted(names)), tmp_path, disk=False)


def test_factors_that_fit_both_parameters_are_refused_where_the_order_is_unknown(tmp_path: Path) -> None:
    base = Layers({"beta": (3, 4, 6), "alpha": (3, 4, 6)})
    adapter = save_adapter(base, _expert_config("alpha", "beta"), tmp_path / "adapter")
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(PlanError, match=r"fit several ways to .*alpha.*beta"):
        portllm.apply_checkpoint(tmp_path / "model.safetensors", adapter, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("is_transposed", [False, True])
def test_square_experts_are_refused_unless_told(is_transposed: bool, tmp_path: Path) -> None:
    base = Layers({"square": (3, 6, 6)}, is_transposed)
    adapter = save_adapter(base, _expert_config("square"), tmp_path / "adapter")
    before = state(base)
    with pytest.raises(PlanError, match=r"matrices are square.*expert_layout='out_in' or 'in_out'"):
        portllm.apply(base, adapter)
    assert not changed(before, state(base))
    check_adapter(base, adapter, tmp_path, disk=False, expert_layout="in_out" if is_transposed else "out_in")


@pytest.mark.parametrize("is_transposed", [False, True])
def test_square_experts_follow_their_siblings(is_transposed: bool, tmp_path: Path) -> None:
    base = Layers({"gate_up_proj": (3, 6, 12), "down_proj": (3, 6, 6)}, is_transposed)
    check(base, _expert_config("gate_up_proj", "down_proj"), tmp_path, disk=False)


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_square_experts_of_gate_and_up_on_disk(layout: str, tmp_path: Path) -> None:
    """gate_up_proj is square where twice the experts' width is the model's (OLMoE); on disk it lies in two parts."""
    base = tiny.mixtral(intermediate_size=16)
    config = lora(target_parameters=EXPERTS, target_modules=[], rank_pattern={"down_proj": 3})
    adapter = save_adapter(base, config, tmp_path / "adapter")
    truth = peft_merged(base, adapter, dtype=torch.float64)
    base.save_pretrained(tmp_path / MODEL)

    def transpose(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same deltas as factors of the transposed matrices, as they were read before."""
        result = dict(tensors)
        for key, lora_A in tensors.items():
            if ".lora_A." in key and "experts" in key:
                other = key.replace("lora_A", "lora_B")
                each_A = lora_A.reshape(4, -1, lora_A.shape[1])  # [E, r, in]
                each_B = tensors[other].reshape(len(tensors[other]), -1, 4)  # [out, r, E]
                result[key] = each_B.permute(2, 1, 0).reshape(-1, len(each_B)).contiguous()
                result[other] = each_A.permute(2, 1, 0).reshape(each_A.shape[2], -1).contiguous()
        return result

    if layout == "in_out":
        edit_tensors(adapter, transpose)
    for options in ({}, {"expert_layout": layout}):  # the other parameter tells, or the user does
        live = copy.deepcopy(base)
        portllm.apply(live, adapter, **options)
        assert_close(state(live), state(truth))
        portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, overwrite=True, **options)
        assert not changed(state(live), state(type(base).from_pretrained(tmp_path / OUT)))

    edit_config(adapter, target_parameters=EXPERTS[:1])
    outer = ".experts.lora_"
    edit_tensors(adapter, lambda t: {k.replace(".base_layer", ""): v for k, v in t.items() if outer not in k})
    for apply in (lambda: portllm.apply(base, adapter), lambda: plan_checkpoint(tmp_path / MODEL, adapter)):
        with pytest.raises(PlanError, match=r"gate_up_proj: the experts' matrices are square"):
            apply()


def test_expert_factors_of_another_model_are_refused(tmp_path: Path) -> None:
    adapter = save_adapter(Layers({"down_proj": (3, 4, 6)}), _expert_config("down_proj"), tmp_path / "adapter")
    with pytest.raises(PlanError, match="do not fit"):
        portllm.apply(Layers({"down_proj": (3, 4, 7)}), adapter)
    with pytest.raises(PlanError, match="do not fit"):
        portllm.apply(Layers({"down_proj": (4, 4, 6)}), adapter)


def _v4_mixtral_adapter(path: Path, *, rank: int = 4, width: int = 20) -> Path:
    """An adapter as PEFT wrote it under transformers 4, where each expert had linear layers w1, w2 and w3."""
    sides = {"w1": (width, 32), "w3": (width, 32), "w2": (32, width)}
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}."
        others = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "block_sparse_moe.gate": (4, 32)}
        for projection, (rows, columns) in others.items():
            tensors[f"{prefix}{projection}.lora_A.weight"] = torch.randn(rank, columns)
            tensors[f"{prefix}{projection}.lora_B.weight"] = torch.randn(rows, rank)
        for expert in range(4):
            for projection, (rows, columns) in sides.items():
                module = f"{prefix}block_sparse_moe.experts.{expert}.{projection}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns)
                tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 10,
        "target_modules": ["q_proj", "v_proj", "gate", "w1", "w2", "w3"],
        "peft_version": "0.11.1", "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def test_adapter_of_transformers_4_on_stacked_experts_and_on_disk(tmp_path: Path) -> None:
    """PEFT converts such an adapter when it loads it: its merge is the truth here, too."""
    base = tiny.mixtral()
    live = check_adapter(base, _v4_mixtral_adapter(tmp_path / "adapter"), tmp_path)
    assert len(changed(state(base), state(live))) == 10
    names = set(load_file(next((tmp_path / OUT).glob("*.safetensors"))))
    assert not any("gate_up_proj" in name for name in names)


def test_adapter_of_transformers_4_on_square_stacks(tmp_path: Path) -> None:
    """gate_up_proj is [32, 32], of which w1 and w3 may be rows or columns: w2 tells, or the user must."""
    base = tiny.mixtral(intermediate_size=16)
    adapter = _v4_mixtral_adapter(tmp_path / "adapter", width=16)
    check_adapter(base, adapter, tmp_path)
    edit_tensors(adapter, lambda t: {k: v for k, v in t.items() if "w2" not in k})
    edit_config(adapter, target_modules=["q_proj", "v_proj", "gate", "w1", "w3"])
    with pytest.raises(PlanError, match=r"w\d: the experts' matrices are square"):
        portllm.apply(base, adapter)
    live, other = copy.deepcopy(base), copy.deepcopy(base)
    portllm.apply(live, adapter, expert_layout="out_in")
    assert not changed(state(live), state(_loaded(portllm.apply_checkpoint, base, adapter, tmp_path / "again")))
    portllm.apply(other, adapter, expert_layout="in_out")
    assert changed(state(live), state(other))


def _loaded(apply: Any, base: Any, adapter: Path, path: Path) -> Any:
    base.save_pretrained(path / MODEL)
    apply(path / MODEL, adapter, path / OUT)
    return type(base).from_pretrained(path / OUT)


def test_adapter_of_transformers_4_saved_again_by_peft(tmp_path: Path) -> None:
    """The conversion doubles rank and alpha of the fused parameters, in the patterns."""
    base = tiny.mixtral()
    old = _v4_mixtral_adapter(tmp_path / "old")
    converted = peft.PeftModel.from_pretrained(copy.deepcopy(base), old)
    converted.save_pretrained(tmp_path / "new")
    live, again = copy.deepcopy(base), copy.deepcopy(base)
    portllm.apply(live, old)
    portllm.apply(again, tmp_path / "new")
    assert_close(state(live), state(again), 1e-5)


# -- fused and unfused -----------------------------------------------------------------------------------------------

_PARTS = {
    "self_attn.qkv_proj": {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "self_attn.v_proj": 16},
    "mlp.gate_up_proj": {"mlp.gate_proj": 44, "mlp.up_proj": 44},
}


def _unfuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut q, k, v (of grouped query attention) and gate, up out of the fused weights; biases, too."""
    result = {}
    for name, tensor in tensors.items():
        fused = next((f for f in _PARTS if f".{f}." in name), None)
        if fused is None:
            result[name] = tensor
            continue
        parts = tensor.split(list(_PARTS[fused].values()))
        result.update({name.replace(fused, p): t.clone() for p, t in zip(_PARTS[fused], parts, strict=True)})
    return result


def _fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of ``_unfuse``."""
    result = {}
    for name, tensor in tensors.items():
        fused = next((f for f, parts in _PARTS.items() if any(f".{p}." in name for p in parts)), None)
        if fused is None:
            result[name] = tensor
            continue
        first = next(part for part in _PARTS[fused] if f".{part}." in name)
        names = [name.replace(first, part) for part in _PARTS[fused]]
        result[name.replace(first, fused)] = torch.cat([tensors[n] for n in names])
    return result


def _check_mapping(before: dict[str, Tensor], truth: dict[str, Tensor], adapter: Path, tmp_path: Path) -> None:
    """Apply to a state dict and to a file of it."""
    save_file(before, tmp_path / "model.safetensors")
    live = {name: tensor.clone() for name, tensor in before.items()}
    portllm.apply(live, adapter)
    assert_close(live, truth)
    assert changed(before, live) == changed(before, truth) != set()
    portllm.apply_checkpoint(tmp_path / "model.safetensors", adapter, tmp_path / "out.safetensors")
    assert not changed(live, load_file(tmp_path / "out.safetensors"))


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize(
    "targets",
    [["qkv_proj"], ["gate_up_proj", "down_proj"], ["qkv_proj", "o_proj", "gate_up_proj"], r".*v_proj"],
    ids=str,
)
def test_adapter_trained_on_fused_weights_onto_unfused(targets: Any, tmp_path: Path) -> None:
    base = tiny.phi3()
    adapter = save_adapter(base, lora(target_modules=targets), tmp_path / "adapter")
    merged = _untied_state(peft_merged(base, adapter, dtype=torch.float64))
    _check_mapping(_unfuse(_untied_state(base)), _unfuse(merged), adapter, tmp_path)


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["k_proj", "v_proj"], ["up_proj"], tiny._PROJECTIONS, r".*(q|v)_proj"], ids=str
)
def test_adapter_trained_on_unfused_weights_onto_fused(targets: Any, tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora(target_modules=targets), tmp_path / "adapter")
    merged = _untied_state(peft_merged(base, adapter, dtype=torch.float64))
    _check_mapping(_fuse(_untied_state(base)), _fuse(merged), adapter, tmp_path)


@pytest.mark.parametrize("to_fused", [False, True])
def test_dora_between_fused_and_unfused(to_fused: bool, tmp_path: Path) -> None:
    """Norms are over rows, so each part has its own."""
    base = tiny.llama() if to_fused else tiny.phi3()
    targets = ["k_proj", "up_proj"] if to_fused else ["qkv_proj", "gate_up_proj"]
    adapter = save_adapter(base, lora(*targets, use_dora=True), tmp_path / "adapter")
    merged = _untied_state(peft_merged(base, adapter, dtype=torch.float64))
    change = _fuse if to_fused else _unfuse
    _check_mapping(change(_untied_state(base)), change(merged), adapter, tmp_path)


@pytest.mark.parametrize("setting", ["lora_bias", "bias"])
def test_biases_between_fused_and_unfused(setting: str, tmp_path: Path) -> None:
    base = tiny.llama(attention_bias=True)
    settings = {"lora_bias": {"lora_bias": True}, "bias": {"bias": "lora_only"}}[setting]
    adapter = save_adapter(base, lora("q_proj", "k_proj", "v_proj", **settings), tmp_path / "adapter")
    merged = _untied_state(peft_merged(base, adapter, dtype=torch.float64))
    _check_mapping(_fuse(_untied_state(base)), _fuse(merged), adapter, tmp_path)


def test_a_fused_weight_of_other_sizes_is_refused(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("k_proj"), tmp_path / "adapter")
    target = {f"model.layers.{i}.self_attn.qkv_proj.weight": torch.randn(30, 32) for i in range(2)}
    with pytest.raises(PlanError, match=r"k_proj.* 16 rows in the patch, which does not fit into the 30 rows"):
        portllm.apply(target, adapter)
    fused = save_adapter(tiny.phi3(), lora("qkv_proj"), tmp_path / "fused")
    parts = {f"model.layers.{i}.self_attn.{p}_proj.weight": torch.randn(16, 32) for i in range(2) for p in "qkv"}
    with pytest.raises(PlanError, match=r"64 rows in the patch, but its parts in the target have 48 together"):
        portllm.apply(parts, fused)


# -- resized vocabularies --------------------------------------------------------------------------------------------

_LARGER = VOCAB + 8


def _resized(base: Any, tmp_path: Path) -> Any:
    """The base as it is on disk, and a copy of it with a larger vocabulary, as before a training."""
    base.save_pretrained(tmp_path / MODEL, max_shard_size="20KB")
    larger = type(base).from_pretrained(tmp_path / MODEL)
    larger.resize_token_embeddings(_LARGER, mean_resizing=False)
    assert larger.config.name_or_path == str(tmp_path / MODEL)
    return larger


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=["saved since resized", "modules_to_save", "lora"],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_resized_vocabulary(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = FAMILIES[family].build()
    tied = "once"
    if family == "qwen3":  # tied: PEFT is to speak of the embedding only
        settings = {k: [name for name in v if name != "lm_head"] for k, v in settings.items()}
    larger = _resized(base, tmp_path)
    adapter = save_adapter(larger, lora(**settings), tmp_path / "adapter")
    truth = peft_merged(larger, adapter, dtype=torch.float64)

    before = state(base)
    if family == "qwen3" and "modules_to_save" in settings:  # PEFT has parted the embedding from the head
        with pytest.raises(PlanError, match="hold different values, but are one tied weight"):
            portllm.apply(larger, adapter)
        tied = "untie"
    with pytest.raises(PlanError, match=rf"resize_token_embeddings\({_LARGER}\)"):
        portllm.apply(base, adapter, tied=tied)
    with pytest.raises(PlanError, match="--resize-vocab"):
        portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, tied=tied)
    assert not changed(before, state(base))

    live = copy.deepcopy(larger)
    portllm.apply(live, adapter, tied=tied)
    assert_close(state(live), state(truth))

    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, resize=True, tied=tied)
    again = type(base).from_pretrained(tmp_path / OUT)
    assert again.config.vocab_size == _LARGER
    assert again.get_input_embeddings().num_embeddings == _LARGER
    assert not changed(state(live), state(again))
    index = json.loads((tmp_path / OUT / "model.safetensors.index.json").read_text())
    shards = [load_file(path) for path in (tmp_path / OUT).glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in shard.values())


def test_a_vocabulary_of_which_only_the_head_was_saved_is_refused(tmp_path: Path) -> None:
    """PEFT saves a targeted head's base, but not the embedding: a checkpoint of both sizes would not load."""
    larger = _resized(tiny.llama(), tmp_path)
    adapter = save_adapter(larger, lora("q_proj", "lm_head"), tmp_path / "adapter")
    assert not any("embed_tokens" in key for key in keys(adapter))
    with pytest.raises(PlanError, match=rf"lm_head.* {_LARGER} .*embed_tokens.* {VOCAB}"):
        portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, resize=True)
    live = copy.deepcopy(larger)
    portllm.apply(live, adapter)
    assert_close(state(live), state(peft_merged(larger, adapter, dtype=torch.float64)))


def test_untying_needs_both_of_the_larger_weights(tmp_path: Path) -> None:
    larger = _resized(tiny.qwen3(), tmp_path)
    adapter = save_adapter(larger, lora("q_proj"), tmp_path / "adapter")
    edit_tensors(adapter, lambda t: {k: v for k, v in t.items() if "lm_head" not in k})
    with pytest.raises(PlanError, match=rf"embed_tokens.* {_LARGER} .*lm_head.* {VOCAB}"):
        portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, resize=True, tied="untie")
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, resize=True)
    live = copy.deepcopy(larger)
    portllm.apply(live, adapter)
    assert not changed(state(live), state(type(larger).from_pretrained(tmp_path / OUT)))


def test_factors_of_a_larger_vocabulary_without_its_base(tmp_path: Path) -> None:
    larger = _resized(tiny.llama(), tmp_path)
    adapter = save_adapter(larger, lora("lm_head"), tmp_path / "adapter", save_embedding_layers=False)
    for options in ({}, {"resize": True}):
        with pytest.raises(PlanError, match=rf"lm_head.*resize_token_embeddings\({_LARGER}\).*saved embedding"):
            portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT, **options)


# -- files and keys --------------------------------------------------------------------------------------------------


def test_adapter_in_a_subfolder(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj"), tmp_path / "adapter", adapter="style")
    assert adapter == tmp_path / "adapter" / "style"
    live, other = copy.deepcopy(base), copy.deepcopy(base)
    portllm.apply(live, tmp_path / "adapter")
    portllm.apply(other, adapter / "adapter_config.json")
    assert_close(state(live), state(peft_merged(base, adapter, dtype=torch.float64)))
    assert not changed(state(live), state(other))
    save_adapter(base, lora("k_proj"), tmp_path / "adapter", adapter="tone")
    with pytest.raises(PatchError, match=r"several adapters, name one: .*style, .*tone"):
        portllm.apply(live, tmp_path / "adapter")


def test_old_bin_files(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj"), tmp_path / "adapter", safe_serialization=False)
    assert not (adapter / "adapter_model.safetensors").exists()
    check_adapter(base, adapter, tmp_path)


def test_bin_files_are_read_with_weights_only(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter", safe_serialization=False)
    torch.save({"x": re.compile("code")}, adapter / "adapter_model.bin")
    with pytest.raises(PatchError, match="weights_only=True"):
        Patch.load(adapter)


@pytest.mark.parametrize("prefix", ["", "base_model.", "base_model.model."])
@pytest.mark.parametrize("named", [False, True])
def test_prefixes_and_adapter_names_in_keys(prefix: str, named: bool, tmp_path: Path) -> None:
    base = tiny.llama()
    config = lora("q_proj", "embed_tokens", use_dora=True)
    adapter = save_adapter(base, config, tmp_path / "adapter", save_embedding_layers=False)
    truth = peft_merged(base, adapter, dtype=torch.float64)

    def respell(key: str) -> str:
        key = prefix + key.removeprefix("base_model.model.")
        return re.sub(r"(\.lora_\w+)", r"\1.some_name", key) if named else key

    edit_tensors(adapter, lambda t: {respell(k): v for k, v in t.items()})
    live = copy.deepcopy(base)
    portllm.apply(live, adapter)
    assert_close(state(live), state(truth), 1e-5)


def test_several_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")

    def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {re.sub(r"(lora_[AB])", rf"\1.{n}", k): v.clone() for k, v in tensors.items() for n in ("one", "two")}

    with pytest.raises(PatchError, match=r"several adapters \(one, two\)"):
        Patch.load(edit_tensors(adapter, twice))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adapters_saved_in_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.llama()
    settings = lora("q_proj", "embed_tokens", modules_to_save=["lm_head"])
    adapter = save_adapter(base, settings, tmp_path / "adapter", save_embedding_layers=False)
    edit_tensors(adapter, lambda t: {k: v.to(dtype) for k, v in t.items()})
    check_adapter(base, adapter, tmp_path)


@pytest.mark.parametrize(
    "stray",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight",
        "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_embedding_A",
        "base_model.model.model.layers.0.input_layernorm.weight",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.score.bias",
        "whatever",
    ],
)
def test_a_stray_key_is_an_error_that_names_it(stray: str, tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    edit_tensors(adapter, lambda t: {**t, stray: torch.ones(4, 4)})
    module = re.sub(r"\.(lora_.*|weight|bias|token_adapter.*)$", "", stray).removeprefix("base_model.model.")
    with pytest.raises(PatchError, match=re.escape(module)):
        Patch.load(adapter)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_factors_are_refused(value: float, tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")

    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[max(tensors)][1, 2] = value
        return tensors

    with pytest.raises(PatchError, match="holds NaN or Inf"):
        Patch.load(edit_tensors(adapter, spoil))


def test_empty_and_integer_factors_are_refused(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    stored = load_file(adapter / "adapter_model.safetensors")
    for change, message in (
        (lambda t: t[:0], "is empty; was it saved under ZeRO-3"),
        (lambda t: t.char(), "is torch.int8"),
    ):
        edit_tensors(adapter, lambda _, change=change: {k: change(v).clone() for k, v in stored.items()})
        with pytest.raises(PatchError, match=message):
            Patch.load(adapter)


@pytest.mark.parametrize(
    "tensors, settings, message",
    [
        ({}, {}, "the adapter is empty"),
        ({"a.q.lora_A.weight": (2, 4)}, {}, r"module a\.q: needs lora_A and lora_B, has lora_A"),
        ({"a.q.lora_A.weight": (2, 4), "a.q.lora_B.weight": (4, 3)}, {}, r"\[4, 3\] are not of rank 2"),
        ({"a.q.lora_A.weight": (2,), "a.q.lora_B.weight": (4, 2)}, {}, "are not of rank 2"),
        ({"a.q.lora_A.weight": (2, 4, 3), "a.q.lora_B.weight": (4, 2, 3)}, {}, "with a 1-wide kernel"),
        ({"a.q.lora_A.weight": (2, 4), "base_model.model.a.q.lora_A.weight": (2, 4)}, {}, "stands twice"),
        ({"e.lora_A.weight": (6, 4), "e.lora_B.weight": (4, 5)}, {"target_parameters": ["e.w"]}, "of different rank"),
        ({"e.lora_A.weight": (6, 4, 1), "e.lora_B.weight": (4, 6)}, {"target_parameters": ["e.w"]}, "need 2-D"),
        (
            {"e.base_layer.lora_A.weight": (6, 4), "e.base_layer.lora_B.weight": (4, 6)},
            {"target_parameters": ["e.w"]},
            r"nested parameter wrappers \[1\] have a gap",
        ),
        (
            {f"e.{depth}lora_{f}.weight": (6, 6) for depth in ("", "base_layer.") for f in "AB"},
            {"target_parameters": ["e.w"]},
            "2 nested factors, but target_parameters name",
        ),
    ],
    ids=range(10),
)
def test_keys_that_do_not_make_a_whole_are_refused(
    tensors: dict[str, tuple[int, ...]], settings: dict[str, Any], message: str
) -> None:
    values = {key: torch.randn(shape) for key, shape in tensors.items()}
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q"], **settings}
    with pytest.raises(PatchError, match=message):
        Patch.from_tensors(values, config)


def test_directories_that_are_not_adapters(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match=r"no adapter_config\.json in it"):
        Patch.load(tmp_path)
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(PatchError, match="not a sound safetensors file"):
        Patch.load(adapter)
    torch.save([torch.zeros(2)], adapter / "adapter_model.bin")
    file.unlink()
    with pytest.raises(PatchError, match="not a state dict of tensors"):
        Patch.load(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(PatchError, match=r"neither adapter_model.safetensors nor adapter_model.bin"):
        Patch.load(adapter)


def test_names_of_all_kinds_that_the_target_lacks_are_told(tmp_path: Path) -> None:
    base = tiny.mixtral()
    config = lora(
        "q_proj", target_parameters=EXPERTS, modules_to_save=["lm_head"], trainable_token_indices=[1], lora_alpha=1
    )
    adapter = save_adapter(base, config, tmp_path / "adapter")
    kept = {name: tensor for name, tensor in state(base).items() if "self_attn" in name}
    with pytest.raises(PlanError, match="4 names of the patch are not in the target"):
        portllm.apply(kept, adapter)
    plan = portllm.plan(kept, adapter, strict=False)
    experts = {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert set(plan.unmatched_patch) == {"lm_head.weight", "model.embed_tokens", *experts}
    whole = portllm.plan(base, adapter)
    assert {u.region.expert for u in whole.updates} == {None, 0, 1, 2, 3}
    patch = Patch.load(adapter)
    assert patch.ranks == (4,)
    assert patch.num_parameters == sum(t.numel() for t in patch.tensors.values()) > 1000
    assert "Patch(" in repr(patch)


# -- settings that are not supported ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens.*some tokens only"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"velora_config": {"a": 1}}, "velora_config"),
        ({"monteclora_config": {"a": 1}}, "monteclora_config"),
        ({"use_bdlora": {"a": 1}}, "use_bdlora"),
        ({"use_qalora": True}, "use_qalora"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_something_new": True}, "use_something_new=True is not supported: unknown here"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA'"),
        ({"peft_type": None}, "peft_type is None"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    edit_config(adapter, **settings)
    with pytest.raises(UnsupportedPatchError, match=message):
        Patch.load(adapter)
    if "peft_type" not in settings:
        assert Patch.load(adapter, ignore_settings=tuple(settings)).entries


@pytest.mark.parametrize("method", [peft.LoHaConfig, peft.LoKrConfig, peft.IA3Config, peft.VeraConfig])
def test_other_methods_of_peft_are_refused(method: Any, tmp_path: Path) -> None:
    extra = {"feedforward_modules": []} if method is peft.IA3Config else {}
    config = method(target_modules=["q_proj"], **extra)
    peft.get_peft_model(tiny.llama(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedPatchError, match="only LORA can be ported"):
        Patch.load(tmp_path / "adapter")


@pytest.mark.parametrize(
    "settings", [{"init_lora_weights": "eva"}, {"init_lora_weights": "gaussian"}, {"init_lora_weights": "orthogonal"}]
)
def test_initialisations_that_keep_the_base_are_accepted(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj"), tmp_path / "adapter")
    check_adapter(base, edit_config(adapter, **settings), tmp_path, disk=False)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("unsloth/llama-3-8b-bnb-4bit", True),
        ("TheBloke/Mistral-7B-GPTQ", True),
        ("org/model-AWQ", True),
        ("org/model.w4a16", True),
        ("/models/llama_int4", True),
        ("meta-llama/Llama-3.1-8B", False),
        ("org/clawqed-hawk", False),
        (None, False),
    ],
)
def test_an_adapter_trained_on_quantised_weights_is_pointed_out(name: str | None, hint: bool, tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = edit_config(save_adapter(base, lora("q_proj"), tmp_path / "a"), base_model_name_or_path=name)
    warnings = [w for w in portllm.plan(base, adapter).warnings if "quantised base" in w]
    assert bool(warnings) == hint
    assert all(str(name) in w and "quantisation error" in w for w in warnings)


# -- patches that do not fit -----------------------------------------------------------------------------------------


def test_a_patch_that_matches_nothing(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    for strict in (True, False):
        with pytest.raises(PlanError, match=r"matches nothing in the target; the first of its names: model.layers.0"):
            portllm.apply(tiny.gpt2(), adapter, strict=strict)


@pytest.mark.parametrize(
    "layers, message", [(3, r"no factors for 2 modules .*layers\.2"), (1, r"2 .* not in the target: .*layers\.1")]
)
def test_more_or_fewer_layers_than_the_patch(layers: int, message: str, tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj", "v_proj"), tmp_path / "adapter")
    target = tiny.llama(num_hidden_layers=layers)
    before = state(target)
    with pytest.raises(PlanError, match=message):
        portllm.apply(target, adapter)
    assert not changed(before, state(target))
    applied = portllm.apply(target, adapter, strict=False)
    assert len(changed(before, state(target))) == 2 * min(layers, 2)
    plan = applied.plan
    assert (len(plan.unmatched_target), len(plan.unmatched_patch)) == ((2, 0) if layers == 3 else (0, 2))


def test_a_patch_of_another_width(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    with pytest.raises(PlanError, match=r"q_proj: lora_B @ lora_A is \[32, 32\], but .* is \[64, 64\]"):
        portllm.apply(tiny.llama(hidden_size=64), adapter)


def test_patch_of_the_bare_model_and_of_the_whole_fit_each_other(tmp_path: Path) -> None:
    whole = tiny.llama()
    bare = whole.model
    from_bare = save_adapter(bare, lora("q_proj", "embed_tokens"), tmp_path / "bare", save_embedding_layers=False)
    truth = state(peft_merged(bare, from_bare, dtype=torch.float64))
    live = copy.deepcopy(whole)
    portllm.apply(live, from_bare)
    assert_close(state(live.model), truth)

    from_whole = save_adapter(whole, lora("k_proj"), tmp_path / "whole")
    live = copy.deepcopy(bare)
    portllm.apply(live, from_whole)
    assert_close(state(live), state(peft_merged(whole, from_whole, dtype=torch.float64).model))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "language_model.", ""])
def test_text_patch_on_the_language_model_within_another(prefix: str, tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj", "down_proj"), tmp_path / "adapter")
    merged = state(peft_merged(base, adapter, dtype=torch.float64))
    vision = {"model.visual.blocks.0.attn.q_proj.weight": torch.randn(8, 8)}

    def nest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**{prefix + k.removeprefix("model."): v for k, v in tensors.items()}, **vision}

    _check_mapping(nest(state(base)), nest(merged), adapter, tmp_path)


def test_two_places_that_fit_equally_well_are_refused(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj"), tmp_path / "adapter")
    inner = {k.removeprefix("model."): v for k, v in state(base).items()}
    target = {f"{prefix}.{k}": v.clone() for prefix in ("language_model", "transformer") for k, v in inner.items()}
    with pytest.raises(PlanError, match=r"could be .* or .*; rename the patch's keys"):
        portllm.apply(target, adapter)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj"), tmp_path / "adapter")
    tensors = state(base)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    before = {k: v.clone() for k, v in tensors.items()}
    with pytest.raises(PlanError, match=f"{re.escape(name)} is .*quantised weights cannot be patched"):
        portllm.apply(tensors, adapter)
    assert all(torch.equal(before[k].view(torch.uint8), v.view(torch.uint8)) for k, v in tensors.items())


def test_peft_models_are_refused(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj"), tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(base, adapter)
    with pytest.raises(PlanError, match="still carries PEFT adapter layers"):
        portllm.apply(wrapped, adapter)


def test_meta_tensors_are_refused(tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora("q_proj", "v_proj"), tmp_path / "adapter")
    base.model.layers[1].self_attn.v_proj.to("meta")
    before = base.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(PlanError, match=r"layers\.1\.self_attn\.v_proj\.weight is a meta tensor"):
        portllm.apply(base, adapter)
    assert torch.equal(before, base.model.layers[0].self_attn.q_proj.weight)
    assert portllm.plan(base.to("meta"), adapter).updates


# -- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True, "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], "alpha_pattern": {"0.self_attn.q_proj": 3}},
    ],
    ids=["dora", "tokens"],
)
def test_a_saved_patch_is_an_adapter_for_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny.llama()
    adapter = save_adapter(base, lora(**settings), tmp_path / "adapter", save_embedding_layers=False)
    patch = Patch.load(adapter).with_metadata(**{"portllm.base": "abc", "note": "ü"})
    patch.save(tmp_path / "again" / "deep")
    first, second = (peft_merged(base, path) for path in (adapter, tmp_path / "again" / "deep"))
    assert not changed(state(first), state(second))
    assert changed(state(base), state(first))
    again = Patch.load(tmp_path / "again" / "deep")
    assert again.metadata["portllm.base"] == "abc"
    assert again.metadata["note"] == "ü"
    assert again.config == patch.config
    assert again.tensors.keys() == patch.tensors.keys()
    assert all(torch.equal(again.tensors[k], v) for k, v in patch.tensors.items())


def test_the_metadata_of_the_file_is_kept(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "trained": "yes"})
    assert Patch.load(adapter).metadata == {"format": "pt", "trained": "yes"}
    Patch.load(adapter).save(tmp_path / "again")
    assert Patch.load(tmp_path / "again").metadata == {"format": "pt", "trained": "yes"}


def test_a_factor_file_that_changes_later_does_not_change_the_patch(tmp_path: Path) -> None:
    adapter = save_adapter(tiny.llama(), lora("q_proj"), tmp_path / "adapter")
    patch = Patch.load(adapter)
    before = {key: tensor.clone() for key, tensor in patch.tensors.items()}
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    assert all(torch.equal(before[key], tensor) for key, tensor in patch.tensors.items())


def test_transformers_reads_what_was_written(tmp_path: Path) -> None:
    """A checkpoint in the older spelling, which transformers renames when it loads, is renamed by us as well."""
    base = tiny.bert()
    adapter = save_adapter(base, lora("query", "dense", modules_to_save=["classifier"]), tmp_path / "adapter")
    live = copy.deepcopy(base)
    portllm.apply(live, adapter)
    base.save_pretrained(tmp_path / MODEL)
    file = tmp_path / MODEL / "model.safetensors"
    old = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in load_file(file).items()}
    save_file({k.replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in old.items()}, file, {"format": "pt"})
    portllm.apply_checkpoint(tmp_path / MODEL, adapter, tmp_path / OUT)
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / OUT)
    assert not changed(state(live), state(again))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("modules_to_save", ["score"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.down_proj"]),
    ],
)
def test_a_setting_without_its_tensors_is_an_error(setting: str, value: object) -> None:
    """As when an adapter was cut short: PEFT would keep what it has at random, or the base's own."""
    factors = {"m.q_proj.lora_A.weight": torch.randn(4, 8), "m.q_proj.lora_B.weight": torch.randn(8, 4)}
    config = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    Patch.from_tensors(factors, config)
    with pytest.raises(PatchError, match=f"{setting} is .* holds no tensor of it"):
        Patch.from_tensors(factors, config | {setting: value})
