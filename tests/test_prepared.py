"""``ops.Prepared`` and ``execute.prepare``: the same bits call after call, wherever the tensors have gone meanwhile."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from portllm import BackendError, PlanError, _native, lowrank_add_, ops
from portllm.execute import prepare
from portllm.planning import Assign, Plan, Region, Term, Update

BACKENDS = [name for name in ("torch", "cpu") if ops.unavailable(name) is None]
needs_library = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[int]]


def made() -> Lists:
    """Four weights of other dtypes and strides, with one to three terms of other dtypes."""
    weights = [
        torch.randn(40, 70).bfloat16(),
        torch.randn(64, 64).half(),
        torch.randn(33, 20).T,
        torch.randn(9, 30, dtype=torch.float64)[:, 4:21],
    ]
    n_terms, dtypes = [1, 2, 3, 1], [torch.float32, torch.bfloat16, torch.float16]
    lora_A, lora_B = [], []
    for weight, count in zip(weights, n_terms, strict=True):
        for t in range(count):
            lora_A.append(torch.randn(3 + t, weight.shape[1]).to(dtypes[t]))
            lora_B.append(torch.randn(weight.shape[0], 3 + t).to(dtypes[t]))
    return weights, lora_A, lora_B, [0.5 + t for t in range(len(lora_A))], n_terms


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


def check(call: Callable[[], None], lists: Lists, backend: str = "auto") -> None:
    """The call does to the weights what the op does to copies of them."""
    copies = [weight.clone() for weight in lists[0]]
    lowrank_add_(copies, *lists[1:], backend)
    old = [weight.clone() for weight in lists[0]]
    call()
    for weight, copy, before in zip(lists[0], copies, old, strict=True):
        assert same(weight, copy)
        assert not same(weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_as_the_op_call_after_call(backend: str) -> None:
    lists = made()
    call = ops.Prepared(*lists, backend)
    for n in range(1, 4):
        check(call, lists, backend)
        assert [weight._version for weight in lists[0]] == [n] * 4
        assert not any(factor._version for factor in (*lists[1], *lists[2]))
    lists[1][0].mul_(2)  # values are those of the call, also where they decide which instruction is used
    lists[2][1].copy_(lists[2][1].bfloat16())
    check(call, lists, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", [0, 1, 2], ids=["weights", "lora_A", "lora_B"])
def test_tensors_that_got_other_memory_are_found(backend: str, key: int) -> None:
    lists = made()
    call = ops.Prepared(*lists, backend)
    tensor, old = lists[key][0], lists[key][0].clone()
    abandoned = tensor.detach()
    tensor.data = torch.randn(tensor.shape[::-1]).to(tensor.dtype).T  # other strides too
    check(call, lists, backend)
    tensor.set_(torch.randn(tensor.shape).to(tensor.dtype))
    check(call, lists, backend)
    assert same(abandoned, old)


@needs_library
def test_a_weight_that_shares_its_memory_until_it_is_written() -> None:
    weight, a, b = torch.randn(8, 9), torch.randn(2, 9), torch.randn(8, 2)
    call = ops.Prepared([weight], [a], [b], [1.0], [1])
    twin, old = torch._lazy_clone(weight), weight.clone()
    call()
    assert torch.equal(twin, old)
    assert not torch.equal(weight, old)


CHANGES: dict[str, tuple[int, Callable[[Tensor], object], str]] = {
    "a weight shrinks": (0, lambda t: t.resize_(39, 70), "does not give the shape"),
    "A grows": (1, lambda t: t.resize_(3, 71), "does not give the shape"),
    "B is a vector": (2, lambda t: t.resize_(120), "does not give the shape"),
    "the ranks differ": (2, lambda t: t.set_(torch.randn(40, 4)), "does not give the shape"),
    "a weight of integers": (0, lambda t: setattr(t, "data", torch.ones(40, 70, dtype=torch.int32)), "floating point"),
    "A of integers": (1, lambda t: setattr(t, "data", torch.ones(3, 70, dtype=torch.int32)), "factors are bf16"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", CHANGES)
def test_what_no_longer_fits_is_refused_before_the_first_write(backend: str, change: str) -> None:
    lists = made()
    for key in range(3):  # the last weight changes, so that the others would be written first
        lists[key].append(lists[key].pop(0))
    lists[4].append(lists[4].pop(0))
    call = ops.Prepared(*lists, backend)
    key, act, message = CHANGES[change]
    act(lists[key][-1])
    old = [weight.clone() for weight in lists[0]]
    with pytest.raises(ValueError, match=message):
        call()
    assert all(same(weight, before) for weight, before in zip(lists[0], old, strict=True))
    gone = weakref.ref(call)
    del call
    assert gone() is None  # the error does not keep it, and all its tensors, until a garbage collection


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_errors_come_when_it_is_prepared(backend: str) -> None:
    lists = made()
    lists[3].pop()
    with pytest.raises(ValueError, match="6 scalings"):
        ops.Prepared(*lists, backend)
    with pytest.raises(BackendError, match="no backend 'fpga'"):
        ops.Prepared(*made(), "fpga")
    ops.Prepared([], [], [], [], [], backend)()


def test_it_keeps_its_tensors_until_it_is_gone() -> None:
    lists = made()
    call = ops.Prepared(*lists)
    memory = [weakref.ref(tensor.untyped_storage()) for tensor in (*lists[0], *lists[1], *lists[2])]
    watched = [weakref.ref(tensor) for tensor in (*lists[0], *lists[1], *lists[2])]
    check(call, lists)
    copies = [weight.clone() for weight in lists[0]]
    lowrank_add_(copies, *lists[1:])
    del lists, memory
    gc.collect()
    call()
    kept = [reference() for reference in watched[:4]]
    assert all(tensor is not None and same(tensor, copy) for tensor, copy in zip(kept, copies, strict=True))
    del kept, call
    assert not any(reference() is not None for reference in watched)


@needs_library
def test_numbers_that_stand_for_no_prepared_call_are_refused() -> None:
    call = ops.Prepared(*made(), "cpu")
    number = call._number
    assert number is not None
    for wrong in (0, -1, number + 1, 2**62, -(2**63)):
        for op in (torch.ops.portllm.lowrank_add_cpu_run, torch.ops.portllm.lowrank_add_cpu_release):
            with pytest.raises(RuntimeError, match=f"no call {wrong} is prepared"):
                op(wrong)
    call()
    del call
    with pytest.raises(RuntimeError, match=f"no call {number} is prepared"):
        torch.ops.portllm.lowrank_add_cpu_run(number)


@needs_library
def test_threads_may_call_and_drop_it_at_once() -> None:
    """Sums of small integers are exact: whatever the order, each weight ends at a whole number of updates."""
    weights = [torch.zeros(64, 64) for _ in range(50)]
    a, b = torch.ones(1, 64), torch.ones(64, 1)
    call = ops.Prepared(weights, [a] * 50, [b] * 50, [1.0] * 50, [1] * 50, "cpu")
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                call()
                ops.Prepared([torch.zeros(64, 64)], [a], [b], [1.0], [1], "cpu")()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    for weight in weights:
        assert torch.equal(weight, weight.round())
        assert 20 <= weight.min() <= weight.max() <= 80


@needs_library
def test_modes_and_subclasses_see_the_op_and_not_the_prepared_one() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: object = None) -> object:
            seen.append(str(func))
            return func(*args)

    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, func: Callable, types: object, args: tuple = (), kwargs: object = None) -> object:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    lists = made()
    call = ops.Prepared(*lists)
    with Watch():
        check_old = [weight.sum().item() for weight in lists[0]]
        seen.clear()
        call()
    assert seen == ["portllm.lowrank_add_.default"]
    assert all(weight.sum().item() != old for weight, old in zip(lists[0], check_old, strict=True))
    seen.clear()
    lists[0][0] = lists[0][0].as_subclass(Subclass)
    ops.Prepared(*lists)()
    assert any("portllm.lowrank_add_" in name for name in seen)


# -- plans -----------------------------------------------------------------------------------------------------------


def test_a_prepared_plan_adds_its_terms_at_each_call() -> None:
    """Whole weights are found after a move; where a view of a tensor is written, the move is an error."""
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    whole, part = torch.nn.Parameter(torch.randn(8, 6)), torch.randn(10, 6)
    term = Term(a, b, 0.5)
    whole_update = Update("whole", Region(None, (0, 8), (0, 6)), (term,), ())
    write = prepare(Plan((whole_update,)), {"whole": whole})
    for _ in range(2):
        check(write, ([whole], [a], [b], [0.5], [1]))
    whole.data = torch.randn(8, 6)
    check(write, ([whole], [a], [b], [0.5], [1]))

    plan = Plan((whole_update, Update("part", Region(None, (2, 10), (0, 6)), (term,), ())))
    write = prepare(plan, {"whole": whole, "part": part})
    rest = part[:2].clone()
    check(write, ([part[2:]], [a], [b], [0.5], [1]))
    assert torch.equal(part[:2], rest)
    part.data = torch.randn(10, 6)
    old = whole.detach().clone(), part.clone()
    with pytest.raises(PlanError, match="part has other memory"):
        write()
    assert torch.equal(whole, old[0])
    assert torch.equal(part, old[1])


def test_dora_is_not_written_where_the_shape_has_changed() -> None:
    plain, tuned = torch.randn(8, 6), torch.randn(8, 6)
    a, b = torch.randn(2, 6), torch.randn(8, 2)
    region = Region(None, (0, 8), (0, 6))
    updates = [Update("plain", region, (Term(a, b, 1.0),), ()), Update("dora", region, (Term(a, b, 1.0, b[:, 0]),), ())]
    write = prepare(Plan(tuple(updates)), {"plain": plain, "dora": tuned})
    write()
    old = plain.clone()
    tuned.resize_(7, 6)
    with pytest.raises(PlanError, match="dora has other memory or another shape"):
        write()
    assert torch.equal(plain, old)


def test_replaced_tensors_are_not_written_where_they_were() -> None:
    tensor, value = torch.randn(5), torch.randn(5)
    write = prepare(Plan((), (Assign("norm", value, None, 1.0, ()),)), {"norm": tensor})
    write()
    assert torch.equal(tensor, value)
    tensor.data = torch.zeros(5)
    with pytest.raises(PlanError, match="norm has other memory"):
        write()
    assert not tensor.any()
