"""The compiled CPU kernel: the bits it promises, whatever the layout, the threads and the instruction set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from portllm import _native, ops  # noqa: F401  (ops defines the schema)

pytestmark = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HALVES_AND_SINGLE = (BF16, FP16, FP32)
ISAS = ("avx512_bf16", "avx512", "avx2", "portable")  # those that give the same bits
SAME_BITS = _native.isa() in ISAS  # not on a matrix unit (AMX), whose sums are as good but in another order

Term = tuple[Tensor, Tensor, float]  # lora_A [r, n], lora_B [m, r], scaling


def update(*jobs: tuple[Tensor, Sequence[Term]]) -> None:
    """One call of the op over weights and their terms."""
    terms = [term for _, terms in jobs for term in terms]
    torch.ops.portllm.lowrank_add_cpu_(
        [weight for weight, _ in jobs],
        [a for a, _, _ in terms],
        [b for _, b, _ in terms],
        [scaling for _, _, scaling in terms],
        [len(terms) for _, terms in jobs],
    )


def emulated(weight: Tensor, terms: Sequence[Term]) -> Tensor:
    """The stated order of operations; 80 bits hold a product exactly, and a sum well enough to round it."""
    wide, single = np.longdouble, np.float32
    total = np.zeros(weight.shape, single)
    for a, b, scaling in terms:
        dot = np.zeros(weight.shape, single)
        rows, columns = a.float().numpy().astype(wide), b.float().numpy().astype(wide)
        for k in range(len(rows)):
            dot = (columns[:, k, None] * rows[k] + dot).astype(single)
        total = (wide(single(scaling)) * dot + total).astype(single)
    return torch.from_numpy(weight.float().numpy() + total).to(weight.dtype)


def make_terms(m: int, n: int, ranks: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Term]:
    """Terms with A and B alternately plain and transposed, and dtypes in turn."""
    terms = []
    for i, rank in enumerate(ranks):
        a, b = torch.randn(rank, n), torch.randn(m, rank)
        if i % 2:
            a, b = torch.randn(n, rank).T, torch.randn(rank, m).T
        terms.append((a.to(dtypes[i % len(dtypes)]), b.to(dtypes[(i + i // 2) % len(dtypes)]), 0.3 + i))
    return terms


def laid_out(weight: Tensor, layout: str) -> Tensor:
    """The same values as a view with other strides, into a larger tensor of sentinels."""
    m, n = weight.shape
    if layout == "rows":
        view = torch.full((m + 3, n), 7, dtype=weight.dtype)[2 : m + 2]
    elif layout == "columns":
        view = torch.full((m, n + 5), 7, dtype=weight.dtype)[:, 3 : n + 3]
    elif layout == "transposed":
        view = torch.full((n, m), 7, dtype=weight.dtype).T
    elif layout == "strided":
        view = torch.full((2 * m, 3 * n), 7, dtype=weight.dtype)[::2, 1::3]
    else:
        view = torch.empty(m, n, dtype=weight.dtype)
    return view.copy_(weight)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    wrong = (bits(got) != bits(want)).sum().item()
    assert wrong == 0, f"{wrong} of {got.numel()} elements differ"


same_bits = pytest.mark.skipif(not SAME_BITS, reason="a matrix unit sums in another order")
needs_80_bits = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="long double is too short here")


@same_bits
@needs_80_bits
@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
@pytest.mark.parametrize("factors", [(BF16,), (FP16,), (FP32,), (FP32, BF16, FP16)], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "ranks"),
    [(1, 1, [1]), (1, 63, [3]), (63, 1, [16]), (40, 1000, [16]), (65, 129, [300]), (37, 70, [1, 64, 5])],
    ids=str,
)
def test_bits_are_those_of_the_stated_order(
    m: int, n: int, ranks: list[int], factors: tuple[torch.dtype, ...], dtype: torch.dtype
) -> None:
    weight = torch.randn(m, n).to(dtype)
    terms = make_terms(m, n, ranks, factors)
    want = emulated(weight, terms)
    update((weight, terms))
    assert_same_bits(weight, want)


@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, FP64], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16, 64, 300])
def test_near_the_float64_truth(rank: int, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 230, dtype=FP64).to(dtype)
    a, b = torch.randn(rank, 230, dtype=FP64), torch.randn(50, rank, dtype=FP64)
    if dtype != FP64:
        a, b = a.float(), b.float()
    exact = weight.double() + 0.7 * (b.double() @ a.double())
    error_bound = 0.7 * rank * (b.double().abs() @ a.double().abs()) + weight.double().abs()
    update((weight, [(a, b, 0.7)]))
    info = torch.finfo(dtype)
    bound = torch.finfo(FP64 if dtype == FP64 else FP32).eps * error_bound
    bound += info.eps * (exact.abs() + info.smallest_normal)
    assert ((weight.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("factors", [(FP32,), (BF16,), (FP16,), (FP64,), (FP32, BF16, FP16, FP64)], ids=str)
@pytest.mark.parametrize("ranks", [[1], [8], [16, 16, 16, 16], [33, 7], [100], [300]], ids=str)
def test_sums_are_as_good_as_fp32(ranks: list[int], factors: tuple[torch.dtype, ...]) -> None:
    """Where factors are split into bf16 parts, all of the parts' products that count are there."""
    weight = torch.randn(37, 150)
    terms = make_terms(37, 150, ranks, factors)
    exact = weight.double() + sum(scaling * (b.double() @ a.double()) for a, b, scaling in terms)
    size = weight.double().abs() + sum(s * (b.double().abs() @ a.double().abs()) for a, b, s in terms)
    update((weight, terms))
    assert ((weight.double() - exact).abs() <= (6 + sum(ranks) ** 0.5) * 2.0**-24 * size).all()


@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, FP64], ids=str)
@pytest.mark.parametrize("factor", [*HALVES_AND_SINGLE, FP64], ids=str)
def test_exact_sums_come_out_exactly(factor: torch.dtype, dtype: torch.dtype) -> None:
    weight = torch.randint(-8, 9, (33, 75)).to(dtype)
    a, b = torch.randint(-2, 3, (9, 75)), torch.randint(-2, 3, (33, 9))
    want = (weight.double() + 2 * (b @ a)).to(dtype)
    update((weight, [(a.to(factor), b.to(factor), 2.0)]))
    assert_same_bits(weight, want)


@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, FP64], ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "transposed", "strided"])
def test_layout_changes_no_bit_and_nothing_else_is_touched(layout: str, dtype: torch.dtype) -> None:
    start = torch.randn(45, 101).to(dtype)
    terms = make_terms(45, 101, [16, 7], [FP32, BF16])
    plain, view = start.clone(), laid_out(start, layout)
    update((plain, terms))
    update((view, terms))
    if SAME_BITS or layout != "transposed":
        assert_same_bits(view, plain)
    else:  # the transposed problem, in which A and B change places
        torch.testing.assert_close(view, plain)
    around = view._base
    assert around is not None
    assert (around == 7).sum() >= around.numel() - view.numel()
    view.fill_(7)
    assert (around == 7).all()


@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
def test_a_slice_gets_the_bits_of_the_whole(dtype: torch.dtype) -> None:
    whole = torch.randn(90, 300).to(dtype)
    parts = whole.clone()
    a, b, scaling = torch.randn(20, 300), torch.randn(90, 20), 1.7
    update((whole, [(a, b, scaling)]))
    update(
        (parts[:31], [(a, b[:31], scaling)]),
        (parts[31:, :77], [(a[:, :77], b[31:], scaling)]),
        (parts[31:, 77:], [(a[:, 77:], b[31:], scaling)]),
    )
    assert_same_bits(parts, whole)


@needs_80_bits
@pytest.mark.parametrize("dtype", HALVES_AND_SINGLE, ids=str)
def test_special_factors(dtype: torch.dtype) -> None:
    """Tiny and huge factors must not go through instructions that flush subnormals or split what is finite.

    A matrix unit may flush products below 2^-126, each of which then counts as zero; nothing else changes there.
    """
    a, b = torch.randn(31, 200).to(BF16), torch.randn(64, 31).to(BF16)
    cases = {
        "plain": (a, b),
        "zeros": (a.clone().masked_fill_(torch.rand(a.shape) < 0.3, -0.0), b),
        "tiny": (a * 2.0**-70, b * 2.0**-60),
        "one tiny": (a.clone().index_fill_(0, torch.tensor(3), 2.0**-100), b * 2.0**-30),
        "subnormal": (a * 2.0**-128, b * 2.0**100),
        "huge": (a * 2.0**100, b * 2.0**27),
        "infinite": (a.clone().index_fill_(1, torch.tensor(5), float("inf")), b),
        "nan": (a, b.clone().index_fill_(0, torch.tensor(5), float("nan"))),
    }
    weight = torch.randn(64, 200).to(dtype)
    for name, (x, y) in cases.items():
        for start in (weight, (weight.double() * 2.0**-100).to(dtype), torch.zeros_like(weight)):
            with np.errstate(all="ignore"):
                want = emulated(start, [(x, y, 0.5)])
            for factors in ((x, y), (x.float(), y), (x.float(), y.float())):
                got = start.clone()
                update((got, [(*factors, 0.5)]))
                finite = ~want.isnan()
                assert torch.equal(got.isnan(), ~finite), name
                if SAME_BITS or name in ("huge", "infinite", "nan"):
                    assert torch.equal(bits(got[finite]), bits(want[finite])), name
                else:
                    exact = start.double() + 0.5 * (y.double() @ x.double())
                    size = start.double().abs() + 0.5 * (y.double().abs() @ x.double().abs())
                    rounding = torch.finfo(dtype).eps * (exact.abs() + torch.finfo(dtype).smallest_normal)
                    flushed = len(x) * 2.0**-126
                    assert ((got.double() - exact).abs() <= rounding + 2.0**-20 * size + flushed).all(), name


@pytest.mark.parametrize("dtype", [*HALVES_AND_SINGLE, FP64], ids=str)
def test_special_weights(dtype: torch.dtype) -> None:
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    special = [float("nan"), -float("nan"), float("inf"), -float("inf"), largest, -largest]
    special += [0.0, -0.0, tiny, -tiny, tiny / 4, -tiny / 4, tiny * 0.75, 1.0]
    weight = torch.tensor(special, dtype=dtype).repeat(9, 5)
    n = weight.shape[1]
    for a, b in (
        (torch.zeros(2, n), torch.zeros(9, 2)),
        (torch.full((2, n), tiny / 8, dtype=dtype), torch.ones(9, 2)),
        (torch.ones(2, n), torch.ones(9, 2)),
        (torch.full((2, n), largest, dtype=dtype), torch.ones(9, 2)),
        (torch.full((2, n), float("inf")), torch.ones(9, 2)),
    ):
        got = weight.clone()
        update((got, [(a, b, 1.0)]))
        compute = FP64 if dtype == FP64 else FP32
        delta = b.to(compute)[:, :1] * a.to(compute)[:1] + b.to(compute)[:, 1:] * a.to(compute)[1:]
        want = (weight.to(compute) + delta).to(dtype)
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan)
        assert len(got[nan].view(bits(got).dtype).unique()) == 1, "every NaN is the same one"
        assert_same_bits(got[~nan], want[~nan])


def test_rounding_covers_ties_and_every_half() -> None:
    """Each finite half value, moved by exact halves of its last place: ties go to even."""
    for dtype in (BF16, FP16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for step in (0.5, 0.25, 0.75, 1.0):
            weight = values[None].clone()
            spacing = torch.nextafter(values.abs(), torch.tensor(float("inf"), dtype=dtype)).float()
            move = ((spacing - values.abs().float()) * step).nan_to_num(0, 0, 0)[None]
            want = (weight.float() + move).to(dtype)
            update((weight, [(move, torch.ones(1, 1), 1.0)]))
            finite = ~want.isnan()
            assert_same_bits(weight[finite], want[finite])
            assert torch.equal(weight.isnan(), ~finite)


def test_threads_change_no_bit() -> None:
    jobs = [(torch.randn(130, 1500).to(BF16), make_terms(130, 1500, [r], [FP32])) for r in (1, 16, 100)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            copies = [(weight.clone(), terms) for weight, terms in jobs]
            update(*copies)
            results.append([weight for weight, _ in copies])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


def digest(seed: int) -> str:
    """A hash over the results of many small updates, all dtypes, layouts and ranks."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    result = hashlib.sha256()
    layouts = ("plain", "columns", "transposed", "strided", "rows")
    for i, dtype in enumerate((BF16, FP16, FP32, FP64) * 3):
        m, n = 3 + 17 * (i % 5), 1 + 61 * (i % 4)
        weight = laid_out(random(m, n).to(dtype), layouts[i % 5])
        weight[0, 0] = (float("nan"), float("inf"), 1e-39, -0.0)[i % 4]
        factors = (FP32, BF16, FP16)[i % 3]
        rank = (1, 3, 16, 64, 300)[(i + i // 5) % 5]
        terms = [
            (random(rank, n).to(factors), random(m, rank).to(factors), 0.1),
            (random(n, 2).T.to(BF16) * 2.0 ** -(10 * i), random(m, 2).to(BF16), 3.0),
        ]
        update((weight, terms[: 1 + i % 2]))
        result.update(bits(weight).numpy().tobytes())
    return result.hexdigest()


def test_instruction_sets_give_the_same_bits() -> None:
    seed = torch.seed() % 2**31
    digests = {_native.isa(): digest(seed)} if SAME_BITS else {}
    script = (
        "import runpy, sys; module = runpy.run_path(sys.argv[1]);"
        "print(module['_native'].load() or module['digest'](int(sys.argv[2])))"
    )
    for isa in ISAS:
        out = subprocess.run(
            [sys.executable, "-c", script, __file__, str(seed)],
            env={**os.environ, "PORTLLM_CPU_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if "PORTLLM_CPU_ISA" not in out:  # this CPU may lack it
            digests[isa] = out
    assert "portable" in digests
    assert len(set(digests.values())) == 1, digests


def test_sizes_of_zero() -> None:
    weight = torch.randn(3, 4)
    before = weight.clone()
    update((torch.empty(0, 4), [(torch.randn(2, 4), torch.empty(0, 2), 1.0)]))
    update((torch.empty(3, 0), [(torch.empty(2, 0), torch.randn(3, 2), 1.0)]))
    for terms in ([], [(torch.empty(0, 4), torch.empty(3, 0), 1.0)]):
        with pytest.raises(RuntimeError):  # nothing to add: refused, as by the public call
            update((weight, terms))
    assert_same_bits(weight, before)


def test_what_does_not_fit_is_refused_before_the_first_write() -> None:
    good = (torch.zeros(3, 4), [(torch.ones(2, 4), torch.ones(3, 2), 1.0)])
    bad: list[tuple[Tensor, list[Term]]] = [
        (torch.zeros(3, 4), [(torch.ones(2, 5), torch.ones(3, 2), 1.0)]),
        (torch.zeros(3, 4), [(torch.ones(2, 4), torch.ones(3, 1), 1.0)]),
        (torch.zeros(3, 4), [(torch.ones(2, 4), torch.ones(2, 2), 1.0)]),
        (torch.zeros(3), [(torch.ones(2, 4), torch.ones(3, 2), 1.0)]),
        (torch.zeros(3, 4, dtype=torch.int32), [(torch.ones(2, 4), torch.ones(3, 2), 1.0)]),
    ]
    for job in bad:
        with pytest.raises(RuntimeError):
            update(good, job)
    a, b = torch.ones(2, 4), torch.ones(3, 2)
    for scalings, n_terms in (([], [1]), ([1.0], []), ([1.0], [2]), ([1.0], [-1]), ([1.0], [0])):
        with pytest.raises(RuntimeError):
            torch.ops.portllm.lowrank_add_cpu_([good[0]], [a], [b], scalings, n_terms)
    assert (good[0] == 0).all()


def test_one_call_updates_many_weights() -> None:
    """Also small ones, which share a block of the work, around a large one, which is cut into several."""
    jobs = []
    for i in range(25):
        m, n = (900, 1100) if i == 12 else (1 + 13 * (i % 7), 1 + 29 * (i % 6))
        weight = torch.randn(m, n).to((BF16, FP16, FP32, FP64)[i % 4])
        jobs.append((weight, make_terms(m, n, [1 + i] * (1 + i % 3), [FP32])))
    alone = [(weight.clone(), terms) for weight, terms in jobs]
    update(*jobs)
    for job in alone:
        update(job)
    for (got, _), (want, _) in zip(jobs, alone, strict=True):
        assert_same_bits(got, want)
