"""adapter_config.json: module names match as in PEFT's own functions, and wrong types are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from portllm import PatchError, UnsupportedPatchError
from portllm.config import AdapterConfig, _pattern_key

SEGMENTS = [
    "model", "layers", "h", "blocks", "0", "1", "12", "attn", "q_proj", "v_proj", "qkv_proj", "proj", "experts", "w1",
    "lm_head", "embed_tokens",
]  # fmt: skip
REGEXES = [
    r".*\.(q|v)_proj", r".*proj", r"model\.layers\.[01]\..*", r"(?!.*attn).*w1", r"q_proj", r"layers.\d+.attn", r".*",
    r"model\.layers\.(?P<idx>\d+)\.attn\.(?:q|qkv)_proj", r"^model.*$", r"h|.*lm_head",
]  # fmt: skip
names = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=7).map(".".join)
suffixes = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=3).map(".".join)
lists = st.lists(suffixes, max_size=4)
regexes = st.sampled_from(REGEXES)
patterns = st.one_of(suffixes, regexes, suffixes.map(lambda s: f"^{s}"), suffixes.map(lambda s: f".*{s}"))


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """The settings that choose modules, as they stand in a file."""
    chosen: dict[str, Any] = {"target_modules": draw(st.one_of(lists.filter(bool), regexes))}
    chosen["exclude_modules"] = draw(st.one_of(st.none(), lists, regexes))
    chosen["modules_to_save"] = draw(st.one_of(st.none(), st.lists(suffixes, max_size=2)))
    if draw(st.booleans()):
        chosen["layers_to_transform"] = draw(st.one_of(st.integers(0, 12), st.lists(st.sampled_from([0, 1, 12]))))
        pattern = st.sampled_from(["layers", "h", "blocks", "(layers|h)", "(?:layers|blocks)", r"\w+"])
        chosen["layers_pattern"] = draw(st.one_of(st.none(), pattern, st.lists(pattern, max_size=3)))
    return chosen


def read(**settings: Any) -> AdapterConfig:
    return AdapterConfig.from_dict({"peft_type": "LORA", **settings})


@settings(max_examples=600, deadline=None)
@given(choices(), st.lists(names, min_size=1, max_size=6))
def test_targets_are_those_of_peft(chosen: dict[str, Any], modules: list[str]) -> None:
    theirs = SimpleNamespace(target_parameters=None, **chosen)
    ours = read(**chosen)
    for module in modules:
        assert ours.targets_module(module) == bool(check_target_module_exists(theirs, module)), module


@given(names, lists)
def test_no_target_modules_but_target_parameters(module: str, parameters: list[str]) -> None:
    theirs = SimpleNamespace(target_modules=None, target_parameters=["x.y", *parameters])
    ours = read(target_parameters=["x.y", *parameters])
    assert not check_target_module_exists(theirs, module)
    assert not ours.targets_module(module)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(patterns, st.integers(1, 64), max_size=5), names, st.integers(1, 64), st.booleans())
def test_rank_and_scaling_follow_peft_s_pattern_rule(
    pattern: dict[str, int], module: str, default: int, use_rslora: bool
) -> None:
    key = get_pattern_key(pattern.keys(), module)
    assert (_pattern_key(pattern, module) or module) == key
    ours = read(r=default, lora_alpha=3, rank_pattern=pattern, use_rslora=use_rslora)
    rank = pattern.get(key, default)
    assert ours.rank(module) == rank
    assert ours.scaling(module) == pytest.approx(3 / (math.sqrt(rank) if use_rslora else rank))
    ours = read(r=5, lora_alpha=default, alpha_pattern=pattern)
    assert ours.scaling(module) == pytest.approx(pattern.get(key, default) / 5)


@given(st.lists(suffixes, max_size=4), names)
def test_target_parameters_match_as_in_peft(parameters: list[str], name: str) -> None:
    """PEFT: the key itself, or its end after a dot."""
    theirs = name in parameters or any(name.endswith(f".{p}") for p in parameters)
    ours = read(target_parameters=parameters)
    assert ours.targets_parameter(name) == theirs
    module, dot, _ = name.rpartition(".")
    if dot:
        assert (name in ours.parameters_of(module)) == theirs


@pytest.mark.parametrize("value", ["all-linear", "ALL-LINEAR"])
def test_all_linear_covers_every_module_but_the_excluded(value: str) -> None:
    config = read(target_modules=value, exclude_modules=["v_proj"], modules_to_save=["score"])
    assert config.selects_by_kind
    assert config.targets_module("model.layers.0.q_proj")
    assert not config.targets_module("model.layers.0.v_proj")
    assert not config.targets_module("score")


def test_token_indices_of_a_list_and_of_a_dictionary() -> None:
    assert read(trainable_token_indices=[3, 1]).token_indices("model.embed_tokens") == (3, 1)
    config = read(trainable_token_indices={"embed_tokens": [2], "lm_head": [4, 5]})
    assert config.token_indices("model.embed_tokens") == (2,)
    assert config.token_indices("lm_head") == (4, 5)
    assert config.token_indices("wte") is None
    assert read().token_indices("model.embed_tokens") is None


def test_defaults_are_those_of_peft() -> None:
    import peft

    theirs, ours = peft.LoraConfig(), read()
    for name in ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias", "fan_in_fan_out"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_every_setting_that_peft_writes_is_known(tmp_path: Path) -> None:
    """A new release of PEFT with a new setting shows here first: all of its defaults must be readable."""
    import peft

    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    config = AdapterConfig.load(tmp_path / "adapter_config.json")
    assert config.raw == written
    from portllm.config import _CONSUMED, _NEUTRAL, _UNSUPPORTED

    assert set(written) <= _CONSUMED | _NEUTRAL | set(_UNSUPPORTED)


@pytest.mark.parametrize(
    "bad",
    [
        {"r": 0}, {"r": -1}, {"r": "8"}, {"r": True}, {"r": 2.5}, {"lora_alpha": "x"}, {"lora_alpha": True},
        {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"use_rslora": 1}, {"use_dora": "yes"},
        {"bias": "some"}, {"bias": 1}, {"fan_in_fan_out": "no"}, {"rank_pattern": ["q"]}, {"rank_pattern": {"q": 0}},
        {"rank_pattern": {"q": 1.5}}, {"rank_pattern": {"q": True}}, {"alpha_pattern": {"q": "x"}},
        {"alpha_pattern": {"q": float("inf")}}, {"alpha_pattern": {"q": True}}, {"rank_pattern": {"(": 1}},
        {"alpha_pattern": {"[": 1}}, {"target_modules": [1]}, {"target_modules": {"q": 1}}, {"target_modules": "("},
        {"exclude_modules": "["}, {"exclude_modules": 3}, {"layers_to_transform": "1"}, {"layers_to_transform": [-1]},
        {"layers_to_transform": [1.5]}, {"layers_pattern": "("}, {"layers_pattern": [2]}, {"target_parameters": [1]},
        {"modules_to_save": "("}, {"modules_to_save": [None]}, {"trainable_token_indices": [-1]},
        {"trainable_token_indices": {"e": "x"}}, {"trainable_token_indices": "x"}, {"ensure_weight_tying": 1},
        {"base_model_name_or_path": 3}, {"peft_version": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_values_are_named(bad: dict[str, Any]) -> None:
    (name,) = bad
    with pytest.raises(PatchError, match=f"setting {name}"):
        read(**bad)


@pytest.mark.parametrize(
    "good", [{"alpha_pattern": {"q": -2}}, {"alpha_pattern": {"q": 0.5}}, {"lora_alpha": 0.5}], ids=str
)
def test_any_finite_alpha_is_read(good: dict[str, Any]) -> None:
    config = read(r=2, **good)
    assert config.scaling("q") == (good.get("lora_alpha") or good["alpha_pattern"]["q"]) / 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "cannot be read as JSON"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"{}", "peft_type is None.*written by PEFT"),
        (b'{"peft_type": "LORA", "r": "x"}', "setting r='x' must be a positive integer"),
    ],
    ids=range(6),
)
def test_broken_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(content)
    with pytest.raises(PatchError, match=message) as caught:
        AdapterConfig.load(file)
    assert str(file) in str(caught.value)
    with pytest.raises(PatchError, match="cannot be read"):
        AdapterConfig.load(tmp_path / "none.json")


def test_ignored_settings_must_be_named_one_by_one() -> None:
    raw = {"peft_type": "LORA", "new_one": 1, "new_two": [2]}
    with pytest.raises(UnsupportedPatchError, match="new_two"):
        AdapterConfig.from_dict(raw, ignore_settings=("new_one",))
    assert AdapterConfig.from_dict(raw, ignore_settings=("new_one", "new_two")).raw == raw
    assert read(new_one=None, new_two={}, new_three=False).r == 8
