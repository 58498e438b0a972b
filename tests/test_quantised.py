"""Quantised weights as libraries store them: found, patched live and on disk alike, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portllm
from portllm import CheckpointError, PlanError, apply_checkpoint, cli, copying, quant, requantise
from portllm.live import live_target
from portllm.quant import E4M3, E8M0
from portllm.quantised import find
from portllm.sharding import localise
from portllm.shards import Checkpoint

from .test_quant import Weight
from .tiny import read_model, same_bits, write_adapter, write_model

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ["torch", *(["cpu"] if requantise.unavailable_on_cpu() is None else [])]
NAME = "model.layers.0.mlp.up_proj"
OUT, IN = 270, 192
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}


@dataclass
class Format:
    """One format: the tensors of a random weight in it, and what they stand for.

    Attributes:
        tensors: with their names.
        weight: [OUT, IN] fp64.
        changes: names of those that a patch may change.
        config: quantization_config.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    changes: set[str]
    config: dict[str, Any]


def simple(
    scheme: str,
    dtype: torch.dtype,
    block: Any,
    scales: str,
    grid: Callable[[Tensor], Tensor] = lambda s: s,
    codes: str = "weight",
    **config: Any,
) -> Callable[[], Format]:
    def make() -> Format:
        made = Weight(scheme, dtype, block, (OUT, IN))
        width = IN if made.scheme.packing == "one" else IN // 2
        tensors = {f"{NAME}.{codes}": made.codes.view(OUT, width), f"{NAME}.{scales}": grid(made.scales).contiguous()}
        weight = made.weight()
        if scheme == "nvfp4" and codes == "weight":
            tensors[f"{NAME}.weight_scale_2"] = torch.tensor(made.global_scale)
        elif scheme == "nvfp4":
            tensors[f"{NAME}.weight_global_scale"] = 1 / torch.tensor([made.global_scale])
        return Format(tensors, weight, {f"{NAME}.{codes}", f"{NAME}.{scales}"}, config)

    return make


def scb() -> Format:
    made = Weight("int8", torch.float32, "row", (OUT, IN))
    tensors = {f"{NAME}.weight": made.codes.view(OUT, IN), f"{NAME}.SCB": made.scales.view(-1) * 127}
    return Format(tensors, made.weight(), {f"{NAME}.weight", f"{NAME}.SCB"}, {})


def nf4(nested: bool) -> Callable[[], Format]:
    def make() -> Format:
        made = Weight("nf4", torch.float32, (1, 64), (OUT, IN))
        name = f"{NAME}.weight"
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [OUT, IN]}
        tensors = {name: made.codes.view(-1, 1), f"{name}.quant_map": torch.tensor(quant.NF4_VALUES)}
        changes = {name, f"{name}.absmax"}
        if nested:
            groups = -(-made.scales.numel() // 256)
            table = (torch.rand(256) * 2 - 1).sort().values
            table[0], table[-1] = -1.0, 1.0
            coded = torch.randint(200, 256, (made.scales.numel(),), dtype=torch.uint8)
            outer = torch.rand(groups) * 0.005 + 0.005
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.02}
            tensors |= {f"{name}.absmax": coded, f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": table}
            changes |= {f"{name}.nested_absmax"}
            made.scales = table[coded.int()] * outer.repeat_interleave(256)[: len(coded)] + 0.02
        else:
            tensors[f"{name}.absmax"] = made.scales.view(-1)
        text = json.dumps(state).encode()
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
        return Format(tensors, made.weight(), changes, {"load_in_4bit": True})

    return make


f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
FORMATS: dict[str, Callable[[], Format]] = {
    "deepseek": simple("fp8_e4m3", f32, (128, 128), "weight_scale_inv", weight_block_size=[128, 128]),
    "deepseek, size not given": simple("fp8_e4m3", f32, (128, 128), "weight_scale_inv"),
    "blocks of another size": simple("fp8_e4m3", f32, (96, 48), "weight_scale_inv", weight_block_size=[96, 48]),
    "ue8m0": simple("fp8_e4m3", E8M0, (128, 128), "weight_scale_inv"),
    "mxfp8": simple("fp8_e4m3", torch.uint8, (1, 32), "weight_scale"),
    "per tensor, 0-D": simple("fp8_e4m3", f32, "tensor", "weight_scale", lambda s: s.view(())),
    "per tensor, 1-D": simple("fp8_e4m3", bf16, "tensor", "weight_scale", lambda s: s.view(1)),
    "per tensor, large": simple("fp8_e4m3", f32, "tensor", "weight_scale_inv", lambda s: s.view(())),
    "per channel": simple("fp8_e4m3", bf16, "row", "weight_scale"),
    "per channel, 1-D": simple("fp8_e4m3", f32, "row", "weight_scale", lambda s: s.view(-1)),
    "int8": simple("int8", f16, "row", "weight_scale"),
    "int8, groups": simple("int8", bf16, (1, 64), "weight_scale"),
    "bitsandbytes int8": scb,
    "nf4": nf4(False),
    "nf4, nested": nf4(True),
    "modelopt nvfp4": simple("nvfp4", E4M3, (1, 16), "weight_scale"),
    "compressed nvfp4": simple("nvfp4", E4M3, (1, 16), "weight_scale", codes="weight_packed"),
    "compressed mxfp4": simple("mxfp4", torch.uint8, (1, 32), "weight_scale", codes="weight_packed"),
}


def others() -> dict[str, Tensor]:
    return {
        "model.layers.0.input_layernorm.weight": torch.randn(IN).bfloat16(),
        "model.layers.0.mlp.up_proj.input_scale": torch.rand(()),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(40, IN).bfloat16(),
    }


def write_patch(path: Path, size: float, modules: tuple[str, ...] = (NAME,), out: int = OUT, rank: int = 4) -> Path:
    """A patch whose delta has elements of about ``size``."""
    named = {}
    for module in modules:
        named[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, IN)
        named[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out, rank) * size / math.sqrt(rank)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    return write_adapter(path, named, r=rank, lora_alpha=rank, target_modules=targets)


def delta_of(path: Path, module: str = NAME) -> Tensor:
    tensors = portllm.Patch.load(path).tensors
    lora_A, lora_B = (
        next(t for n, t in tensors.items() if f"{module}.lora_{which}" in n).double() for which in ("A", "B")
    )
    return lora_B @ lora_A


def weight_of(tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """What the tensors stand for now, as portllm reads it."""
    found = find(tensors, tensors.__getitem__, config)
    return portllm.quantised.read_weight(next(iter(found.weights.values())), tensors.__getitem__).double()


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_found_and_read(name: str) -> None:
    made = FORMATS[name]()
    tensors = made.tensors | others()
    found = find(tensors, tensors.__getitem__, made.config)
    assert [*found.weights] == [f"{NAME}.weight"]
    assert not found.problems
    assert set(found.weights[f"{NAME}.weight"].parts) == made.changes
    atol = 1e-6 * float(made.weight.std())
    torch.testing.assert_close(weight_of(tensors, made.config), made.weight, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_patch_is_in_the_weight_and_nothing_else_changes(name: str, backend: str, tmp_path: Path) -> None:
    made = FORMATS[name]()
    size = 0.3 * float(made.weight.std())
    tensors = made.tensors | others()
    patch = write_patch(tmp_path / "adapter", size)
    before = {n: t.clone() for n, t in tensors.items()}
    result = portllm.apply(_Model(tensors, made.config), patch, backend=backend)
    delta = delta_of(patch)
    change = weight_of(tensors, made.config) - weight_of(before, made.config)
    # A step of the grid is at most a third of the largest weight of its block, and errors do not add up.
    assert float((change - delta).norm()) < 0.6 * float(delta.norm())
    share = float((change * delta).sum() / delta.square().sum())
    assert result.survival == {f"{NAME}.weight": pytest.approx(share, abs=0.05 if "nested" in name else 1e-4)}
    assert {n for n in before if not same_bits(before[n], tensors[n])} <= made.changes
    with pytest.raises(PlanError, match=f"{NAME}.weight cannot be subtracted"):
        result.remove()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_disk_gives_the_bits_of_live(
    name: str, shards: int, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(quant, "TILE_ELEMENTS", 1 << 11)
    made = FORMATS[name]()
    tensors = made.tensors | others()
    model = write_model(tmp_path / "model", tensors, shards, CONFIG | {"quantization_config": made.config})
    patch = write_patch(tmp_path / "adapter", 0.2 * float(made.weight.std()))
    report = apply_checkpoint(model, patch, tmp_path / "out", backend=backend, link=True)
    opened = Checkpoint.open(model)
    live = {n: opened.read_stored(n) for n in opened.locations}
    result = portllm.apply(_Model(live, made.config), patch, backend=backend)
    written = read_model(tmp_path / "out")
    assert {n for n in live if not same_bits(live[n], written[n])} == set()
    assert any(not same_bits(tensors[n], written[n]) for n in made.changes)
    assert all(same_bits(opened.read_stored(n), tensors[n]) for n in tensors)  # the source is as it was
    assert report.survival == {n: pytest.approx(share, rel=1e-9) for n, share in result.survival.items()}
    assert report.tensors_copied == len(tensors) - len(made.changes)


class _Model(nn.Module):
    """A module with these tensors under these names, and a config."""

    def __init__(self, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            owner: nn.Module = self
            *path, leaf = name.split(".")
            if leaf.startswith("bitsandbytes__") or (len(path) > 1 and path[-1] == "weight"):
                path, leaf = path[: path.index("weight")], ".".join(name.split(".")[path.index("weight") :])
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner._buffers[leaf] = tensor
        self.config = type("Config", (), {"quantization_config": config})()


@pytest.mark.parametrize("name", ["deepseek", "int8", "nf4", "modelopt nvfp4", "per tensor, large"])
def test_rounding_by_chance_is_the_same_live_and_on_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(quant, "TILE_ELEMENTS", 1 << 11)
    made = FORMATS[name]()
    patch = write_patch(tmp_path / "adapter", 1e-2 * float(made.weight.std()))
    model = write_model(tmp_path / "model", made.tensors | others(), 3, CONFIG | {"quantization_config": made.config})
    apply_checkpoint(model, patch, tmp_path / "out", rounding="stochastic", seed=5)
    written = read_model(tmp_path / "out")
    near, same, other = ({n: t.clone() for n, t in made.tensors.items()} for _ in range(3))
    portllm.apply(near, patch)
    result = portllm.apply(same, patch, rounding="stochastic", seed=5)
    portllm.apply(other, patch, rounding="stochastic", seed=6)
    assert all(same_bits(same[n], written[n]) for n in same)
    assert not all(same_bits(same[n], other[n]) for n in same)
    assert not all(same_bits(same[n], near[n]) for n in same)
    # What the op says is what is stored.
    delta, change = delta_of(patch), weight_of(same, made.config) - weight_of(made.tensors, made.config)
    share = float((change * delta).sum() / delta.square().sum())
    assert result.survival[f"{NAME}.weight"] == pytest.approx(share, abs=1e-3)


def test_zeros_are_kept(tmp_path: Path) -> None:
    made = FORMATS["deepseek"]()
    codes = made.tensors[f"{NAME}.weight"].view(torch.uint8)
    codes[torch.rand(OUT, IN) < 0.5] = 0
    zeros = codes == 0
    portllm.apply(made.tensors, write_patch(tmp_path / "adapter", 0.1), keep_zeros=True)
    weight = weight_of(made.tensors, {})
    assert not weight[zeros].any()
    assert float((weight != 0).double().mean()) > 0.3


def test_auto_rounding_is_for_16_bits(tmp_path: Path) -> None:
    made = FORMATS["deepseek"]()
    with pytest.raises(PlanError, match=rf"{NAME}.weight is quantised: rounding='auto' is for 16-bit weights"):
        portllm.apply(made.tensors, write_patch(tmp_path / "adapter", 0.1), rounding="auto")


@pytest.mark.parametrize("scale", ["tensor", "row", (128, 128)])
def test_parts_of_a_fused_weight(scale: Any, tmp_path: Path) -> None:
    """q, k and v meet inside of blocks; what has no patch keeps its value to rounding, or to the last bit."""
    rows = (160, 80, 80)
    made = Weight("fp8_e4m3", f32, scale, (320, IN))
    fused = "model.layers.0.self_attn.qkv_proj"
    grid = made.scales.view(()) if scale == "tensor" else made.scales
    tensors = {f"{fused}.weight": made.codes.view(320, IN), f"{fused}.weight_scale": grid}
    before = {n: t.clone() for n, t in tensors.items()}
    old, size = made.weight(), 0.2 * float(made.weight().std())
    named = {}
    delta = torch.zeros(320, IN, dtype=torch.float64)
    for part, start, count in (("q_proj", 0, rows[0]), ("v_proj", 240, rows[2])):
        lora_A, lora_B = torch.randn(2, IN), torch.randn(count, 2) * size
        module = f"base_model.model.model.layers.0.self_attn.{part}"
        named |= {f"{module}.lora_A.weight": lora_A, f"{module}.lora_B.weight": lora_B}
        delta[start : start + count] = lora_B.double() @ lora_A.double()
    patch = write_adapter(tmp_path / "adapter", named, r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"])
    result = portllm.apply(tensors, patch)
    change = weight_of(tensors, {}) - old
    # Half a step of e4m3 is at most 1/16 of a number; scales are kept only where all in all they do no worse.
    total = old + delta
    assert float((change - delta).norm()) <= float(total.norm()) / 15
    assert float((change - delta)[160:240].norm()) <= float(total.norm()) / 15
    if scale == "row":
        assert same_bits(tensors[f"{fused}.weight"][160:240], before[f"{fused}.weight"][160:240])
    assert list(result.survival) == [f"{fused}.weight"]
    assert result.survival[f"{fused}.weight"] == pytest.approx(1.0, abs=0.1)


EXPERTS, WIDE, NARROW = 3, 128, 96


def experts(layout: str) -> tuple[dict[str, Tensor], Tensor, str]:
    """Stacked experts: tensors, weights [E, m, n], and the weight's name."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    scheme, dtype, block = {
        "gpt-oss": ("mxfp4", torch.uint8, (1, 32)),
        "fp8 blocks": ("fp8_e4m3", f32, (64, 32)),
        "fp8 tensor": ("fp8_e4m3", f32, "tensor"),
    }[layout]
    each = [Weight(scheme, dtype, block, (WIDE, NARROW)) for _ in range(EXPERTS)]
    weight = torch.stack([w.weight() for w in each])
    if layout == "gpt-oss":
        codes = torch.stack([w.codes.view(WIDE, NARROW // 32, 16) for w in each])
        return {f"{name}_blocks": codes, f"{name}_scales": torch.stack([w.scales for w in each])}, weight, name
    codes = torch.stack([w.codes.view(torch.uint8).view(WIDE, NARROW) for w in each]).view(E4M3)
    return {name: codes, f"{name}_scale_inv": torch.stack([w.scales for w in each])}, weight, name


@pytest.mark.parametrize("layout", ["gpt-oss", "fp8 blocks", "fp8 tensor"])
@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stacked_experts(
    layout: str, transposed: bool, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(quant, "TILE_ELEMENTS", 1 << 11)
    tensors, weight, name = experts(layout)
    rank, size = 2, 0.2 * float(weight.std())
    sides = (NARROW, WIDE) if not transposed else (WIDE, NARROW)
    lora_A, lora_B = torch.randn(EXPERTS * rank, sides[0]), torch.randn(sides[1], rank * EXPERTS) * size
    module = "base_model.model.model.layers.0.mlp.experts"
    patch = write_adapter(
        tmp_path / "adapter",
        {f"{module}.lora_A.weight": lora_A, f"{module}.lora_B.weight": lora_B},
        r=rank, lora_alpha=rank, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"],
    )  # fmt: skip
    model = write_model(tmp_path / "model", tensors | others(), 2, CONFIG)
    apply_checkpoint(model, patch, tmp_path / "out", backend=backend)
    result = portllm.apply(tensors, patch, backend=backend)
    each_B = lora_B.reshape(sides[1], rank, EXPERTS)
    delta = torch.stack(
        [each_B[:, :, e].double() @ lora_A.reshape(EXPERTS, rank, -1)[e].double() for e in range(EXPERTS)]
    )
    delta = delta.mT if transposed else delta
    change = weight_of(tensors, {}) - weight
    assert float((change - delta).norm()) < 0.7 * float(delta.norm())
    share = float((change * delta).sum() / delta.square().sum())
    assert result.survival == {name: pytest.approx(share, rel=1e-4)}
    written = read_model(tmp_path / "out")
    assert all(same_bits(written[n], t) for n, t in tensors.items())


def test_check_counts_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = FORMATS["nf4, nested"]()
    model = write_model(tmp_path / "model", made.tensors | others(), 2, CONFIG)
    patch = write_patch(tmp_path / "adapter", 0.1)
    assert cli.main(["check", str(patch), str(model), "--json", "-q"]) == 0
    (weight,) = json.loads(capsys.readouterr().out)["weights"]
    assert weight["weight_norm"] == pytest.approx(float(made.weight.norm()), rel=1e-5)
    assert weight["delta_norm"] == pytest.approx(float(delta_of(patch).norm()), rel=1e-5)


def test_the_command_says_what_survives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = FORMATS["per channel"]()
    model = write_model(tmp_path / "model", made.tensors | others(), 1, CONFIG)
    patch = write_patch(tmp_path / "adapter", float(made.weight.std()))
    assert cli.main(["apply", str(patch), str(model), "-o", str(tmp_path / "a"), "--json"]) == 0
    survival = json.loads(capsys.readouterr().out)["survival"]
    assert survival == {f"{NAME}.weight": pytest.approx(1.0, abs=0.05)}
    assert cli.main(["apply", str(patch), str(model), "-o", str(tmp_path / "b"), "-q"]) == 0
    assert "survive" in capsys.readouterr().out


# -- refusals --------------------------------------------------------------------------------------------------------


def _without(part: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{NAME}.{part}"]

    return spoil


def _with(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{NAME}.{part}": value})


REFUSED = {
    "no scale": ("deepseek", _without("weight_scale_inv"), rf"{NAME}.weight is float8_e4m3fn, but its scale \(.*_inv"),
    "no SCB": ("bitsandbytes int8", _without("SCB"), rf"{NAME}.weight is int8, but its scale"),
    "no state": ("nf4", _without("weight.quant_state.bitsandbytes__nf4"), "bitsandbytes__nf4 is missing"),
    "garbled state": (
        "nf4", _with("weight.quant_state.bitsandbytes__nf4", torch.tensor([123], dtype=torch.uint8)), "cannot be read",
    ),
    "no nested scales": ("nf4, nested", _without("weight.nested_absmax"), "nested_absmax is missing"),
    "no fp4 scales": ("compressed nvfp4", _without("weight_scale"), r"its scales \(.*weight_scale\) are missing"),
    "zero point": ("int8", _with("weight_zero_point", torch.zeros(OUT, 1)), "has a zero point"),
    "scales of another shape": ("deepseek", _with("weight_scale_inv", torch.rand(7, 2)), "does not divide"),
    "scales of another type": ("int8", _with("weight_scale", torch.rand(OUT, 1).double()), "scale is torch.float64"),
    "int4": ("compressed nvfp4", _with("weight_packed", torch.ones(OUT, 4, dtype=torch.int32)), "packed integers"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, spoil, message = REFUSED[case]
    tensors = FORMATS[name]().tensors
    spoil(tensors)
    before = {n: t.clone() for n, t in tensors.items()}
    with pytest.raises(PlanError, match=message):
        portllm.apply(tensors, write_patch(tmp_path / "adapter", 1.0))
    assert all(same_bits(before[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("kind", ["g_idx", "qzeros"])
def test_formats_that_need_calibration_are_refused(kind: str, tmp_path: Path) -> None:
    name = "GPTQ" if kind == "g_idx" else "AWQ"
    tensors = {f"{NAME}.qweight": torch.ones(8, 8, dtype=torch.int32), f"{NAME}.{kind}": torch.ones(8)}
    with pytest.raises(PlanError, match=rf"{NAME}.qweight is quantised \({name}.*16-bit"):
        portllm.apply(tensors, write_patch(tmp_path / "adapter", 1.0))


def test_what_needs_the_whole_weight_is_refused(tmp_path: Path) -> None:
    made = FORMATS["deepseek"]()
    patch = write_patch(tmp_path / "adapter", 1.0)
    model = write_model(tmp_path / "model", made.tensors | others(), 2, CONFIG)
    with pytest.raises(PlanError, match=f"{NAME}.weight is quantised, and there is no record"):
        portllm.apply(made.tensors, patch, undo="exact")
    with pytest.raises(CheckpointError, match=f"{NAME}.weight is quantised and cannot be patched in place"):
        apply_checkpoint(model, patch, in_place=True)
    with pytest.raises(CheckpointError, match=r"is quantised, so dtype=.* cannot be had"):
        apply_checkpoint(model, patch, tmp_path / "out", dtype=torch.bfloat16)
    named = portllm.Patch.load(patch).tensors
    dora = dict(named) | {f"base_model.model.{NAME}.lora_magnitude_vector": torch.ones(OUT)}
    with pytest.raises(PlanError, match=rf"quantised \(fp8_e4m3\), and {NAME} has DoRA's magnitudes"):
        portllm.apply(made.tensors, write_adapter(tmp_path / "dora", dora, target_modules=["up_proj"], use_dora=True))
    saved = {f"base_model.model.{NAME}.weight": torch.ones(OUT, IN)}
    with pytest.raises(PlanError, match=r"quantised \(fp8_e4m3\), and .* of the patch would replace it"):
        portllm.apply(made.tensors, write_adapter(tmp_path / "saved", saved, modules_to_save=["up_proj"]))
    assert torch.equal(weight_of(made.tensors, {}), made.weight.float().double())


def test_what_replaces_or_parts_quantised_weights_is_refused(tmp_path: Path) -> None:
    made = FORMATS["deepseek"]()
    embedding = {f"model.embed_tokens.{n.rpartition('.')[2]}": t for n, t in made.tensors.items()}
    tokens = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, IN)}
    settings = {"target_modules": [], "trainable_token_indices": {"embed_tokens": [0, 3]}}
    with pytest.raises(PlanError, match=r"quantised \(fp8_e4m3\), and .*embed_tokens has trained tokens"):
        portllm.apply(embedding, write_adapter(tmp_path / "tokens", tokens, **settings))
    factors = {
        "base_model.model.lm_head.lora_A.weight": torch.randn(4, IN),
        "base_model.model.lm_head.lora_B.weight": torch.randn(OUT, 4),
    }
    tied = embedding | {"lm_head.weight": embedding["model.embed_tokens.weight"]}
    with pytest.raises(PlanError, match=r"quantised \(fp8_e4m3\), and tied; it cannot be given a tensor for each"):
        portllm.apply(tied, write_adapter(tmp_path / "head", factors, target_modules=["lm_head"]), tied="untie")


def test_a_part_of_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    made = FORMATS["deepseek"]()
    with pytest.raises(PlanError, match=f"{NAME}.weight is quantised and sharded, which cannot be patched yet"):
        localise(portllm.plan(made.tensors, write_patch(tmp_path / "adapter", 1.0)), {})


def test_a_meta_target_can_be_planned(tmp_path: Path) -> None:
    made = FORMATS["deepseek"]()
    meta = {n: t.to("meta") for n, t in made.tensors.items()}
    patch = write_patch(tmp_path / "adapter", 1.0)
    assert portllm.plan(meta, patch).tensors == (f"{NAME}.weight",)
    with pytest.raises(PlanError, match="meta tensor without data"):
        portllm.apply(meta, patch)


# -- the libraries themselves ----------------------------------------------------------------------------------------


def test_fine_grained_fp8_of_transformers(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(IN, OUT, block_size=(128, 128))
    made = FORMATS["deepseek"]()
    layer.weight.data.copy_(made.tensors[f"{NAME}.weight"])
    layer.weight_scale_inv.data.copy_(made.tensors[f"{NAME}.weight_scale_inv"])
    model = nn.ModuleDict({"up_proj": layer})
    patch = write_patch(tmp_path / "adapter", 0.2 * float(made.weight.std()), ("up_proj",))
    old = fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, (128, 128), f32).detach().double()
    memory = layer.weight.data_ptr()
    result = portllm.apply(model, patch)
    new = fp8._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, (128, 128), f32).detach().double()
    delta = delta_of(patch, "up_proj")
    assert float((new - old - delta).norm()) < 0.3 * float(delta.norm())
    assert result.survival["up_proj.weight"] == pytest.approx(float(((new - old) * delta).sum() / delta.norm() ** 2))
    assert layer.weight.data_ptr() == memory


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
def test_nf4_of_bitsandbytes(nested: bool, on_disk: bool, tmp_path: Path) -> None:
    """Its own decoding before and after, live as its module and from its state dict."""
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear4bit(IN, OUT, bias=False, compress_statistics=nested, quant_type="nf4")
    linear.load_state_dict({"weight": torch.randn(OUT, IN)})
    linear = linear.to("cpu")

    def decoded(weight: Any) -> Tensor:
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).double()

    model = nn.ModuleDict({"up_proj": linear})
    old = decoded(linear.weight)
    torch.testing.assert_close(live_target(model).read("up_proj.weight").double(), old, rtol=1e-5, atol=1e-6)
    patch = write_patch(tmp_path / "adapter", 0.3, ("up_proj",))
    if on_disk:
        state = {name: t.clone() for name, t in model.state_dict().items()}
        portllm.apply(state, patch)
        weight = bnb.nn.Params4bit.from_prequantized(
            state["up_proj.weight"],
            {n.removeprefix("up_proj.weight."): t for n, t in state.items() if n != "up_proj.weight"},
            device="cpu",
        )
        new = decoded(weight)
    else:
        portllm.apply(model, patch)
        new = decoded(linear.weight)
    delta = delta_of(patch, "up_proj")
    data, quantised = bnb.functional.quantize_4bit(
        (old + delta).float(), quant_type="nf4", compress_statistics=nested, blocksize=64
    )
    theirs = bnb.functional.dequantize_4bit(data, quantised).double()
    slack = 1.05 if nested else 1 + 1e-4  # its fresh nested scales have another centre
    assert float((new - old - delta).norm()) <= slack * float((theirs - old - delta).norm())


def test_int8_of_bitsandbytes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    linear = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(torch.randn(OUT, IN).half())
    linear.weight = bnb.nn.Int8Params(codes, has_fp16_weights=False, requires_grad=False, CB=codes, SCB=scales)
    model = nn.ModuleDict({"up_proj": linear})
    old = bnb.functional.int8_vectorwise_dequant(codes, scales).double()
    torch.testing.assert_close(live_target(model).read("up_proj.weight").double(), old, rtol=1e-5, atol=1e-6)
    patch = write_patch(tmp_path / "adapter", 0.3, ("up_proj",))
    portllm.apply(model, patch)
    new = bnb.functional.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB).double()
    delta = delta_of(patch, "up_proj")
    assert float((new - old - delta).norm()) < 0.05 * float(delta.norm())


def test_nvfp4_of_compressed_tensors() -> None:
    """Its own unpacking says the same of our bytes."""
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    made = FORMATS["compressed nvfp4"]()
    packed, scales = made.tensors[f"{NAME}.weight_packed"], made.tensors[f"{NAME}.weight_scale"]
    values = helpers.unpack_fp4_from_uint8(packed, OUT, IN, dtype=f32).double()
    units = scales.double() / made.tensors[f"{NAME}.weight_global_scale"].double()
    expected = values * units.repeat_interleave(16, 1)
    torch.testing.assert_close(weight_of(made.tensors, {}), expected, rtol=1e-6, atol=0)


def test_mxfp4_of_transformers() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    tensors, weight, _ = experts("gpt-oss")
    blocks, scales = tensors.values()
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=f32).double()
    assert torch.equal(weight.mT, theirs)
