"""Fingerprints: which base a patch was made on, and how far a model has moved from it."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import portllm
from portllm import CheckpointError, Patch, PatchError, PlanError, fingerprint
from portllm.checkpoint import plan_checkpoint
from portllm.fingerprint import METADATA_KEY, Check, Fingerprint, WeightPrint

from .tiny import IN, MODULES, OUT, factors, read_model, same_bits, snapshot, tensors, write_adapter, write_model

pytestmark = pytest.mark.usefixtures("one_thread")


def check(patch: Patch, named: Mapping[str, Tensor]) -> Check:
    return fingerprint.check_weights(patch, portllm.plan(named, patch), named.__getitem__)


def check_disk(patch: Patch, path: Path) -> Check:
    checkpoint, plan = plan_checkpoint(path, patch)
    return fingerprint.check_weights(patch, plan, fingerprint.cached(checkpoint.read))


def stamped(patch: Patch) -> Fingerprint:
    found = Fingerprint.from_patch(patch)
    assert found is not None
    return found


def moved(named: Mapping[str, Tensor], size: float) -> dict[str, Tensor]:
    """Each weight, moved by noise of ``size`` times its own norm."""
    result = {}
    for name, tensor in named.items():
        noise = torch.randn_like(tensor.float())
        result[name] = (tensor.float() + size * noise * tensor.float().norm() / noise.norm()).to(tensor.dtype)
    return result


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_without_a_fingerprint_the_base_is_unknown() -> None:
    result = check(Patch.from_tensors(factors(), _config(base_model_name_or_path="some/base")), tensors())
    assert (result.verdict, result.base) == ("unknown", "some/base")
    assert all(w.same_as_base is w.moved is w.cosine is None for w in result.weights)


def _config(**settings: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | settings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_base_evolved_unrelated(dtype: torch.dtype) -> None:
    base = {name: tensor.to(dtype) for name, tensor in tensors(torch.float32).items()}
    patch = portllm.stamp(Patch.from_tensors(factors(), _config()), base)
    same = check(patch, {name: tensor.clone() for name, tensor in base.items()})
    assert same.verdict == "base"
    assert all(w.same_as_base and w.moved == 0 and w.cosine == pytest.approx(1) for w in same.weights)
    for size in (0.01, 0.1, 0.3):
        evolved = check(patch, moved(base, size))
        assert evolved.verdict == "evolved"
        assert not any(w.same_as_base for w in evolved.weights)
        # 64 samples of 384: the estimate is within a third of the truth nearly always; take the median of four.
        assert sorted(w.moved for w in evolved.weights)[1] == pytest.approx(size, rel=0.4)
    stranger = check(patch, {name: tensor.to(dtype) for name, tensor in tensors(torch.float32).items()})
    assert stranger.verdict == "unrelated"
    assert max(w.cosine for w in stranger.weights) < 0.6


def test_one_changed_bit_in_one_weight_is_not_the_base() -> None:
    base = tensors()
    patch = portllm.stamp(Patch.from_tensors(factors(), _config()), base)
    other = {name: tensor.clone() for name, tensor in base.items()}
    name = f"{MODULES[2]}.weight"
    other[name].view(torch.int16)[5, 7] ^= 1
    result = check(patch, other)
    assert result.verdict == "evolved"
    assert [w.source for w in result.weights if not w.same_as_base] == [MODULES[2]]


def test_weights_that_the_patch_does_not_touch_do_not_count() -> None:
    base = tensors()
    patch = portllm.stamp(Patch.from_tensors(factors(), _config()), base)
    other = dict(base, **{"model.embed_tokens.weight": torch.randn(20, IN).to(torch.bfloat16)})
    assert check(patch, other).verdict == "base"


def test_the_same_values_in_another_dtype_are_near_but_not_the_base() -> None:
    base = tensors(torch.float32)
    patch = portllm.stamp(Patch.from_tensors(factors(), _config()), base)
    result = check(patch, {name: tensor.to(torch.bfloat16) for name, tensor in base.items()})
    assert result.verdict == "evolved"
    assert all(0 < w.moved < 2**-8 for w in result.weights)


# -- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_are_those_of_the_full_delta_in_float64(dtype: torch.dtype) -> None:
    base, named = tensors(dtype), factors(rank=3)
    patch = Patch.from_tensors(named, _config(r=3, lora_alpha=7, use_rslora=True))
    result = check(patch, base)
    assert [w.source for w in result.weights] == list(MODULES)
    for found in result.weights:
        prefix, weight = f"base_model.model.{found.source}", base[f"{found.source}.weight"].double()
        delta = 7 / 3**0.5 * named[f"{prefix}.lora_B.weight"].double() @ named[f"{prefix}.lora_A.weight"].double()
        assert found.delta_norm == pytest.approx(float(delta.norm()), rel=1e-12)
        assert found.weight_norm == pytest.approx(float(weight.norm()), rel=1e-12)
        assert found.relative == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-12)
        assert (found.tensors, found.ranks) == ((f"{found.source}.weight",), (3,))


def test_a_weight_of_zeros_has_an_infinite_relative_size() -> None:
    base = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    assert all(w.relative == float("inf") for w in check(Patch.from_tensors(factors(), _config()), base).weights)


def test_samples_are_spread_and_exact() -> None:
    """Each sample is a value of the weight, at a place of its own; the hash is that of the bytes."""
    import hashlib

    weight = torch.arange(OUT * IN, dtype=torch.float32).reshape(OUT, IN)
    base = {f"{module}.weight": weight for module in MODULES[:1]}
    patch = Patch.from_tensors(factors(MODULES[:1]), _config(target_modules=["q_proj"]))
    [found] = stamped(portllm.stamp(patch, base)).weights.values()
    assert isinstance(found, WeightPrint)
    assert (found.dtype, found.numel, len(found.samples)) == ("float32", OUT * IN, 64)
    assert len(set(found.samples)) == 64
    gaps = torch.tensor(sorted([*found.samples, 0, OUT * IN])).diff()
    assert gaps.max() < 4 * OUT * IN / 64
    assert found.sha256 == hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:32]


# -- one fingerprint, whatever the layout ----------------------------------------------------------------------------


def test_fused_and_split_layouts_have_one_fingerprint(tmp_path: Path) -> None:
    """Phi-3's qkv_proj and gate_up_proj, against Llama's separate weights."""
    layer = "model.layers.0"
    rows = {"self_attn.q_proj": 24, "self_attn.k_proj": 8, "self_attn.v_proj": 8}
    rows |= {"mlp.gate_proj": 12, "mlp.up_proj": 12}
    split = {f"{layer}.{part}.weight": torch.randn(n, IN).to(torch.bfloat16) for part, n in rows.items()}
    fused = {
        f"{layer}.self_attn.qkv_proj.weight": torch.cat([split[f"{layer}.self_attn.{p}_proj.weight"] for p in "qkv"]),
        f"{layer}.mlp.gate_up_proj.weight": torch.cat([split[f"{layer}.mlp.{p}_proj.weight"] for p in ("gate", "up")]),
    }
    named = {}
    for part, n in rows.items():
        named |= factors([f"{layer}.{part}"], n, IN)
    patch = Patch.from_tensors(named, _config(target_modules=[part.split(".")[1] for part in rows]))
    on_split, on_fused = portllm.stamp(patch, split), portllm.stamp(patch, fused)
    assert stamped(on_split) == stamped(on_fused)
    assert len(stamped(on_split).weights) == 5
    assert check(on_split, fused).verdict == check(on_fused, split).verdict == "base"
    a, b = check(on_split, fused).weights, check(on_split, split).weights
    assert [w.relative for w in a] == pytest.approx([w.relative for w in b], rel=1e-12)
    fused[f"{layer}.mlp.gate_up_proj.weight"][20, 3] *= 2
    assert [w.source for w in check(on_split, fused).weights if not w.same_as_base] == [f"{layer}.mlp.up_proj"]
    # And the other way round: a patch of the fused weight, on separate ones.
    whole = factors([f"{layer}.mlp.gate_up_proj"], 24, IN)
    wide = Patch.from_tensors(whole, _config(target_modules=["gate_up_proj"]))
    fused[f"{layer}.mlp.gate_up_proj.weight"][20, 3] = split[f"{layer}.mlp.up_proj.weight"][8, 3]
    assert stamped(portllm.stamp(wide, fused)) == stamped(portllm.stamp(wide, split))


@pytest.mark.parametrize("per_expert_patch", [True, False])
def test_stacked_and_separate_experts_have_one_fingerprint(tmp_path: Path, per_expert_patch: bool) -> None:
    """Mixtral: [experts, out, in] at run time, one weight for each expert on disk."""
    experts, hidden, inner = 3, IN, 10
    on_disk, live = {}, {}
    for i in range(2):
        moe = f"model.layers.{i}.block_sparse_moe.experts"
        w = {
            (e, n): torch.randn(*(shape)).to(torch.bfloat16)
            for e in range(experts)
            for n, shape in (("w1", (inner, hidden)), ("w3", (inner, hidden)), ("w2", (hidden, inner)))
        }
        on_disk |= {f"{moe}.{e}.{n}.weight": tensor for (e, n), tensor in w.items()}
        live[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([w[e, "w1"], w[e, "w3"]]) for e in range(experts)]
        )
        live[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack([w[e, "w2"] for e in range(experts)])
    if per_expert_patch:
        named = {}
        for name, tensor in on_disk.items():
            named |= factors([name.removesuffix(".weight")], *tensor.shape)
        patch = Patch.from_tensors(named, _config(target_modules=["w1", "w2", "w3"]))
    else:
        named = {}
        for i in range(2):
            outer = f"base_model.model.model.layers.{i}.mlp.experts"
            named |= {
                f"{outer}.base_layer.lora_A.weight": torch.randn(4 * experts, hidden),
                f"{outer}.base_layer.lora_B.weight": torch.randn(2 * inner, 4 * experts),
                f"{outer}.lora_A.weight": torch.randn(4 * experts, inner),
                f"{outer}.lora_B.weight": torch.randn(hidden, 4 * experts),
            }
        patch = Patch.from_tensors(
            named, _config(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        )
    model = write_model(tmp_path / "model", on_disk, config={"model_type": "mixtral"})
    from_disk, from_live = portllm.stamp(patch, model), portllm.stamp(patch, live)
    assert stamped(from_disk).weights == stamped(from_live).weights
    assert len(stamped(from_disk).weights) == (2 * experts * 3 if per_expert_patch else 4)
    assert check(from_disk, live).verdict == "base"
    assert check_disk(from_live, model).verdict == "base"
    relative = [[w.relative for w in c.weights] for c in (check(from_disk, live), check_disk(from_live, model))]
    assert relative[0] == pytest.approx(relative[1], rel=1e-12)
    live["model.layers.1.mlp.experts.down_proj"][2, 5, 1] += 1
    different = [w.source for w in check(from_disk, live).weights if not w.same_as_base]
    assert len(different) == 1
    assert ".2.w2" in different[0] if per_expert_patch else different[0].endswith("experts.down_proj")


@pytest.mark.parametrize("name", ["mixtral", "phi3"])
def test_real_models_have_one_fingerprint_live_and_saved(tmp_path: Path, name: str) -> None:
    """transformers stacks Mixtral's experts when it loads them, and takes them apart when it saves them."""
    pytest.importorskip("transformers")
    from .families import FAMILIES, save_adapter

    family = FAMILIES[name]
    model = family.build()
    patch = Patch.load(save_adapter(model, family.config(), tmp_path / "adapter"))
    model.save_pretrained(tmp_path / "model")
    live, saved = stamped(portllm.stamp(patch, model)), stamped(portllm.stamp(patch, tmp_path / "model"))
    assert live.weights == saved.weights
    assert len(live.weights) == sum(len(getattr(entry, "factors", "1")) for entry in patch.entries)
    assert check_disk(portllm.stamp(patch, model), tmp_path / "model").verdict == "base"
    if name == "mixtral":
        assert any("experts.0.w1" in key for key in read_model(tmp_path / "model"))
        assert any(key.endswith("experts.gate_up_proj") for key in model.state_dict())


def test_disk_and_memory_and_blocks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = tensors()
    model, patch = write_model(tmp_path / "model", named), Patch.load(write_adapter(tmp_path / "adapter"))
    whole = stamped(portllm.stamp(patch, named))
    assert stamped(portllm.stamp(patch, model)).weights == whole.weights
    strided = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in named.items()}
    assert stamped(portllm.stamp(patch, strided)).weights == whole.weights
    monkeypatch.setattr(fingerprint, "_HASH_BYTES", 100)
    assert stamped(portllm.stamp(patch, named)).weights == whole.weights


# -- in the file -----------------------------------------------------------------------------------------------------


def test_it_is_kept_with_the_patch(tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    before = snapshot(adapter)
    patch = portllm.stamp(adapter, model)
    assert snapshot(adapter) == before
    assert stamped(patch).name == str(model)
    patch.save(tmp_path / "stamped")
    loaded = Patch.load(tmp_path / "stamped")
    assert stamped(loaded) == stamped(patch)
    assert check_disk(loaded, model).verdict == "base"
    assert check_disk(loaded, model).base == str(model)
    old, new = read_model(adapter), read_model(tmp_path / "stamped")
    assert old.keys() == new.keys()
    assert all(same_bits(old[key], new[key]) for key in old)
    assert json.loads((adapter / "adapter_config.json").read_text()) == dict(loaded.config.raw)
    # A fingerprint is small: 300 bytes for each weight and no more.
    assert len(patch.metadata[METADATA_KEY]) < 100 + 600 * len(MODULES)
    # Stamped again, on another base: the new one counts.
    again = portllm.stamp(loaded, tensors())
    assert check_disk(again, model).verdict == "unrelated"


def test_peft_reads_a_stamped_patch_as_before(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapter = write_adapter(tmp_path / "adapter")
    portllm.stamp(adapter, tensors()).save(tmp_path / "stamped")
    old, new = (peft.load_peft_weights(str(path), device="cpu") for path in (adapter, tmp_path / "stamped"))
    assert old.keys() == new.keys()
    assert all(same_bits(old[key], new[key]) for key in old)
    assert peft.PeftConfig.from_pretrained(tmp_path / "stamped") == peft.PeftConfig.from_pretrained(adapter)


def test_names_of_live_bases() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(IN, OUT)

    patch = Patch.from_tensors(factors(["q_proj"]), _config(target_modules=["q_proj"], base_model_name_or_path="a/b"))
    model = Model()
    assert stamped(portllm.stamp(patch, model)).name == "a/b"
    model.config = type("Config", (), {"name_or_path": "c/d"})()
    assert stamped(portllm.stamp(patch, model)).name == "c/d"
    nameless = Patch.from_tensors(factors(["q_proj"]), _config(target_modules=["q_proj"]))
    assert stamped(portllm.stamp(nameless, dict(model.state_dict()))).name is None


def _garble(change: Callable[[Any], Any]) -> Callable[[str], str]:
    def garble(text: str) -> str:
        raw = json.loads(text)
        result = change(raw)
        return json.dumps(raw if result is None else result)

    return garble


def _first(raw: Any, index: int, value: Any) -> None:
    next(iter(raw["weights"].values()))[index] = value


GARBLED: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "not JSON": lambda text: text[:-3],
    "deep": lambda text: "[" * 100_000,
    "a list": _garble(lambda raw: [raw]),
    "a number": _garble(lambda raw: 5),
    "null": lambda text: "null",
    "no weights": _garble(lambda raw: raw.pop("weights") and None),
    "no name": _garble(lambda raw: raw.pop("name") and None),
    "a version from the future": _garble(lambda raw: raw.update(version=2)),
    "no version": _garble(lambda raw: raw.pop("version") and None),
    "weights are a list": _garble(lambda raw: raw.update(weights=[1])),
    "a weight is a number": _garble(lambda raw: raw.update(weights={"a": 1})),
    "a weight is short": _garble(lambda raw: raw.update(weights={"a": ["float32", 1, "ab"]})),
    "numel is text": _garble(lambda raw: _first(raw, 1, "many")),
    "numel is infinite": _garble(lambda raw: _first(raw, 1, float("inf"))),
    "numel is null": _garble(lambda raw: _first(raw, 1, None)),
    "samples are no base64": _garble(lambda raw: _first(raw, 3, "a")),
    "samples are cut": _garble(lambda raw: _first(raw, 3, base64.b64encode(b"12345").decode())),
    "samples are a number": _garble(lambda raw: _first(raw, 3, 5)),
}


@pytest.mark.parametrize("case", GARBLED)
def test_a_garbled_fingerprint_is_a_clear_error(case: str) -> None:
    named = tensors()
    patch = portllm.stamp(Patch.from_tensors(factors(), _config(), name="my/patch"), named)
    broken = patch.with_metadata(**{METADATA_KEY: GARBLED[case](patch.metadata[METADATA_KEY])})
    with pytest.raises(PatchError, match=r"^my/patch: the fingerprint .* \(portllm.base\) is garbled") as caught:
        check(broken, named)
    assert "\n" not in str(caught.value)
    assert "stamp" in str(caught.value)
    # It can still be applied, and stamped anew.
    portllm.apply(copy.deepcopy(named), broken)
    assert check(portllm.stamp(broken, named), named).verdict == "base"


def test_a_fingerprint_of_other_shapes_or_weights() -> None:
    """A patch that was re-made on another architecture, its old fingerprint still in it."""
    named = tensors()
    stamp = portllm.stamp(Patch.from_tensors(factors(), _config()), named).metadata
    larger = {f"{module}.weight": torch.randn(2 * OUT, IN) for module in MODULES}
    patch = Patch.from_tensors(factors(out=2 * OUT), _config(), metadata=stamp)
    result = check(patch, larger)
    assert result.verdict == "unrelated"
    assert all(w.same_as_base is False and w.moved is None for w in result.weights)
    others = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    patch = Patch.from_tensors(factors(others), _config(target_modules=["up_proj"]), metadata=stamp)
    assert check(patch, {f"{name}.weight": torch.randn(OUT, IN) for name in others}).verdict == "unknown"


def test_stamping_on_a_base_that_does_not_fit() -> None:
    patch = Patch.from_tensors(factors(), _config())
    with pytest.raises(PlanError, match="matches nothing"):
        portllm.stamp(patch, {"other.weight": torch.randn(3, 3)})
    with pytest.raises(CheckpointError, match="no safetensors files"):
        portllm.stamp(patch, Path(__file__).parent)
