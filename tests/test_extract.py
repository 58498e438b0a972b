"""extract: how near its factors come to the best ones, what it refuses, and that PEFT loads the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portllm
from portllm import cli
from portllm.errors import PlanError, PortllmError
from portllm.svd import leading, residual

from . import tiny

BF16, FP32 = torch.bfloat16, torch.float32


def tuned_from(
    base: Mapping[str, Tensor], rank: int = 4, size: float = 0.05
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base with a low-rank difference on each projection, and the differences in fp64."""
    result, deltas = dict(base), {}
    for module in tiny.MODULES:
        weight = base[f"{module}.weight"]
        delta = size * torch.randn(len(weight), rank).double() @ torch.randn(rank, weight.shape[1]).double()
        deltas[f"{module}.weight"] = delta
        result[f"{module}.weight"] = (weight.double() + delta).to(weight.dtype)
    return result, deltas


def delta_of(patch: portllm.Patch, module: str) -> Tensor:
    entry = next(e for e in patch.entries if getattr(e, "module", None) == module)
    return entry.scaling * entry.lora_B.double() @ entry.lora_A.double()  # type: ignore[union-attr]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("shape", [(1, 63), (63, 1), (200, 300), (1000, 63), (400, 1000), (700, 700)], ids=str)
@pytest.mark.parametrize("kind", ["true rank", "noise", "decaying"])
def test_error_is_within_two_percent_of_the_best(shape: tuple[int, int], kind: str) -> None:
    m, n = shape
    rank = 8
    if kind == "true rank":
        matrix = torch.randn(m, rank) @ torch.randn(rank, n)
    elif kind == "noise":
        matrix = torch.randn(m, n)
    else:
        k = min(m, n)
        left, right = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
        matrix = left * torch.arange(1, k + 1) ** -0.7 @ right.T
    best = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    found = leading(matrix, rank)
    lora_A, lora_B = found.factors(rank)
    error = (matrix.double() - lora_B.double() @ lora_A.double()).norm()
    floor = 2e-6 * matrix.norm()
    assert error <= 1.02 * best + floor
    assert residual(matrix, found, len(found.values)) == pytest.approx(float(error), rel=1e-2, abs=float(floor))
    assert (found.values[:-1] >= found.values[1:]).all()


def test_a_zero_matrix_has_no_values() -> None:
    found = leading(torch.zeros(50, 70), 4)
    assert found.norm == 0
    assert (found.values == 0).all()
    assert all(f.isfinite().all() for f in found.factors(4))


@pytest.mark.parametrize(("dtype", "bound"), [(FP32, 1e-6), (BF16, 1e-3)], ids=str)
def test_a_merged_adapter_comes_back(dtype: torch.dtype, bound: float) -> None:
    """Merged by PEFT itself; in bf16 the merged weights have lost the rest, so the difference is what is compared."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(torch.seed() % 2**31)
    model = nn.Sequential(nn.Linear(300, 200, bias=False), nn.Linear(200, 260, bias=False)).to(dtype)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "1"], init_lora_weights=False))
    merged = {name: tensor.detach() for name, tensor in wrapped.merge_and_unload().state_dict().items()}
    # bf16 rounds the merged weights, and that noise has full rank: keep all of the difference.
    result = portllm.extract(base, merged, rank=4 if dtype == FP32 else 200, stamp=False)
    for name in base:
        assert (
            relative(delta_of(result.patch, name.removesuffix(".weight")), merged[name].double() - base[name].double())
            < bound
        )


def test_from_disk_and_back(tmp_path: Path) -> None:
    named = tiny.tensors(FP32)
    tuned, deltas = tuned_from(named)
    base, other = tiny.write_model(tmp_path / "base", named), tiny.write_model(tmp_path / "tuned", tuned, shards=1)
    result = portllm.extract(base, other, rank=4)
    assert {w.name for w in result.weights} == set(deltas)
    for w in result.weights:
        assert w.rank == 4
        assert w.relative_error < 1e-5
        assert w.relative_size == pytest.approx(float(deltas[w.name].norm() / named[w.name].double().norm()), rel=1e-4)
    result.patch.save(tmp_path / "patch")
    assert portllm.Patch.load(tmp_path / "patch").metadata["portllm.base"] == result.patch.metadata["portllm.base"]
    applied = {name: tensor.clone() for name, tensor in named.items()}
    portllm.apply(applied, tmp_path / "patch")
    for name, tensor in tuned.items():
        torch.testing.assert_close(applied[name], tensor, rtol=1e-5, atol=1e-5)


def test_the_difference_is_not_rounded_to_the_storage_dtype() -> None:
    base = {"a.weight": torch.full((64, 64), 256.0, dtype=BF16)}
    tuned = {"a.weight": torch.full((64, 64), 257.0, dtype=FP32)}
    result = portllm.extract(base, tuned, rank=1, stamp=False)
    torch.testing.assert_close(delta_of(result.patch, "a"), torch.ones(64, 64).double(), rtol=1e-5, atol=0)


def test_energy_takes_the_least_rank_that_keeps_it() -> None:
    values = torch.tensor([8.0, 4.0, 2.0, 1.0])
    left, right = torch.linalg.qr(torch.randn(300, 4))[0], torch.linalg.qr(torch.randn(200, 4))[0]
    base = {"a.weight": torch.randn(300, 200)}
    tuned = {"a.weight": base["a.weight"] + left * values @ right.T}
    for rank in (1, 2, 3, 4):
        energy = float(values[:rank].square().sum() / values.square().sum()) - 1e-4
        assert portllm.extract(base, tuned, energy=energy, stamp=False).weights[0].rank == rank
    wide = {"a.weight": base["a.weight"] + torch.randn(300, 200)}
    assert portllm.extract(base, wide, energy=0.999, max_rank=40, stamp=False).weights[0].rank == 40


def test_a_budget_goes_where_it_keeps_most() -> None:
    base = {f"{name}.weight": torch.randn(100, 100) for name in "abc"}
    tuned = dict(base)
    for name, rank, size in (("a", 2, 1.0), ("b", 6, 0.5), ("c", 3, 1e-3)):
        tuned[f"{name}.weight"] = base[f"{name}.weight"] + size * torch.randn(100, rank) @ torch.randn(rank, 100)
    result = portllm.extract(base, tuned, budget=200 * 8, stamp=False)
    assert {w.name[0]: w.rank for w in result.weights} == {"a": 2, "b": 6, "c": 0}
    assert result.patch.num_parameters == 200 * 8
    assert result.patch.config.rank("b") == 6
    assert result.patch.config.scaling("b") == 1.0
    assert not any(getattr(e, "module", "") == "c" for e in result.patch.entries)
    with pytest.raises(PortllmError, match="too small for a single rank, which takes 200"):
        portllm.extract(base, tuned, budget=199, stamp=False)


def test_other_changes_are_an_error_unless_ignored_or_saved(tmp_path: Path) -> None:
    named = tiny.tensors(FP32)
    tuned, _ = tuned_from(named)
    tuned["model.embed_tokens.weight"] = named["model.embed_tokens.weight"] + 1
    tuned["model.layers.1.input_layernorm.weight"] = named["model.layers.1.input_layernorm.weight"] * 2
    with pytest.raises(PlanError, match=r"embed_tokens.weight, model.layers.1.input_layernorm.weight changed"):
        portllm.extract(named, tuned, rank=4, stamp=False)
    ignored = portllm.extract(named, tuned, rank=4, rest="ignore", stamp=False)
    assert set(ignored.ignored) == {"model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"}
    saved = portllm.extract(named, tuned, rank=4, rest="save", stamp=False)
    assert set(saved.saved) == set(ignored.ignored)
    saved.patch.save(tmp_path / "patch")
    applied = {name: tensor.clone() for name, tensor in named.items()}
    portllm.apply(applied, tmp_path / "patch")
    for name, tensor in tuned.items():
        torch.testing.assert_close(applied[name], tensor, rtol=1e-5, atol=1e-5)


def test_peft_loads_what_was_extracted(tmp_path: Path) -> None:
    """A Llama with changed projections, biases, norms and embeddings: PEFT's merge gives the tuned model."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    base, tuned = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.dim() == 2 and "proj" in name:
                parameter += 0.05 * torch.randn(len(parameter), 3) @ torch.randn(3, parameter.shape[1])
            elif "embed" in name or "norm" in name or "bias" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    result = portllm.extract(base, tuned, rank=3, rest="save", stamp=False)
    result.patch.save(tmp_path / "patch")
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        want = tuned(ids).logits
        got = PeftModel.from_pretrained(base, tmp_path / "patch").merge_and_unload()(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_conv1d_weights_lie_transposed(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=1, n_head=2)
    base, tuned = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(config).eval()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                parameter += torch.randn(len(parameter), 2) @ torch.randn(2, parameter.shape[1])
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    for pair in ((base, tuned), (tmp_path / "base", tmp_path / "tuned")):
        result = portllm.extract(*pair, rank=2)
        assert result.patch.config.fan_in_fan_out
        model = GPT2LMHeadModel(config)
        model.load_state_dict(base.state_dict())
        portllm.apply(model, result.patch)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter, tuned.get_parameter(name), rtol=1e-4, atol=1e-4)


def test_only_modules_that_changed_are_named() -> None:
    base = {f"layers.{i}.{p}.weight": torch.randn(20, 30) for i in range(3) for p in ("q_proj", "k_proj")}
    tuned = dict(base)
    for name in (
        "layers.0.q_proj.weight",
        "layers.1.q_proj.weight",
        "layers.2.q_proj.weight",
        "layers.1.k_proj.weight",
    ):
        tuned[name] = base[name] + torch.randn(20, 1) @ torch.randn(1, 30)
    result = portllm.extract(base, tuned, rank=2, stamp=False)
    assert result.patch.config.target_modules == ("q_proj", "layers.1.k_proj")
    assert set(result.unchanged) == {"layers.0.k_proj.weight", "layers.2.k_proj.weight"}
    only = portllm.extract(base, tuned, rank=2, target_modules=["k_proj"], rest="ignore", stamp=False)
    assert [w.name for w in only.weights] == ["layers.1.k_proj.weight"]
    assert len(only.ignored) == 3


def test_an_interrupted_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tiny.tensors(FP32)
    tuned, _ = tuned_from(named)
    base, other = tiny.write_model(tmp_path / "base", named), tiny.write_model(tmp_path / "tuned", tuned)
    whole = portllm.extract(base, other, rank=3)
    from portllm import extraction

    calls: list[str] = []
    decompose = extraction._decompose

    def counted(*arguments: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments[2])
        return decompose(*arguments)

    monkeypatch.setattr(extraction, "_decompose", counted)
    with pytest.raises(KeyboardInterrupt):
        portllm.extract(base, other, rank=3, work=tmp_path / "work")
    (next((tmp_path / "work").iterdir())).write_bytes(b"cut short")
    monkeypatch.setattr(extraction, "_decompose", lambda *a: (calls.append(a[2]), decompose(*a))[1])
    result = portllm.extract(base, other, rank=3, work=tmp_path / "work")
    assert len(calls) == len(tiny.MODULES) + 1
    for key, tensor in whole.patch.tensors.items():
        assert tiny.same_bits(tensor, result.patch.tensors[key])
    calls.clear()
    portllm.extract(base, other, rank=2, work=tmp_path / "work")
    assert len(calls) == len(tiny.MODULES), "another rank is another extraction"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), {"rank": 2}, "lacks lm_head.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), {"rank": 2}, "lacks extra"),
        (lambda t: t.update({f"{tiny.MODULES[0]}.weight": torch.zeros(3, 4)}), {"rank": 2}, r"is \[24, 16\].*\[3, 4\]"),
        (lambda t: t.update({f"{tiny.MODULES[0]}.weight": torch.full((24, 16), float("nan"))}), {"rank": 2}, "finite"),
        (lambda t: None, {"rank": 2}, "no weight of the tuned model"),
        (lambda t: None, {}, "exactly one of rank, energy and budget, not none"),
        (lambda t: None, {"rank": 2, "energy": 0.5}, "not rank and energy"),
        (lambda t: None, {"rank": 0}, "rank=0 must be at least 1"),
        (lambda t: None, {"energy": 1.5}, "energy=1.5"),
        (lambda t: None, {"rank": 2, "rest": "keep"}, "rest='keep'"),
        (lambda t: None, {"rank": 2, "dtype": torch.int8}, "dtype=torch.int8"),
        (lambda t: None, {"rank": 2, "target_modules": ["w_proj"]}, "selects no weight"),
        (lambda t: None, {"rank": 2, "target_modules": ["embed_tokens"]}, "is an embedding"),
        (lambda t: None, {"rank": 2, "work": "w"}, "in memory"),
    ],
)
def test_bad_input(change: Any, arguments: dict[str, Any], message: str) -> None:
    base = tiny.tensors(FP32)
    tuned = dict(base)
    change(tuned)
    with pytest.raises(PortllmError, match=message):
        portllm.extract(base, tuned, stamp=False, **arguments)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = tiny.tensors()
    tuned, _ = tuned_from(named)
    base, other = tiny.write_model(tmp_path / "base", named), tiny.write_model(tmp_path / "tuned", tuned)
    out = tmp_path / "patch"
    command = ["extract", str(base), str(other), "-o", str(out), "--rank", "4", "-q"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "q_proj" in printed
    assert f"{out}: 640 numbers" in printed
    assert cli.main(["check", str(out), str(base)]) == 0
    assert "is the base that the patch was made on" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*command, "--overwrite", "--json", "--dtype", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["weights"]) == len(tiny.MODULES)
    assert report["parameters"] == 640
    assert all(0 <= w["relative_error"] < 0.2 for w in report["weights"])
