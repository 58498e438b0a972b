"""DoRA: right to the last rounding on every backend, in one call or in two with the squares between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from portllm import dora, ops
from portllm.execute import execute, prepare
from portllm.planning import Plan, Region, Term, Update

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (BF16, FP16, FP32, FP64)
MANTISSA = {BF16: (7, -126), FP16: (10, -14), FP32: (23, -126), FP64: (52, -1022)}  # bits; smallest normal exponent
BACKENDS = ["torch", *(["cpu"] if ops.unavailable("cpu") is None else [])]
backends = pytest.mark.parametrize("backend", BACKENDS)
LAYOUTS = ("contiguous", "columns", "transposed", "strided")


@dataclass
class Job:
    """A weight and its terms; axis -1 is a plain term, whose magnitude is not used."""

    weight: Tensor
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scalings: list[float]
    magnitudes: list[Tensor]
    axes: list[int]
    strengths: list[float]

    @property
    def factors(self) -> tuple[list[Tensor], list[Tensor], list[float], list[int]]:
        return self.lora_A, self.lora_B, self.scalings, [len(self.lora_A)]

    def squares(self, backend: str) -> list[Tensor]:
        return dora.lowrank_dora_squares([self.weight], *self.factors, self.axes, backend)

    def write(self, backend: str, squares: Sequence[Tensor] = ()) -> Tensor:
        vectors = [self.magnitudes, self.axes, self.strengths, squares]
        dora.lowrank_dora_([self.weight], *self.factors, *vectors, backend)
        return self.weight

    def cut(self, rows: slice, columns: slice) -> Job:
        """The job for a rectangle, which is a view."""
        norms = (axis for axis in self.axes if axis >= 0)
        magnitudes = [m[(rows, columns)[axis]] for m, axis in zip(self.magnitudes, norms, strict=True)]
        lora_A, lora_B = [a[:, columns] for a in self.lora_A], [b[rows] for b in self.lora_B]
        return Job(self.weight[rows, columns], lora_A, lora_B, self.scalings, magnitudes, self.axes, self.strengths)

    def truth(self) -> tuple[Tensor, Tensor]:
        """In float64: what the weight becomes before it is rounded, and how far off that fp32 (fp64) may make it."""
        unit = 2.0**-53 if self.weight.dtype == FP64 else 2.0**-24
        base = self.weight.double()
        total, error = base * (1 - sum(s for s, axis in zip(self.strengths, self.axes, strict=True) if axis >= 0)), 0
        size = base.abs() * sum(abs(s) + 1 for s in self.strengths)
        magnitudes = iter(self.magnitudes)
        for a, b, scaling, axis, strength in zip(
            self.lora_A, self.lora_B, self.scalings, self.axes, self.strengths, strict=True
        ):
            delta = scaling * (b.double() @ a.double())
            # A sum of k products is off by k units of their magnitudes; scaling and adding take a few more.
            off = (a.shape[0] + 6) * unit * (abs(scaling) * (b.double().abs() @ a.double().abs()) + base.abs())
            if axis < 0:
                total, error, size = total + strength * delta, error + abs(strength) * off, size + abs(strength * delta)
                continue
            tuned = base + delta
            norm = torch.linalg.vector_norm(tuned, dim=1 - axis, keepdim=True)
            magnitude = next(magnitudes).double().unsqueeze(1 - axis)
            ratio = torch.where(norm > 0, magnitude / norm, 0.0) * strength
            relative = torch.linalg.vector_norm(off, dim=1 - axis, keepdim=True) / norm.clamp_min(1e-300) + 6 * unit
            total = total + ratio * tuned
            error = error + ratio.abs() * (off + relative * tuned.abs())
            size = size + (ratio * tuned).abs()
        return total, error + (len(self.axes) + 4) * unit * size


def assert_right(job: Job, truth: tuple[Tensor, Tensor]) -> None:
    exact, error = truth
    bits, least = MANTISSA[job.weight.dtype]
    largest = exact.abs() + error
    half = torch.exp2(largest.clamp_min(2.0**-1000).log2().floor().clamp_min(least) - bits - 1)
    wrong = (job.weight.double() - exact).abs() - (error + half)
    assert wrong.max() <= 0, f"off by {(wrong + error + half).max():.3g}"


def make(
    m: int,
    n: int,
    axes: Sequence[int],
    *,
    dtype: torch.dtype = BF16,
    factors: torch.dtype = FP32,
    layout: str = "contiguous",
    strengths: Sequence[float] | None = None,
) -> Job:
    if layout == "columns":
        weight = torch.randn(m, n + 5)[:, 3 : n + 3].to(dtype)
    elif layout == "transposed":
        weight = torch.randn(n, m).to(dtype).T
    elif layout == "strided":
        weight = torch.randn(2 * m, 3 * n).to(dtype)[::2, 1::3]
    else:
        weight = torch.randn(m, n).to(dtype)
    ranks = [1 + 7 * i % 19 for i in range(1, len(axes) + 1)]
    return Job(
        weight,
        [torch.randn(r, n).to(factors) for r in ranks],
        [torch.randn(m, r).to(factors) for r in ranks],
        [0.3 + i for i in range(len(axes))],
        [torch.rand((m, n)[axis]) + 0.5 for axis in axes if axis >= 0],
        list(axes),
        list(strengths or [1.0] * len(axes)),
    )


SHAPES = [(1, 1), (1, 300), (300, 1), (5, 64), (65, 129), (129, 1031), (400, 33)]
AXES = [(0,), (1,), (0, 0), (1, -1), (-1, 0, -1, 1), (0, 1, 1)]


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_near_the_float64_truth(axes: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    for i, (m, n) in enumerate(SHAPES):
        for layout in LAYOUTS:
            strengths = [1.0, 0.7, -0.4, 1.3][: len(axes)] if i % 2 else None
            job = make(m, n, axes, dtype=dtype, factors=DTYPES[i % 4], layout=layout, strengths=strengths)
            truth = job.truth()
            job.write(backend)
            assert_right(job, truth)


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_two_calls_give_the_bits_of_one(axes: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    for m, n in SHAPES:
        job = make(m, n, axes, dtype=dtype)
        other = Job(job.weight.clone(), *list(vars(job).values())[1:])
        squares = job.squares(backend)
        assert torch.equal(job.weight, other.weight)
        assert [s.dtype for s in squares] == [FP64] * sum(axis >= 0 for axis in axes)
        assert torch.equal(job.write(backend, squares), other.write(backend))


@backends
@pytest.mark.parametrize("axes", AXES, ids=str)
def test_rectangles_whose_squares_are_summed(axes: tuple[int, ...], backend: str) -> None:
    """Cut between its vectors, a weight has the same bits; cut through them, the norms' last bits may move."""
    m, n = 150, 331
    for cut in [(slice(0, 70), slice(None)), (slice(None), slice(0, 100))]:
        whole = make(m, n, axes, dtype=FP32)
        pieces = Job(whole.weight.clone(), *list(vars(whole).values())[1:])
        rest = tuple(slice(s.stop, None) if s.stop else s for s in cut)
        jobs = [pieces.cut(*cut), pieces.cut(*rest)]
        found = [job.squares(backend) for job in jobs]
        through = [(0, 1)[cut[0].stop is None] == 1 - axis for axis in axes if axis >= 0]
        sums = [a + b if cut_through else None for a, b, cut_through in zip(*found, through, strict=True)]
        truth = whole.truth()
        expected = whole.write(backend)
        for job, squares in zip(jobs, found, strict=True):
            job.write(backend, [mine if s is None else s for mine, s in zip(squares, sums, strict=True)])
        assert_right(pieces, truth)
        if not any(through) and backend != "torch":  # the matrix library sums as the shape suggests
            assert torch.equal(pieces.weight, expected)


@backends
@pytest.mark.parametrize("axis", [0, 1])
def test_zeros_stay_and_what_is_not_finite_spreads_no_further_than_its_vector(axis: int, backend: str) -> None:
    job = make(70, 90, (axis,), dtype=FP32)
    vectors = job.weight if axis == 0 else job.weight.T
    (job.lora_B[0] if axis == 0 else job.lora_A[0].T)[[3, 40, 41]] = 0
    vectors[3] = 0
    vectors[40, 7] = torch.nan
    vectors[41, 8] = torch.inf
    untouched = [i for i in range(len(vectors)) if i not in (3, 40, 41)]
    job.write(backend)
    assert torch.all(vectors[3] == 0)
    for row, column in ((40, 7), (41, 8)):
        assert torch.isnan(vectors[row, column])
        assert torch.all(vectors[row, torch.arange(vectors.shape[1]) != column] == 0)
    assert torch.isfinite(vectors[untouched]).all()


@backends
def test_squares_beyond_the_range_of_fp32(backend: str) -> None:
    for size in (1e-30, 1e30):
        job = make(9, 200, (0,), dtype=FP32)
        job.weight *= size
        job.scalings = [size]
        truth = job.truth()
        job.write(backend)
        assert_right(job, truth)


@backends
def test_empty_weights(backend: str) -> None:
    for m, n in ((0, 4), (4, 0)):
        for axis in (0, 1):
            job = make(m, n, (axis,))
            squares = job.squares(backend)[0]
            assert squares.shape == ((m, n)[axis],)
            assert not squares.any()
            job.write(backend)
    dora.lowrank_dora_([], [], [], [], [], [], [], [])
    assert dora.lowrank_dora_squares([], [], [], [], [], []) == []


def test_a_list_of_weights_of_several_kinds_and_backends() -> None:
    jobs = [make(20 + i, 30, AXES[i % len(AXES)], dtype=DTYPES[i % 4]) for i in range(9)]
    expected = [Job(job.weight.clone(), *list(vars(job).values())[1:]).write("auto") for job in jobs]

    def all_of(name: str) -> list:
        return [value for job in jobs for value in getattr(job, name)]

    factors = all_of("lora_A"), all_of("lora_B"), all_of("scalings"), [len(job.axes) for job in jobs]
    vectors = all_of("magnitudes"), all_of("axes"), all_of("strengths")
    weights = [job.weight for job in jobs]
    squares = dora.lowrank_dora_squares(weights, *factors, vectors[1])
    assert all(
        torch.equal(a, b) for a, b in zip(squares, [s for job in jobs for s in job.squares("auto")], strict=True)
    )
    versions = [weight._version for weight in weights]
    dora.lowrank_dora_(weights, *factors, *vectors)
    assert all(torch.equal(weight, want) for weight, want in zip(weights, expected, strict=True))
    assert [weight._version for weight in weights] == [version + 1 for version in versions]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes": [0, 2]}, "axes must have 0, 1 or -1 for each of the 2 terms"),
        ({"axes": [0]}, "axes must have 0, 1 or -1 for each of the 2 terms"),
        ({"strengths": [1.0]}, "2 terms, but 1 strengths"),
        ({"magnitudes": [torch.ones(4)]}, "2 terms have a norm, but there are 1 magnitudes"),
        ({"magnitudes": [torch.ones(4), torch.ones(4)]}, r"magnitudes\[1\] is float32 \(4,\) on cpu; .*\(6,\)"),
        ({"magnitudes": [torch.ones(4, dtype=torch.int8), torch.ones(6)]}, r"magnitudes\[0\] is int8 \(4,\)"),
        ({"squares": [torch.ones(4), torch.ones(6)]}, r"squares\[0\] is float32 \(4,\) on cpu; it must be fp64"),
        ({"scalings": [1.0]}, "1 scalings"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_the_first_write(change: dict, message: str) -> None:
    job = make(4, 6, (0, 1))
    before = job.weight.clone()
    vars(job).update({name: value for name, value in change.items() if name != "squares"})
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            job.write(backend, change.get("squares", ()))
    assert torch.equal(job.weight, before)


def test_opcheck() -> None:
    job = make(4, 6, (0, -1, 1))
    for squares in ([], job.squares("torch")):
        args = ([job.weight], *job.factors, job.magnitudes, job.axes, job.strengths, squares)
        result = torch.library.opcheck(torch.ops.portllm.lowrank_dora_.default, args)
        assert set(result.values()) == {"SUCCESS"}
    result = torch.library.opcheck(
        torch.ops.portllm.lowrank_dora_squares.default, ([job.weight], *job.factors, job.axes)
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("axis", [0, 1])
def test_a_plan_on_pieces_of_a_weight_reduces_the_squares_before_it_adds(axis: int) -> None:
    """Each piece is written by a plan of its own, as on machines that hold a piece each."""
    m, n = 60, 44
    lora_A, lora_B, weight = torch.randn(3, n), torch.randn(m, 3), torch.randn(m, n)
    terms = (Term(lora_A, lora_B, 0.5, torch.rand((m, n)[axis]), axis, 0.8), Term(lora_A, lora_B, 0.1))
    whole = weight.clone()
    execute(Plan((Update("w", Region(None, (0, m), (0, n)), terms, ("module",)),)), {"w": whole})
    rows, columns = ((slice(None), slice(0, 20)), (slice(0, 20), slice(None)))[axis]
    pieces = [(rows, columns), tuple(slice(20, None) if part.stop else part for part in (rows, columns))]
    found = dora.lowrank_dora_squares(
        [weight[piece] for piece in pieces],
        [lora_A[:, piece[1]] for piece in pieces],
        [lora_B[piece[0]] for piece in pieces],
        [0.5, 0.5], [1, 1], [axis, axis],
    )  # fmt: skip
    result = weight.clone()
    for i, piece in enumerate(pieces):
        tensor, plain = result[piece], torch.zeros(2, 2)
        seen: list[Tensor] = []

        def reduce(squares: Sequence[Sequence[Tensor]], seen: list = seen, plain: Tensor = plain) -> list[Tensor]:
            assert not plain.any()
            (mine,) = squares
            seen.extend(mine)
            return [found[0] + found[1]]

        region = Region(None, (0, tensor.shape[0]), (0, tensor.shape[1]))
        small = Update("p", Region(None, (0, 2), (0, 2)), (Term(torch.ones(1, 2), torch.ones(2, 1), 1.0),), ())
        plan = Plan((small, Update("w", region, tuple(t.cut(*piece) for t in terms), ())))
        write = prepare(plan, {"w": tensor, "p": plain}, reduce=reduce)
        assert not seen
        write()
        assert len(seen) == 1
        assert torch.equal(seen[0], found[i])
        assert plain.all()
    torch.testing.assert_close(result, whole, rtol=1e-5, atol=1e-5)
