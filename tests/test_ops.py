"""``torch.ops.portllm.lowrank_add_``: a well-behaved torch op, right to the last rounding on every backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from portllm import BackendError, lowrank_add_, ops, reference

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32, FP64)
MANTISSA = {BF16: (7, -126), FP16: (10, -14), FP32: (23, -126), FP64: (52, -1022)}  # bits; smallest normal exponent

# Every backend that runs here, with a device that it runs on. Triton's interpreter has tests of its own.
PLACES = [("torch", "cpu")]
if ops.unavailable("cpu") is None:
    PLACES.append(("cpu", "cpu"))
if torch.cuda.is_available():
    PLACES += [("torch", "cuda"), *((name, "cuda") for name in ("triton", "cuda") if ops.unavailable(name) is None)]
NO_FP64 = ("triton", "cuda")
places = pytest.mark.parametrize("backend, device", PLACES, ids=[f"{b}-{d}" for b, d in PLACES])
quick = settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))

Term = tuple[Tensor, Tensor, float]  # lora_A [r, n], lora_B [m, r], scaling


def update(jobs: Sequence[tuple[Tensor, Sequence[Term]]], backend: str = "auto") -> None:
    """One call of the op over weights and their terms."""
    terms = [term for _, terms in jobs for term in terms]
    lowrank_add_(
        [weight for weight, _ in jobs],
        [a for a, _, _ in terms],
        [b for _, b, _ in terms],
        [scaling for _, _, scaling in terms],
        [len(terms) for _, terms in jobs],
        backend,
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def truth(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """In float64."""
    return weight.double() + sum(scaling * (b.double() @ a.double()) for a, b, scaling in terms)


def bound(weight: Tensor, terms: Sequence[Term], exact: Tensor) -> Tensor:
    """Half a unit in the last place of the weight's dtype, and what sums in fp32 (fp64) of this length may lose.

    A sum of k products in a precision u is off by at most k u sum |b||a| (1 + O(u)); on top come the rounding of
    fp64 factors to fp32, the scaling, the sum over the terms and the sum with the weight: one u each.
    """
    unit = 2.0**-53 if weight.dtype == FP64 else 2.0**-24
    length = max(a.shape[0] for a, _, _ in terms) + len(terms) + 6
    size = sum(abs(scaling) * (b.double().abs() @ a.double().abs()) for a, b, scaling in terms)
    lost = 1.01 * length * unit * (size + weight.double().abs())
    mantissa, smallest = MANTISSA[weight.dtype]
    exponent = torch.frexp(exact.abs() + lost).exponent - 1
    half_ulp = torch.ldexp(torch.ones_like(exact), exponent.clamp_min(smallest) - mantissa - 1)
    return half_ulp + lost


def check(weight: Tensor, terms: Sequence[Term], result: Tensor) -> None:
    weight, result, terms = weight.cpu(), result.cpu(), [(a.cpu(), b.cpu(), s) for a, b, s in terms]
    exact = truth(weight, terms)
    excess = (result.double() - exact).abs() - bound(weight, terms, exact)
    ranks = [a.shape[0] for a, _, _ in terms]
    assert excess.max() <= 0, f"{weight.dtype} {tuple(weight.shape)}, ranks {ranks}: over by {excess.max()}"


def laid_out(values: Tensor, layout: str, poison: float = float("nan")) -> tuple[Tensor, Tensor]:
    """The same values as a view with other strides into a larger tensor of ``poison``; the view, the whole."""
    m, n = values.shape
    full = {"dtype": values.dtype, "device": values.device}
    if layout == "rows":
        whole = torch.full((m + 5, n), poison, **full)
        view = whole[2 : m + 2]
    elif layout == "columns":
        whole = torch.full((m, n + 9), poison, **full)
        view = whole[:, 3 : n + 3]
    elif layout == "transposed":
        whole = torch.full((n + 2, m), poison, **full)
        view = whole[1 : n + 1].T
    elif layout == "corner":
        whole = torch.full((m + 3, n + 17), poison, **full)
        view = whole[1 : m + 1, 5 : n + 5]
    elif layout == "strided":
        whole = torch.full((2 * m, 3 * n), poison, **full)
        view = whole[::2, 1::3]
    else:
        whole = view = torch.empty(m, n, **full)
    return view.copy_(values), whole


LAYOUTS = ("plain", "rows", "columns", "transposed", "corner", "strided")
SIZES = (1, 2, 3, 7, 16, 31, 63, 64, 65, 100, 129)


@dataclass(frozen=True)
class Case:
    """What one weight of a call looks like."""

    shape: tuple[int, int]
    dtype: torch.dtype
    layout: str
    terms: tuple[tuple[int, torch.dtype, torch.dtype, str, str, float], ...]  # rank, dtypes, layouts (A, B), scaling

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor, list[Term]]:
        m, n = self.shape
        weight, whole = laid_out(torch.randn(m, n).to(self.dtype).to(device), self.layout)
        terms = []
        for rank, dtype_a, dtype_b, layout_a, layout_b, scaling in self.terms:
            a = laid_out(torch.randn(rank, n).to(dtype_a).to(device), layout_a)[0]
            b = laid_out(torch.randn(m, rank).to(dtype_b).to(device), layout_b)[0]
            terms.append((a, b, scaling))
        return weight, whole, terms


_layouts = st.sampled_from(LAYOUTS)
_dtypes = st.sampled_from(DTYPES)
_term = st.tuples(
    st.sampled_from((1, 2, 3, 4, 7, 8, 16, 31, 64)), _dtypes, _dtypes, _layouts, _layouts,
    st.floats(-4, 4, allow_subnormal=False),
)  # fmt: skip
_case = st.builds(
    Case,
    st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES)),
    _dtypes,
    _layouts,
    st.lists(_term, min_size=1, max_size=3).map(tuple),
)


@places
@quick
@given(cases=st.lists(_case, min_size=1, max_size=3))
@example(cases=[Case((1, 1), BF16, "plain", ((1, FP32, FP32, "plain", "plain", 0.0),))])
def test_within_the_bound_of_float64_whatever_the_shape_dtype_and_strides(
    backend: str, device: str, cases: list[Case]
) -> None:
    if backend in NO_FP64:
        cases = [case for case in cases if case.dtype != FP64]
    made = [case.make(device) for case in cases]
    before = [(weight.clone(), whole.clone()) for weight, whole, _ in made]
    factors = [(a.clone(), b.clone()) for _, _, terms in made for a, b, _ in terms]
    update([(weight, terms) for weight, _, terms in made], backend)
    for (weight, whole, terms), (old, old_whole) in zip(made, before, strict=True):
        check(old, terms, weight)
        # The neighbours: put the old values back, and all is as it was, NaN for NaN.
        weight.copy_(old)
        assert torch.equal(bits(whole), bits(old_whole))
    for (a, b), (old_a, old_b) in zip(((a, b) for _, _, t in made for a, b, _ in t), factors, strict=True):
        assert torch.equal(a, old_a)
        assert torch.equal(b, old_b)


@places
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, rank", [((1000, 63), 16), ((63, 1000), 1), ((5, 1000), 1024), ((1000, 7), 333)])
def test_large_and_odd(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, int], rank: int) -> None:
    if backend in NO_FP64 and dtype == FP64:
        pytest.skip(f"{backend} has no fp64")
    factors = BF16 if rank == 333 else FP32
    case = Case(shape, dtype, "columns", ((rank, factors, factors, "plain", "rows", 0.7),))
    weight, _, terms = case.make(device)
    old = weight.clone()
    update([(weight, terms)], backend)
    check(old, terms, weight)


@places
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_sums_give_the_same_bits_everywhere(backend: str, device: str, dtype: torch.dtype) -> None:
    """Small integers: every order of summation is exact, so only the one rounding at the end is left."""
    if backend in NO_FP64 and dtype == FP64:
        pytest.skip(f"{backend} has no fp64")
    for shape, ranks in [((1, 1), (1,)), ((63, 130), (4, 9)), ((129, 1000), (32,)), ((65, 64), (1, 2, 64))]:
        weight = torch.randint(-300, 300, shape).to(dtype)
        terms = [
            (torch.randint(-3, 4, (r, shape[1])).float(), torch.randint(-3, 4, (shape[0], r)).to(BF16), 0.5 * (i + 1))
            for i, r in enumerate(ranks)
        ]
        expected = truth(weight, terms).to(dtype)
        plain = weight.clone()
        reference.lowrank_add_([plain], *map(list, zip(*terms, strict=True)), [len(terms)])
        result = weight.clone().to(device)
        update([(result, [(a.to(device), b.to(device), s) for a, b, s in terms])], backend)
        assert torch.equal(bits(result.cpu()), bits(expected))
        assert torch.equal(bits(plain), bits(expected))
        assert shape == (1, 1) or not torch.equal(plain, weight)


@places
def test_one_rounding_to_nearest_even(backend: str, device: str) -> None:
    """Deltas of exactly half a unit: up from an odd last bit, down from an even one; PEFT's two roundings differ."""
    weight = torch.tensor([[1.0, 1.0 + 2**-7, -1.0, -1.0 - 2**-7]], dtype=BF16, device=device)
    a = torch.tensor([[1.0, 1.0, -1.0, -1.0]], device=device)
    update([(weight, [(a, torch.tensor([[2.0**-8]], device=device), 1.0)])], backend)
    assert weight.tolist() == [[1.0, 1.0 + 2**-6, -1.0, -1.0 - 2**-6]]
    # Two terms that alone round to nothing together move the weight: they are summed before the rounding.
    weight = torch.ones(1, 4, dtype=BF16, device=device)
    third = (torch.ones(1, 4, device=device), torch.full((1, 1), 2.0**-9 * 1.5, device=device), 1.0)
    update([(weight, [third, third])], backend)
    assert weight.tolist() == [[1.0 + 2**-7] * 4]


@places
def test_the_same_bits_from_run_to_run_and_alone_or_in_a_list(backend: str, device: str) -> None:
    cases = [
        Case((65, 129), BF16, "plain", ((16, FP32, FP32, "plain", "plain", 0.3), (3, BF16, FP16, "rows", "rows", 2.0))),
        Case((1000, 63), FP32, "columns", ((31, FP32, FP32, "transposed", "plain", -1.1),)),
        Case((7, 1000), FP16, "rows", ((8, FP32, FP32, "plain", "columns", 0.9),)),
    ]
    made = [case.make(device) for case in cases]
    old = [weight.clone() for weight, _, _ in made]
    together = [(weight.clone(), terms) for weight, _, terms in made]
    update(together, backend)
    for _ in range(2):
        for (weight, _, terms), start, (result, _) in zip(made, old, together, strict=True):
            weight.copy_(start)
            update([(weight, terms)], backend)
            assert torch.equal(bits(weight), bits(result))


@pytest.fixture
def medium_precision() -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(previous)


@places
def test_bits_do_not_depend_on_the_matmul_precision_that_the_user_set(
    backend: str, device: str, medium_precision: None
) -> None:
    # Large enough that the matrix library would really use bf16, where the CPU has it.
    case = Case((256, 256), FP32, "plain", ((512, FP32, FP32, "plain", "plain", 1.0),))
    weight, _, terms = case.make(device)
    low = weight.clone()
    update([(low, terms)], backend)
    assert torch.get_float32_matmul_precision() == "medium"
    check(weight, terms, low)
    torch.set_float32_matmul_precision("highest")
    update([(weight, terms)], backend)
    assert torch.equal(bits(weight), bits(low))


SETTINGS = (
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.mkldnn.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'",
)


def test_every_way_to_set_the_precision_is_overruled_and_restored() -> None:
    """Also torch's newer switches, with which its older getter raises an error; each in a fork of its own."""
    code = f"""
import os, torch
from portllm import lowrank_add_, ops
torch.set_num_threads(1)
w, a, b = torch.randn(256, 256), torch.randn(512, 256), torch.randn(256, 512)
backends = [name for name in ("torch", "cpu") if ops.unavailable(name) is None]
def update(backend):
    copy = w.clone()
    lowrank_add_([copy], [a], [b], [1.0], [1], backend)
    return copy
def state():
    return [x.fp32_precision for x in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
expected = [update(backend) for backend in backends]
for setting in {SETTINGS}:
    if os.fork() == 0:
        exec(setting)
        before, product = state(), b @ a
        same = all(torch.equal(update(backend), old) for backend, old in zip(backends, expected))
        os._exit(0 if same and state() == before and torch.equal(b @ a, product) else 1)
    if os.wait()[1]:
        print(setting)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@places
def test_zero_sizes_and_empty_lists(backend: str, device: str) -> None:
    update([], backend)
    for m, n in [(0, 5), (5, 0), (0, 0)]:
        weight = torch.zeros(m, n, device=device)
        update([(weight, [(torch.zeros(2, n, device=device), torch.zeros(m, 2, device=device), 1.0)])], backend)
        assert weight.shape == (m, n)


# -- errors come before the first write ------------------------------------------------------------------------------

Lists = dict[str, list]


def _valid() -> Lists:
    """Two weights with two and one terms."""
    return {
        "weights": [torch.randn(6, 5), torch.randn(4, 3).to(BF16)],
        "lora_A": [torch.randn(2, 5), torch.randn(3, 5), torch.randn(2, 3)],
        "lora_B": [torch.randn(6, 2), torch.randn(6, 3), torch.randn(4, 2)],
        "scalings": [1.0, 0.5, 2.0],
        "n_terms": [2, 1],
    }


def _set(key: str, index: int, value: object) -> Callable[[Lists], None]:
    def change(lists: Lists) -> None:
        lists[key][index] = value

    return change


BROKEN: dict[str, tuple[Callable[[Lists], object], str]] = {
    "a scaling is missing": (lambda c: c["scalings"].pop(), "2 scalings"),
    "a lora_A is missing": (lambda c: c["lora_A"].pop(), "2 lora_A"),
    "a lora_B too many": (lambda c: c["lora_B"].append(torch.randn(4, 2)), "4 lora_B"),
    "n_terms is short": (lambda c: c["n_terms"].pop(), "1 entries of n_terms"),
    "n_terms sums to too much": (_set("n_terms", 1, 2), "sum 4"),
    "no term": (lambda c: c.update(n_terms=[3, 0]), r"n_terms\[1\] is 0|shape"),
    "no term, whose neighbour has all": (
        lambda c: c.update(weights=[c["weights"][0], torch.randn(6, 5)], n_terms=[2, 0], lora_A=c["lora_A"][:2],
                           lora_B=c["lora_B"][:2], scalings=[1.0, 1.0]), r"n_terms\[1\] is 0"),
    "negative terms": (lambda c: c.update(n_terms=[4, -1]), "shape|n_terms"),
    "a vector": (_set("weights", 1, torch.randn(4)), r"weights\[1\] is float32 \(4,\); it must be 2-D"),
    "a stack": (_set("weights", 1, torch.randn(2, 4, 3)), r"weights\[1\]"),
    "integers": (_set("weights", 1, torch.ones(4, 3, dtype=torch.int32)), r"weights\[1\] is int32"),
    "fp8": (_set("weights", 1, torch.ones(4, 3).to(torch.float8_e4m3fn)), r"weights\[1\] is float8_e4m3fn"),
    "complex": (_set("weights", 1, torch.ones(4, 3, dtype=torch.complex64)), r"weights\[1\] is complex64"),
    "A is too wide": (_set("lora_A", 2, torch.randn(2, 4)), r"lora_A\[2\] \(2, 4\) does not give the shape \(4, 3\)"),
    "B is too tall": (_set("lora_B", 2, torch.randn(5, 2)), r"lora_B\[2\] \(5, 2\)"),
    "the ranks differ": (_set("lora_A", 2, torch.randn(3, 3)), r"lora_B\[2\] \(4, 2\) @ lora_A\[2\] \(3, 3\)"),
    "rank 0": (lambda c: (_set("lora_A", 2, torch.randn(0, 3))(c), _set("lora_B", 2, torch.randn(4, 0))(c)), r"\[2\]"),
    "A is a vector": (_set("lora_A", 2, torch.randn(3)), r"lora_A\[2\] \(3,\)"),
    "B is a stack": (_set("lora_B", 2, torch.randn(4, 2, 1)), r"lora_B\[2\]"),
    "swapped factors": (lambda c: c.update(lora_A=c["lora_B"], lora_B=c["lora_A"]), "does not give the shape"),
    "integer factors": (_set("lora_A", 2, torch.ones(2, 3, dtype=torch.int64)), "term 2 is int64"),
    "fp8 factors": (_set("lora_B", 2, torch.ones(4, 2).to(torch.float8_e5m2)), "term 2 is .*float8_e5m2"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("backend", ["auto", *dict.fromkeys(b for b, d in PLACES if d == "cpu")])
def test_errors_leave_every_weight_as_it_was(case: str, backend: str) -> None:
    lists = _valid()
    change, message = BROKEN[case]
    change(lists)
    before = [weight.clone() for weight in lists["weights"]]
    with pytest.raises(ValueError, match=message):
        lowrank_add_(*lists.values(), backend)
    for weight, old in zip(lists["weights"], before, strict=True):
        assert torch.equal(weight.view(torch.uint8), old.view(torch.uint8))


def test_the_unbroken_call_works() -> None:
    lists = _valid()
    before = [weight.clone() for weight in lists["weights"]]
    lowrank_add_(*lists.values())
    assert not any(torch.equal(w, b) for w, b in zip(lists["weights"], before, strict=True))


@pytest.mark.parametrize("key, index", [("weights", 1), ("lora_A", 1), ("lora_B", 2)])
def test_a_tensor_without_data_among_others_is_an_error(key: str, index: int) -> None:
    """A meta tensor must not turn the whole call into one that writes nothing, in silence."""
    lists = _valid()
    lists[key][index] = lists[key][index].to("meta")
    before = [weight.clone() for weight in lists["weights"]]
    with pytest.raises(ValueError, match="meta"):
        lowrank_add_(*lists.values())
    assert torch.equal(lists["weights"][0], before[0])


def test_a_weight_without_data_among_others_is_an_error() -> None:
    """Also where its factors are without data too, so that nothing in its own row is amiss."""
    lists = _valid()
    for key, index in (("weights", 1), ("lora_A", 2), ("lora_B", 2)):
        lists[key][index] = lists[key][index].to("meta")
    before = lists["weights"][0].clone()
    with pytest.raises(ValueError, match="meta"):
        lowrank_add_(*lists.values())
    assert torch.equal(lists["weights"][0], before)


@pytest.mark.parametrize("backend", ["nonsense", "", "CPU", "gpu"])
def test_unknown_backends(backend: str) -> None:
    lists = _valid()
    before = [weight.clone() for weight in lists["weights"]]
    with pytest.raises(BackendError, match=f"no backend '{backend}'; choose from torch, cpu, triton, cuda"):
        lowrank_add_(*lists.values(), backend)
    assert all(torch.equal(w, b) for w, b in zip(lists["weights"], before, strict=True))


def test_a_backend_that_takes_only_some_of_the_weights_writes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    lists = _valid()
    before = [weight.clone() for weight in lists["weights"]]
    monkeypatch.setattr(ops, "_takes", lambda name, weight: "it is of another shape" if len(weight) == 4 else None)
    with pytest.raises(BackendError, match=r"'torch' cannot update a bfloat16 \(4, 3\) on cpu: it is of another shape"):
        lowrank_add_(*lists.values(), "torch")
    assert all(torch.equal(w, b) for w, b in zip(lists["weights"], before, strict=True))


def test_one_call_may_need_two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go to the backend that takes them, each with its own terms."""
    used: dict[str, list[tuple[int, ...]]] = {}

    def launcher(name: str) -> Callable[..., None]:
        def launch(weights: Sequence[Tensor], *rest: Sequence) -> None:
            used[name] = [tuple(w.shape) for w in weights]
            reference.lowrank_add_(weights, *rest)

        return launch

    monkeypatch.setattr(ops, "_launcher", launcher)
    monkeypatch.setattr(ops, "backend_for", lambda w, requested: "cpu" if w.dtype == BF16 else "torch")
    cases = [
        Case((3, 4), BF16, "plain", ((1, FP32, FP32, "plain", "plain", 1.0), (2, FP32, FP32, "plain", "plain", 3.0))),
        Case((5, 6), FP32, "plain", ((3, FP32, FP32, "plain", "plain", 2.0),)),
        Case((7, 8), BF16, "plain", ((4, FP32, FP32, "plain", "plain", 0.5),)),
    ]
    made = [case.make() for case in cases]
    old = [weight.clone() for weight, _, _ in made]
    update([(weight, terms) for weight, _, terms in made])
    assert used == {"cpu": [(3, 4), (7, 8)], "torch": [(5, 6)]}
    for (weight, _, terms), start in zip(made, old, strict=True):
        check(start, terms, weight)
        assert not torch.equal(weight, start)


# -- as a torch op ---------------------------------------------------------------------------------------------------


def test_schema() -> None:
    schema = torch.ops.portllm.lowrank_add_.default._schema
    assert str(schema) == (
        "portllm::lowrank_add_(Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, "
        'int[] n_terms, str backend="auto", int[] modes=[]) -> ()'
    )
    assert schema.is_mutable
    assert [a.is_write for a in (arg.alias_info for arg in schema.arguments) if a is not None] == [True]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck() -> None:
    args = (
        [torch.randn(6, 10)[:, 2:7], torch.randn(3, 2).to(BF16)],
        [torch.randn(2, 5), torch.randn(1, 2), torch.randn(3, 2)],
        [torch.randn(6, 2), torch.randn(3, 1), torch.randn(3, 3)],
        [0.5, 1.0, 2.0],
        [1, 2],
    )
    result = torch.library.opcheck(torch.ops.portllm.lowrank_add_.default, args)
    assert len(result) >= 4
    assert set(result.values()) == {"SUCCESS"}


def test_compiled_without_a_graph_break_as_in_eager() -> None:
    case = Case((6, 5), FP32, "plain", ((2, FP32, FP32, "plain", "plain", 0.5), (1, FP32, FP32, "plain", "plain", 2.0)))
    weight, _, terms = case.make()

    def step(weight: Tensor) -> tuple[Tensor, Tensor]:
        doubled = weight * 2
        update([(weight, terms)])
        return doubled, weight.sum(0)

    expected, old = weight.clone(), weight.clone()
    results = step(expected)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(weight)
    assert torch.equal(weight, expected)
    assert torch.equal(compiled[0], old * 2)
    torch.testing.assert_close(compiled, results)


def test_fake_tensors_are_checked_but_not_computed() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight, a, b = torch.empty(4, 5), torch.empty(2, 5), torch.empty(4, 2)
        lowrank_add_([weight], [a], [b], [1.0], [1])
        with pytest.raises(ValueError, match="does not give the shape"):
            lowrank_add_([weight], [b], [a], [1.0], [1])
    meta = torch.empty(4, 5, device="meta")
    lowrank_add_([meta], [torch.empty(2, 5, device="meta")], [torch.empty(4, 2, device="meta")], [1.0], [1], "cpu")


def test_modes_and_subclasses_see_the_op() -> None:
    """The short way past the dispatcher is only for calls that nothing watches."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    def watched(cls: type, name: str) -> type:
        def handler(self: object, func: Callable, types: object, args: tuple, kwargs: dict | None = None) -> object:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

        return type("Watch", (cls,), {name: handler})

    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, func: Callable, types: object, args: tuple = (), kwargs: object = None) -> object:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    weight, a, b = torch.zeros(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    terms = [(a, b, 0.5)]
    for mode in (watched(TorchDispatchMode, "__torch_dispatch__"), watched(TorchFunctionMode, "__torch_function__")):
        with mode():
            update([(weight, terms)])
        assert "portllm.lowrank_add_" in seen.pop(0)
        seen.clear()
    update([(weight.as_subclass(Subclass), terms)])
    update([(weight, [(a, b.as_subclass(Subclass), 0.5)])])
    assert ["portllm.lowrank_add_" in name for name in seen] == [True, True]
    update([(weight, terms)])
    assert len(seen) == 2
    assert weight.tolist() == [[5.0] * 4] * 3
    assert weight._version == 5


def test_traced_as_one_op() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    a, b = torch.ones(2, 4), torch.ones(3, 2)

    def step(weight: Tensor) -> Tensor:
        result = weight * 2
        update([(result, [(a, b, 0.5)])])
        return result

    graph = make_fx(step)(torch.ones(3, 4))
    assert "portllm.lowrank_add_" in graph.code
    assert graph(torch.zeros(3, 4)).tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize("inference", [False, True])
def test_versions_tell_autograd_of_the_write(inference: bool) -> None:
    weights = [torch.randn(4, 5), torch.randn(4, 5)]
    bystander, a, b = torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    with torch.inference_mode(inference):
        lowrank_add_(weights, [a, a], [b, b], [1.0, 1.0], [1, 1])
    assert [w._version for w in weights] == [1, 1]
    assert [t._version for t in (bystander, a, b)] == [0, 0, 0]


def test_backward_refuses_a_weight_that_was_patched_in_between() -> None:
    weight, x = torch.randn(4, 5), torch.randn(5, 4, requires_grad=True)
    loss = (weight @ x).sum()
    lowrank_add_([weight], [torch.randn(2, 5)], [torch.randn(4, 2)], [1.0], [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors_inside_and_outside_of_inference_mode() -> None:
    case = Case((9, 5), BF16, "plain", ((2, FP32, FP32, "plain", "plain", 1.0),))
    with torch.inference_mode():
        weight, _, terms = case.make()
        old = weight.clone()
        update([(weight, terms)])
    check(old, terms, weight)
    assert weight.is_inference()
    before = weight.clone()
    update([(weight, terms)])
    check(before, terms, weight)


def test_parameters_keep_their_identity_and_need_no_no_grad() -> None:
    layer = torch.nn.Linear(5, 4)
    parameter, pointer, old = layer.weight, layer.weight.data_ptr(), layer.weight.detach().clone()
    a, b = torch.randn(2, 5), torch.randn(4, 2)
    lowrank_add_([layer.weight], [a], [b], [0.25], [1])
    assert layer.weight is parameter
    assert parameter.data_ptr() == pointer
    assert parameter.requires_grad
    assert parameter.is_leaf
    check(old, [(a, b, 0.25)], parameter.detach())


# -- the choice of backend -------------------------------------------------------------------------------------------


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("PORTLLM_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    ops.unavailable.cache_clear()
    yield monkeypatch
    ops.unavailable.cache_clear()


def test_auto_takes_the_fastest_that_is_there(no_settings: pytest.MonkeyPatch) -> None:
    weight = torch.empty(2, 2)
    no_settings.setattr(ops._native, "load", lambda: None)
    assert ops.backend_for(weight) == "cpu"
    ops.unavailable.cache_clear()
    no_settings.setattr(ops._native, "load", lambda: "no compiler")
    assert ops.backend_for(weight) == "torch"
    with pytest.raises(BackendError, match=r"'cpu' cannot update a float32 \(2, 2\) on cpu: no compiler"):
        ops.backend_for(weight, "cpu")


def test_the_environment_chooses_and_an_argument_overrules_it(no_settings: pytest.MonkeyPatch) -> None:
    weight = torch.empty(2, 2)
    no_settings.setattr(ops._native, "load", lambda: None)
    no_settings.setenv("PORTLLM_BACKEND", "torch")
    assert ops.backend_for(weight) == "torch"
    assert ops.backend_for(weight, "cpu") == "cpu"
    no_settings.setenv("PORTLLM_BACKEND", "fpga")
    with pytest.raises(BackendError, match="no backend 'fpga'"):
        ops.backend_for(weight)
    assert ops.backend_for(weight, "torch") == "torch"
    with pytest.raises(BackendError, match="no backend 'fpga'"):
        lowrank_add_([weight], [torch.empty(1, 2)], [torch.empty(2, 1)], [1.0], [1])


def test_triton_says_why_not(no_settings: pytest.MonkeyPatch) -> None:
    weight = torch.empty(2, 2)
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="torch sees no CUDA device"):
            ops.backend_for(weight, "triton")
    else:
        with pytest.raises(BackendError, match="it runs on CUDA devices"):
            ops.backend_for(weight, "triton")
    ops.unavailable.cache_clear()
    no_settings.setattr(ops.importlib.util, "find_spec", lambda name: None)
    assert ops.unavailable("triton") == "triton is not installed"
    ops.unavailable.cache_clear()
    no_settings.undo()
    no_settings.setenv("TRITON_INTERPRET", "1")
    no_settings.delenv("PORTLLM_BACKEND", raising=False)
    if ops.importlib.util.find_spec("triton"):
        assert ops.backend_for(weight, "triton") == "triton"
        with pytest.raises(BackendError, match="it has no fp64"):
            ops.backend_for(weight.double(), "triton")


def test_cuda_says_why_not(no_settings: pytest.MonkeyPatch) -> None:
    weight = torch.empty(2, 2)
    if torch.cuda.is_available():
        no_settings.setattr(ops._native, "load_cuda", lambda: None)
        with pytest.raises(BackendError, match="it runs on CUDA devices"):
            ops.backend_for(weight, "cuda")
    else:
        with pytest.raises(BackendError, match="torch sees no CUDA device"):
            ops.backend_for(weight, "cuda")


def test_without_the_native_library() -> None:
    code = """
import torch
from portllm import BackendError, lowrank_add_, ops, _native
assert _native.load() == ops.unavailable("cpu") == "disabled by PORTLLM_DISABLE_NATIVE"
assert _native.isa() is None
w, a, b = torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)
assert ops.backend_for(w) == "torch"
lowrank_add_([w], [a], [b], [0.5], [1])
assert w.tolist() == [[2.0] * 4] * 3
try:
    lowrank_add_([w], [a], [b], [0.5], [1], "cpu")
except BackendError as error:
    assert "PORTLLM_DISABLE_NATIVE" in str(error)
    assert w.tolist() == [[2.0] * 4] * 3
    print("fine")
"""
    environment = os.environ | {"PORTLLM_DISABLE_NATIVE": "1", "PORTLLM_BACKEND": "auto"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


def test_the_bound_is_tight_enough_to_notice() -> None:
    """The bound refuses a result that was rounded twice, or summed in bf16."""
    weight, terms = torch.randn(64, 64).to(BF16), [(torch.randn(16, 64), torch.randn(64, 16), 1.0)]
    a, b, _ = terms[0]
    twice, coarse, off = weight + (b @ a).to(BF16), weight + b.to(BF16) @ a.to(BF16), weight.float() + 1.01 * (b @ a)
    for wrong in (twice, coarse, off.to(BF16)):
        with pytest.raises(AssertionError):
            check(weight, terms, wrong)
    assert math.isfinite(float(bound(weight, terms, truth(weight, terms)).max()))
