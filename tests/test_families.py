"""Nine families: portllm in memory and on disk against PEFT's merge_and_unload, in fp32 and in bf16."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import portllm
import portllm.checkpoint

from .families import FAMILIES, Family, assert_close, changed, peft_merged, save_adapter, state

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))


@families
def test_fp32_logits_and_weights_are_those_of_peft(
    family: Family, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    base = family.build()
    adapter = save_adapter(base, family.config(), tmp_path / "adapter")
    live = copy.deepcopy(base)
    portllm.apply(live, adapter)
    merged = peft_merged(base, adapter)
    difference = float((family.logits(live) - family.logits(merged)).abs().max())
    record_property("logits", difference)
    print(f"\n{family.name}: logits differ from PEFT's by {difference:.1e}")
    assert difference < 1e-5
    assert float((family.logits(live) - family.logits(base)).abs().max()) > 0.1
    truth = peft_merged(base, adapter, dtype=torch.float64)
    assert_close(state(live), state(truth))
    assert changed(state(base), state(live)) == changed(state(base), state(truth))


def _raw(directory: Path) -> dict[str, dict[str, bytes]]:
    """Shard name -> tensor name -> bytes."""
    shards: dict[str, dict[str, bytes]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shards[path.name] = {
                name: file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() for name in names
            }
    return shards


@families
@pytest.mark.parametrize(
    "dtype, backend", [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "torch")], ids=str
)
def test_on_disk_gives_the_bits_of_in_memory(family: Family, dtype: torch.dtype, backend: str, tmp_path: Path) -> None:
    base = family.build().to(dtype)
    adapter = save_adapter(base, family.config(), tmp_path / "adapter")
    base.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    live = copy.deepcopy(base)
    portllm.apply(live, adapter, backend=backend)
    report = portllm.apply_checkpoint(tmp_path / "model", adapter, tmp_path / "out", backend=backend)
    again = type(base).from_pretrained(tmp_path / "out", dtype=dtype)
    assert not changed(state(live), state(again))

    before, after = _raw(tmp_path / "model"), _raw(tmp_path / "out")
    assert {shard: list(tensors) for shard, tensors in before.items()} == {s: list(t) for s, t in after.items()}
    assert len(before) > 1
    touched = {n for tensors in before.values() for n in tensors} - {
        name for shard, tensors in before.items() for name, data in tensors.items() if after[shard][name] == data
    }
    _, plan = portllm.checkpoint.plan_checkpoint(tmp_path / "model", adapter)
    assert touched == set(plan.tensors)
    assert report.tensors_updated == len(touched)
    for name in ("model.safetensors.index.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, tensors in after.items() for name in tensors}


@families
def test_parameters_keep_identity_memory_and_hooks(family: Family, tmp_path: Path) -> None:
    base = family.build()
    adapter = save_adapter(base, family.config(), tmp_path / "adapter")
    calls: list[str] = []
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 2 == 0)
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, i=i: calls.append(f"grad {i}"))
    base.register_forward_hook(lambda *_: calls.append("forward"))
    facts = {n: (id(p), p.data_ptr(), p.stride(), p.requires_grad, p.grad) for n, p in parameters.items()}
    modules = {name: id(module) for name, module in base.named_modules()}
    before = state(base)

    portllm.apply(base, adapter)

    assert changed(before, state(base))
    after = dict(base.named_parameters(remove_duplicate=False))
    assert facts == {n: (id(p), p.data_ptr(), p.stride(), p.requires_grad, p.grad) for n, p in after.items()}
    assert modules == {name: id(module) for name, module in base.named_modules()}
    ids = torch.arange(8).reshape(1, 8)
    base(**dict.fromkeys(family.fields, ids)).logits.square().sum().backward()
    assert "forward" in calls
    assert any(call.startswith("grad") for call in calls)


def _half_ulp(exact: Tensor) -> Tensor:
    """Half a unit in the last place of bf16 (8 significant bits) at ``exact``."""
    _, exponent = torch.frexp(exact.abs().clamp_min(2.0**-126))
    return torch.ldexp(torch.ones_like(exact), exponent - 9)


def _fp32_error(live: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """What summing ``W + s * B @ A`` in fp32 may be off by, for each weight: (r + 3) roundings of all magnitudes."""
    tensors = dict(live.state_dict())
    errors = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
    for update in portllm.plan(live, adapter).updates:
        magnitude = update.region.view(tensors[update.name]).double().abs()
        for term in update.terms:
            magnitude = magnitude + abs(term.scaling) * (term.lora_B.double().abs() @ term.lora_A.double().abs())
        rank = sum(term.rank for term in update.terms)
        update.region.view(errors[update.name]).copy_(magnitude * (rank + 3) * 2.0**-24)
    return errors


@families
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_weights_are_rounded_once(
    family: Family, factors: torch.dtype, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """Each weight is half an ulp, and the fp32 sum's error, from float64's; PEFT's error is printed beside it."""
    base = family.build().to(torch.bfloat16)
    model = peft.get_peft_model(copy.deepcopy(base), family.config(), autocast_adapter_dtype=factors != torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(tmp_path / "adapter")
    allowed = _fp32_error(base, tmp_path / "adapter")
    ours = {}
    for backend in ("auto", "torch"):
        live = copy.deepcopy(base)
        portllm.apply(live, tmp_path / "adapter", backend=backend)
        ours[backend] = state(live)
    exact = state(peft_merged(base, tmp_path / "adapter", dtype=torch.float64))
    wrapped: Any = peft.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "adapter", autocast_adapter_dtype=factors != torch.bfloat16
    )
    peers = state(wrapped.merge_and_unload())
    names = changed(state(base), exact)
    assert names == changed(state(base), ours["auto"]) == changed(state(base), ours["torch"])
    figures = {}
    for label, weights in (("portllm", ours["auto"]), ("in plain torch", ours["torch"]), ("PEFT", peers)):
        worst = wrong = total = 0.0
        for name in names:
            error, half = (weights[name].double() - exact[name]).abs(), _half_ulp(exact[name])
            if label != "PEFT":
                assert bool((error <= half + allowed[name]).all()), name
            worst = max(worst, float((error / (2 * half)).max()))
            wrong += float((error > half + allowed[name]).sum())
            total += error.numel()
        figures[label] = f"{worst:.2f} ulp, {100 * wrong / total:.2f} % wrong"
        record_property(label, figures[label])
    kind = str(factors).removeprefix("torch.")
    print(f"\n{family.name}, {kind} factors: " + "; ".join(f"{k} {v}" for k, v in figures.items()))
