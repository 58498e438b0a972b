"""portllm.apply on live modules and state dicts: several patches at once, strength, taking off again, refusals."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import portllm
from portllm import Patch, PlanError

from . import families as tiny
from .families import FAMILIES, assert_close, changed, peft_merged, save_adapter, state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def _adapters(base: nn.Module, tmp_path: Path, *configs: Any) -> list[Path]:
    return [save_adapter(base, config, tmp_path / f"adapter{i}") for i, config in enumerate(configs)]


def _wide(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state(model).items()}


def _sum(base: nn.Module, weights: dict[Path, float]) -> dict[str, Tensor]:
    """W + sum of weight * (PEFT's merge of the adapter alone - W), in float64."""
    start = _wide(base)
    total = {name: tensor.clone() for name, tensor in start.items()}
    for adapter, weight in weights.items():
        for name, merged in state(peft_merged(base, adapter, dtype=torch.float64)).items():
            total[name] += weight * (merged - start[name])
    return total


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "mixtral"])
def test_several_patches_with_weights_are_one_sum(family: str, tmp_path: Path) -> None:
    chosen = FAMILIES[family]
    base = chosen.build()
    ranks = [{}, {"r": 2, "use_rslora": True, "rank_pattern": {}}, {"lora_alpha": 1}]
    adapters = _adapters(base, tmp_path, *(chosen.config(**settings) for settings in ranks))
    weights = [0.7, -1.3, 2.0]
    truth = _sum(base, dict(zip(adapters, (0.5 * w for w in weights), strict=True)))
    live = copy.deepcopy(base)
    applied = portllm.apply(live, list(zip(adapters, weights, strict=True)), 0.5)
    assert_close(state(live), truth, 1e-5)
    assert changed(state(base), state(live)) == {n for n, t in truth.items() if not torch.equal(t, _wide(base)[n])}
    assert {len(update.terms) for update in applied.plan.updates} == {3}


def test_several_patches_are_rounded_once(tmp_path: Path) -> None:
    """One after the other each rounds to bf16; together the sum does, once."""
    base = tiny.llama().to(torch.bfloat16)
    adapters = _adapters(base, tmp_path, *[FAMILIES["llama"].config() for _ in range(4)])
    exact = _sum(base, dict.fromkeys(adapters, 1.0))
    together, one_by_one = copy.deepcopy(base), copy.deepcopy(base)
    portllm.apply(together, adapters)
    for adapter in adapters:
        portllm.apply(one_by_one, adapter)
    rounded = {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}
    numbers = sum(t.numel() for t in rounded.values())
    wrong = {
        label: sum(int((state(model)[n] != t).sum()) for n, t in rounded.items()) / numbers
        for label, model in (("together", together), ("one by one", one_by_one))
    }
    assert wrong["together"] < 1e-3 < 0.1 < wrong["one by one"]


def test_patches_of_different_reach_and_methods(tmp_path: Path) -> None:
    base = tiny.llama()
    first, second, third = _adapters(
        base,
        tmp_path,
        FAMILIES["llama"].config(target_modules=["q_proj", "embed_tokens"]),
        FAMILIES["llama"].config(target_modules=["q_proj", "up_proj"], use_dora=True),
        FAMILIES["llama"].config(target_modules=["v_proj"], modules_to_save=["lm_head"]),
    )
    live = copy.deepcopy(base)
    portllm.apply(live, [first, (second, 0.5), (third, 0.25)])
    assert_close(state(live), _sum(base, {first: 1.0, second: 0.5, third: 0.25}), 1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 3.0])
def test_scale(scale: float, tmp_path: Path) -> None:
    """For factors a factor; for DoRA, replaced modules, biases and tokens the share of the way."""
    base = tiny.bert()
    config = FAMILIES["bert"].config(
        target_modules=["query"], use_dora=True, bias="lora_only", modules_to_save=["classifier"],
        trainable_token_indices={"word_embeddings": [3, 1]},
    )  # fmt: skip
    (adapter,) = _adapters(base, tmp_path, config)
    live = copy.deepcopy(base)
    portllm.apply(live, adapter, scale)
    assert_close(state(live), _sum(base, {adapter: scale}), 1e-5)
    assert bool(changed(state(base), state(live))) == (scale != 0)


def test_all_forms_of_a_patch_are_the_same(tmp_path: Path) -> None:
    base = tiny.llama()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["llama"].config())
    forms: list[Any] = [
        adapter,
        str(adapter),
        Patch.load(adapter),
        [adapter],
        [(Patch.load(adapter), 1.0)],
        ((str(adapter), 1),),
    ]
    results = []
    for form in forms:
        live = copy.deepcopy(base)
        portllm.apply(live, form)
        results.append(state(live))
    assert all(not changed(results[0], other) for other in results[1:])
    assert changed(state(base), results[0])


# -- taking off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["handle", "function"])
def test_remove_comes_back_within_one_rounding(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    base = tiny.llama().to(dtype)
    config = FAMILIES["llama"].config
    patches = list(zip(_adapters(base, tmp_path, config(), config(r=2)), (0.5, -1.0), strict=True))
    live = copy.deepcopy(base)
    applied = portllm.apply(live, patches, 0.3)
    merged = state(live)
    assert len(changed(state(base), merged)) == 14
    if way == "handle":
        applied.remove()
    else:
        portllm.remove(live, patches, 0.3)
    # Half a unit was lost when the sum was rounded, half a unit of the result may be lost now, and the fp32 sums.
    unit = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}[dtype]
    slack = 2.0**-20 if dtype != torch.float64 else 2.0**-48
    for name, old in _wide(base).items():
        largest = torch.maximum(old.abs(), merged[name].double().abs())
        assert bool(((state(live)[name].double() - old).abs() <= largest * unit + slack).all()), name


def test_what_cannot_be_taken_off_is_refused_before_a_write(tmp_path: Path) -> None:
    base = tiny.llama()
    config = FAMILIES["llama"].config
    adapters = _adapters(base, tmp_path, config(use_dora=True), config(modules_to_save=["lm_head"]))
    for adapter in adapters:
        live = copy.deepcopy(base)
        applied = portllm.apply(live, adapter)
        merged = state(live)
        for take_off in (applied.remove, lambda live=live, adapter=adapter: portllm.remove(live, adapter)):
            with pytest.raises(PlanError, match="cannot be subtracted"):
                take_off()
        assert not changed(merged, state(live))


def test_remove_keeps_what_came_on_later(tmp_path: Path) -> None:
    base = tiny.llama()
    first, second = _adapters(base, tmp_path, *[FAMILIES["llama"].config() for _ in range(2)])
    live = copy.deepcopy(base)
    applied = portllm.apply(live, first)
    portllm.apply(live, second)
    applied.remove()
    assert_close(state(live), _sum(base, {second: 1.0}), 1e-5)


# -- kinds of targets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType])
def test_state_dicts_are_patched_in_place(kind: Any, tmp_path: Path) -> None:
    base = tiny.qwen3()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["qwen3"].config())
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    target = kind({**tensors, "step": 3})
    facts = {name: (id(t), t.data_ptr()) for name, t in tensors.items()}
    portllm.apply(target, adapter)
    assert facts == {name: (id(target[name]), target[name].data_ptr()) for name in tensors}
    truth = state(peft_merged(base, adapter, dtype=torch.float64))
    assert_close({name: target[name] for name in tensors}, {name: truth[name] for name in tensors})
    assert target["step"] == 3


def test_a_state_dict_that_ties_is_patched_once(tmp_path: Path) -> None:
    base = tiny.qwen3()
    config = FAMILIES["qwen3"].config(target_modules=["embed_tokens"])
    adapter = save_adapter(base, config, tmp_path / "adapter", save_embedding_layers=False)
    target = base.state_dict()
    before, truth = state(base), state(peft_merged(base, adapter, dtype=torch.float64))
    portllm.apply(target, adapter)
    assert_close(target, truth)
    assert changed(before, target) == {"lm_head.weight", "model.embed_tokens.weight"}
    assert target["lm_head.weight"].data_ptr() == target["model.embed_tokens.weight"].data_ptr()

    untied = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"]
    portllm.apply(untied, adapter, tied="untie")
    assert torch.equal(untied["lm_head.weight"], base.get_input_embeddings().weight)
    assert not torch.equal(untied["model.embed_tokens.weight"], untied["lm_head.weight"])
    fixed = MappingProxyType(dict(base.state_dict()))
    with pytest.raises(PlanError, match="needs a mapping that can be changed"):
        portllm.apply(fixed, adapter, tied="untie")


class Shared(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def _patch(modules: dict[str, tuple[int, int]], **settings: Any) -> Patch:
    tensors = {}
    for module, (rows, columns) in modules.items():
        tensors[f"{module}.lora_A.weight"] = torch.randn(2, columns)
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 2)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [m.rpartition(".")[2] for m in modules]}
    return Patch.from_tensors(tensors, {**config, **settings})


@pytest.mark.parametrize("name, other", [("first", "second"), ("second", "first")])
def test_a_module_under_two_names(name: str, other: str) -> None:
    model = Shared()
    patch = _patch({name: (5, 6)})
    delta = patch.tensors[f"{name}.lora_B.weight"] @ patch.tensors[f"{name}.lora_A.weight"]
    before = model.first.weight.detach().clone()
    once = copy.deepcopy(model)
    portllm.apply(once, patch)
    assert once.first is once.second
    torch.testing.assert_close(once.first.weight.detach(), before + delta)

    portllm.apply(model, patch, tied="untie")
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), before + delta)
    assert torch.equal(model.get_submodule(other).weight, before)
    assert model.first.bias is model.second.bias


def test_modules_wrapped_by_torch_compile_and_data_parallel(tmp_path: Path) -> None:
    base = tiny.llama()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["llama"].config())
    truth = state(peft_merged(base, adapter, dtype=torch.float64))
    for wrap in (torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m))):
        live = copy.deepcopy(base)
        portllm.apply(wrap(live), adapter)
        assert_close(state(live), truth)


def test_views_transposes_and_other_strides(tmp_path: Path) -> None:
    """A weight may be a view into a larger buffer, or stored column by column."""
    base = tiny.llama()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["llama"].config())
    truth = state(peft_merged(base, adapter, dtype=torch.float64))
    target = state(base)
    name = "model.layers.0.self_attn.k_proj.weight"
    columnwise, buffer = "model.layers.1.mlp.up_proj.weight", torch.full((40, 50), 7.0)
    target[columnwise] = target[columnwise].T.contiguous().T
    buffer[3:19, 5:37] = target[name]
    target[name] = buffer[3:19, 5:37]
    portllm.apply(target, adapter)
    assert_close(target, truth)
    assert target[columnwise].stride() == (1, target[columnwise].shape[0])
    buffer[3:19, 5:37] = 7.0
    assert bool((buffer == 7.0).all())


def test_inference_tensors_and_no_grad(tmp_path: Path) -> None:
    (adapter,) = _adapters(tiny.llama(), tmp_path, FAMILIES["llama"].config())
    with torch.inference_mode():
        base = tiny.llama()
    live = dict(base.named_parameters())
    before = {name: tensor.clone() for name, tensor in live.items()}
    portllm.apply(base, adapter)
    assert len(changed(before, dict(base.named_parameters()))) == 14
    leaf = tiny.llama()
    portllm.apply(leaf, adapter)
    assert all(p.is_leaf and p.grad_fn is None and p.requires_grad for p in leaf.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_of_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny.llama().to(dtype)
    (adapter,) = _adapters(base, tmp_path, FAMILIES["llama"].config())
    live = copy.deepcopy(base)
    portllm.apply(live, adapter)
    assert_close(
        state(live), state(peft_merged(base, adapter, dtype=torch.float64)), 1e-12 if dtype == torch.float64 else 1e-3
    )


def test_the_default_dtype_and_device_do_not_matter(tmp_path: Path) -> None:
    base = tiny.llama()
    config = FAMILIES["llama"].config(use_dora=True, modules_to_save=["lm_head"], trainable_token_indices=[1])
    (adapter,) = _adapters(base, tmp_path, config)
    plain, other = copy.deepcopy(base), copy.deepcopy(base)
    portllm.apply(plain, adapter)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        portllm.apply(other, adapter)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert not changed(state(plain), state(other))


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, 3, "model", [torch.zeros(2)]])
def test_other_targets_are_refused(target: Any) -> None:
    with pytest.raises(PlanError, match=f"cannot patch a {type(target).__name__}"):
        portllm.apply(target, _patch({"q_proj": (2, 2)}))


def test_no_patch_is_refused() -> None:
    with pytest.raises(PlanError, match="no patch was given"):
        portllm.apply({}, [])


def test_expanded_tensors_are_refused() -> None:
    target = {"q_proj.weight": torch.zeros(1, 4).expand(3, 4)}
    with pytest.raises(PlanError, match=r"q_proj.weight is an expanded tensor"):
        portllm.apply(target, _patch({"q_proj": (3, 4)}))


def test_options_are_checked_before_a_write(tmp_path: Path) -> None:
    base = tiny.llama()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["llama"].config())
    before = state(base)
    for options in ({"tied": "never"}, {"expert_layout": "square"}):
        with pytest.raises(PlanError):
            portllm.apply(base, adapter, **options)
    with pytest.raises(portllm.BackendError):
        portllm.apply(base, adapter, backend="none such")
    assert not changed(before, state(base))


def test_a_patch_of_which_one_module_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    base = tiny.llama()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["llama"].config())
    tensors = load_file(adapter / "adapter_model.safetensors")
    last = max(k for k in tensors if "lora_B" in k)
    tensors[last] = torch.cat([tensors[last], tensors[last]])
    patch = Patch.from_tensors(tensors, Patch.load(adapter).config)
    before = state(base)
    with pytest.raises(PlanError, match=r"lora_B @ lora_A is"):
        portllm.apply(base, patch)
    assert not changed(before, state(base))


def test_plan_writes_nothing_and_says_what_apply_does(tmp_path: Path) -> None:
    base = tiny.gemma2()
    (adapter,) = _adapters(base, tmp_path, FAMILIES["gemma2"].config())
    before = state(base)
    plan = portllm.plan(base, adapter, 2.0)
    assert not changed(before, state(base))
    applied = portllm.apply(base, adapter, 2.0)
    assert applied.plan.describe() == plan.describe()
    assert applied.target is base
    assert changed(before, state(base)) == set(plan.tensors)


def test_removing_what_was_never_untied_is_an_error() -> None:
    embed = torch.randn(6, 4)
    model = {"model.embed_tokens.weight": embed, "lm_head.weight": embed}
    factors = {"lm_head.lora_A.weight": torch.randn(2, 4), "lm_head.lora_B.weight": torch.randn(6, 2)}
    patch = portllm.Patch.from_tensors(factors, {"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"]})
    before = embed.clone()
    with pytest.raises(portllm.PlanError, match=r"lm_head\.weight is still tied"):
        portllm.remove(model, patch, tied="untie")
    assert torch.equal(embed, before)
