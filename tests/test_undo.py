"""Exact undo: after any history of patches the bits are those of the patches that are on, and nothing else."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import portllm
from portllm import Exact, Patch, PlanError, RecordError, stack
from portllm.config import AdapterConfig

from .tiny import same_bits

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"q": (24, 16), "k": (1, 63), "v": (63, 1), "o": (63, 65), "d": (1, 1), "wide": (3, 1100)}


def make_patch(
    name: str = "p", size: float = 0.05, *, shapes: Any = SHAPES, bias: bool = False, **settings: Any
) -> Patch:
    """Random factors for some of the modules, of a delta about ``size`` of weights of 0.02."""
    rank = random.randint(1, 9)
    dtype = random.choice([torch.float32, torch.bfloat16, torch.float16])
    modules = random.sample(sorted(shapes), random.randint(1, len(shapes)))
    config = AdapterConfig.from_dict(
        {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, **settings}
    )
    tensors: dict[str, Tensor] = {}
    for module in modules:
        rows, columns = shapes[module]
        key = f"base_model.model.layers.0.{module}"
        tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, columns) * 0.02 * size / rank**0.5).to(dtype)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank).to(dtype)
        if settings.get("use_dora"):
            tensors[f"{key}.lora_magnitude_vector"] = torch.rand(rows)
    if bias:
        tensors["base_model.model.norm.weight"] = torch.randn(7)
    return Patch.from_tensors(tensors, config, name=name)


def make_model(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    weights = {f"layers.0.{name}.weight": (torch.randn(shape) * 0.02).to(dtype) for name, shape in SHAPES.items()}
    return {**weights, "norm.weight": torch.randn(7).to(dtype)}


def copied(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.items()}


def patched(base: dict[str, Tensor], patches: list[tuple[Patch, float]]) -> dict[str, Tensor]:
    """One pass over the untouched weights."""
    fresh = copied(base)
    if patches:
        portllm.apply(fresh, patches)
    return fresh


def assert_same(model: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert model.keys() == expected.keys()
    assert [name for name in model if not same_bits(model[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_any_history_leaves_what_is_on(dtype: torch.dtype, seed: int) -> None:
    """Up to eight patches, put on, taken off, weakened and swapped in any order."""
    model = make_model(dtype)
    base, addresses = copied(model), [tensor.data_ptr() for tensor in model.values()]
    on: list[tuple[Exact, Patch, float]] = []
    for _ in range(25):
        action = random.choice(["apply", "apply", "remove", "scale", "swap"]) if on else "apply"
        at = random.randrange(len(on)) if on else 0
        size = random.choice([1e-3, 0.05, 1.0, 100.0])
        if action == "apply" and len(on) < 8:
            patch, strength = make_patch(size=size), random.choice([1.0, -0.5, 0.25])
            on.append((portllm.apply(model, patch, strength, undo="exact"), patch, strength))
        elif action == "remove":
            on.pop(at)[0].remove()
        elif action == "scale":
            on[at][0].scale(random.choice([0.5, -2.0, 0.0]))
        elif action == "swap":
            patch = make_patch(size=size)
            on[at] = portllm.swap(model, on[at][0], patch), patch, 1.0
        assert_same(model, patched(base, [(patch, strength * handle.strength) for handle, patch, strength in on]))
    for handle, *_ in random.sample(on, len(on)):
        handle.remove()
    assert_same(model, base)
    assert addresses == [tensor.data_ptr() for tensor in model.values()]


def test_a_thousand_swaps() -> None:
    model = make_model()
    base, patches = copied(model), [make_patch(str(i)) for i in range(5)]
    merged = [patched(base, [(patch, 1.0)]) for patch in patches]
    handles = [portllm.apply(model, patch, undo="later") for patch in patches]
    assert_same(model, base)
    handles[0].put_on()
    now = 0
    for i in range(1000):
        then = random.choice([j for j in range(5) if j != now])
        handles[now].swap(handles[then])
        now = then
        if i % 50 == 0:
            assert_same(model, merged[now])
    assert_same(model, merged[now])
    handles[now].remove()
    assert_same(model, base)


@pytest.mark.parametrize(
    "kinds", [["dora"], ["bias"], ["dora", "plain"], ["plain", "bias", "plain"], ["bias", "dora"]], ids=str
)
def test_what_is_no_sum_comes_back_from_a_copy(kinds: list[str]) -> None:
    model = make_model()
    base = copied(model)
    on: list[tuple[Exact, Patch]] = []
    for kind in kinds:
        settings: dict[str, Any] = {"dora": {"use_dora": True}, "bias": {"bias": True}, "plain": {}}[kind]
        extra = {"modules_to_save": ["norm"]} if kind == "bias" else {}
        patch = make_patch(kind, **settings, **extra)
        on.append((portllm.apply(model, patch, undo="exact"), patch))
    assert any(handle.nbytes for handle, _ in on)
    while on:
        handle, _ = on.pop(random.randrange(len(on)))
        handle.remove()
        if len(on) == 1:  # then one pass is what apply does; of several the order of values and sums is each layer's
            assert_same(model, patched(base, [(on[0][1], 1.0)]))
    assert_same(model, base)


def test_regions_that_overlap_in_part() -> None:
    """Patches of a fused weight's part and of the whole: each comes off."""
    model = {"layers.0.self_attn.qkv_proj.weight": torch.randn(12, 8).bfloat16()}
    base = copied(model)

    def patch(modules: list[str], rows: int) -> Patch:
        config = AdapterConfig.from_dict({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules})
        key = "base_model.model.layers.0.self_attn"
        tensors = {f"{key}.{m}.lora_A.weight": torch.randn(2, 8) * 0.1 for m in modules}
        tensors |= {f"{key}.{m}.lora_B.weight": torch.randn(rows, 2) for m in modules}
        return Patch.from_tensors(tensors, config)

    parts, whole = patch(["q_proj", "k_proj", "v_proj"], 4), patch(["qkv_proj"], 12)
    first = portllm.apply(model, parts, undo="exact")
    second = portllm.apply(model, whole, undo="exact")
    first.remove()
    assert_same(model, patched(base, [(whole, 1.0)]))
    second.remove()
    assert_same(model, base)


def test_a_module_keeps_its_parameters() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q": nn.Linear(16, 24), "o": nn.Linear(65, 63)})])})
    parameters, base = list(model.parameters()), copied(model.state_dict())
    patch = make_patch(shapes={"q": (24, 16), "o": (63, 65)})
    with portllm.applied(model, patch, 0.5) as handle:
        assert handle.active
        assert not all(same_bits(a, b) for a, b in zip(model.state_dict().values(), base.values(), strict=True))
        with portllm.applied(model, patch):
            pass
    assert not handle.active
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same(dict(model.state_dict()), base)


def test_with_an_error_inside() -> None:
    model = make_model()
    base = copied(model)
    with pytest.raises(ZeroDivisionError), portllm.applied(model, make_patch()):
        raise ZeroDivisionError
    assert_same(model, base)


@pytest.mark.parametrize("verify", [True, "full"])
def test_weights_that_were_written_to_are_refused(verify: Any) -> None:
    model = make_model()
    patch = make_patch(shapes={"o": (63, 65)})
    base = copied(model)
    handle = portllm.apply(model, patch, undo="exact", verify=verify)
    before = copied(model)
    weight = model["layers.0.o.weight"]
    weight.add_(1) if verify is True else weight[62, 64].add_(1)
    changed = copied(model)
    for action in (
        handle.remove,
        lambda: handle.scale(0.5),
        lambda: portllm.swap(model, handle, make_patch(shapes={"o": (63, 65)})),
    ):
        with pytest.raises(RecordError, match=r"layers\.0\.o\.weight has been written to"):
            action()
        assert_same(model, changed)
        assert handle.active
        assert handle.strength == 1
    weight.copy_(before["layers.0.o.weight"])
    handle.remove()
    assert_same(model, base)


def test_a_handle_that_is_dropped_leaves_its_patch_for_good() -> None:
    model = make_model()
    p, q = make_patch(), make_patch()
    portllm.apply(model, p, undo="exact")
    once = copied(model)
    gc.collect()
    with portllm.applied(model, q):
        assert_same(model, patched(once, [(q, 1.0)]))
    assert_same(model, once)
    assert (
        len([held for held in stack._held.values() if held.tensor.data_ptr() == model["layers.0.q.weight"].data_ptr()])
        == 0
    )


def test_a_record_is_never_larger_than_a_copy() -> None:
    model = {"layers.0.o.weight": torch.randn(63, 65).bfloat16() * 1e-30}
    base = copied(model)
    handle = portllm.apply(model, make_patch(size=1.0, shapes={"o": (63, 65)}), undo="exact")
    assert handle.nbytes <= model["layers.0.o.weight"].nbytes
    handle.remove()
    assert_same(model, base)


def test_mistakes() -> None:
    model = make_model()
    patch = make_patch()
    handle = portllm.apply(model, patch, undo="exact")
    with pytest.raises(PlanError, match="on already"):
        handle.put_on()
    with pytest.raises(PlanError, match="must be finite"):
        handle.scale(float("nan"))
    with pytest.raises(PlanError, match="another model"):
        portllm.swap(make_model(), handle, patch)
    handle.remove()
    for action in (handle.remove, lambda: handle.scale(1.0), lambda: handle.swap(handle)):
        with pytest.raises(PlanError, match="removed already"):
            action()
    handle.put_on()
    handle.remove()
    with pytest.raises(PlanError, match="must be 'subtract'"):
        portllm.apply(model, patch, undo="maybe")  # type: ignore[call-overload]
    assert "off" in repr(handle)
