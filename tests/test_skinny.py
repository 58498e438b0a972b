"""Products with a few columns: near float64's, whatever the layout, the threads and the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from portllm import _native, skinny
from portllm.skinny import product, sketch
from portllm.svd import leading, residual

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = [(1, 1), (1, 63), (63, 1), (2, 257), (63, 1000), (1000, 63), (33, 530)]
WIDTHS = (1, 16, 70)
ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "portable")

compiled = pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))


def rounded(block: Tensor, matrix: Tensor) -> Tensor:
    """What of a block meets the matrix."""
    return block.to(matrix.dtype).double()


def excess(got: Tensor, matrix: Tensor, block: Tensor) -> float:
    """The largest error, as a multiple of the one that a sum in fp32 may have; not finite where `got` is not."""
    exact = matrix.double() @ rounded(block, matrix)
    allowed = matrix.shape[1] * 2.0**-23 * (matrix.double().abs() @ rounded(block, matrix).abs()) + 2.0**-126
    return float(((got.double() - exact).abs() / allowed).max())


def inside(tensor: Tensor, poison: float) -> Tensor:
    """The same values, contiguous, in the middle of a larger piece of memory that holds `poison`."""
    around = torch.full((tensor.numel() + 130,), poison, dtype=tensor.dtype)
    return around[65:-65].view(tensor.shape).copy_(tensor)


def surroundings(tensor: Tensor) -> Tensor:
    around = tensor._base
    assert around is not None
    return torch.cat([around.flatten()[:65], around.flatten()[-65:]])


def compare(seed: int) -> float:
    """The largest `excess` over all shapes, widths, dtypes and directions of both ops."""
    torch.manual_seed(seed)
    worst = 0.0
    for m, n in SHAPES:
        for width in WIDTHS:
            for dtype in (FP32, BF16):
                # Rows of a larger matrix: what lies around them would show in the result.
                matrix = torch.full((m + 2, n + 3), float("nan"), dtype=dtype)[1:-1, 1:-2].copy_(torch.randn(m, n))
                for one in (matrix, matrix.T):
                    block = inside(torch.randn(one.shape[1], width), float("nan"))
                    out = inside(torch.full((one.shape[0], width), float("nan")), 7)
                    torch.ops.portllm.skinny_cpu_(out, one, block)
                    worst = max(worst, excess(out, one, block))
                    assert (surroundings(out) == 7).all()
            matrix = matrix.float() + torch.rand(m, n)
            matrix = torch.full((m + 2, n + 3), float("nan"))[1:-1, 1:-2].copy_(matrix)
            block = torch.randn(n, width)
            out = inside(torch.full((m, width), float("nan")), 7)
            coarse = inside(torch.full((m, n), float("nan"), dtype=BF16), 7)
            squares = torch.ops.portllm.sketch_cpu_(out, coarse, matrix, block)
            assert torch.equal(coarse, matrix.to(BF16))
            assert squares == pytest.approx(float(matrix.double().square().sum()), rel=1e-5)
            worst = max(worst, excess(out, coarse, block))
            assert (surroundings(out) == 7).all()
            assert (surroundings(coarse) == 7).all()
    return worst


@compiled
def test_near_the_float64_truth() -> None:
    assert compare(torch.seed() % 2**31) <= 1


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_near_the_truth(isa: str) -> None:
    script = (
        "import runpy, sys; module = runpy.run_path(sys.argv[1]);"
        "print(module['_native'].load() or module['compare'](int(sys.argv[2])))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, __file__, str(torch.seed() % 2**31)],
        env={**os.environ, "PORTLLM_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if "PORTLLM_CPU_ISA" in out:
        pytest.skip(out)
    assert float(out) <= 1


@compiled
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(skinny, "_compiled", lambda: True)  # also where the matrix library would be faster
    matrix = torch.randn(700, 1500)
    blocks = torch.randn(1500, 20), torch.randn(700, 20)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            begun = sketch(matrix, blocks[0], torch.empty(matrix.shape, dtype=BF16))
            one = matrix.to(dtype)
            results.append((product(one, blocks[0]), product(one.T, blocks[1]), *begun))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[:3], results[0][:3], strict=True))
        assert other[3] == results[0][3]


@compiled
def test_infinities_and_nans_stay_in_their_rows() -> None:
    for dtype in (FP32, BF16):
        matrix = torch.randn(40, 50)
        matrix[3, 4], matrix[7, 49] = float("inf"), float("nan")
        got = product(matrix.to(dtype), torch.ones(50, 3))
        assert (got[3] == float("inf")).all()
        assert got[7].isnan().all()
        assert got[[i for i in range(40) if i not in (3, 7)]].isfinite().all()


@compiled
def test_sizes_of_zero() -> None:
    assert torch.equal(product(torch.empty(3, 0), torch.empty(0, 4)), torch.zeros(3, 4))
    assert product(torch.empty(0, 3), torch.randn(3, 4)).shape == (0, 4)
    assert product(torch.randn(5, 3), torch.empty(3, 0)).shape == (5, 0)


@compiled
def test_what_does_not_fit_is_refused() -> None:
    matrix, block, out = torch.randn(4, 6), torch.randn(6, 2), torch.full((4, 2), 7.0)
    ops = torch.ops.portllm
    for arguments, message in (
        ((out, matrix.double(), block), "matrix must be 2-D"),
        ((out, matrix[0], block), "matrix must be 2-D"),
        ((out, torch.randn(8, 12)[::2, ::2], block), "its rows or its columns contiguous"),
        ((out, matrix, block.T.contiguous()), "block must be contiguous"),
        ((out, matrix, block.to(BF16)), "block must be contiguous"),
        ((out, matrix, torch.randn(2, 6).T), "block must be contiguous"),
        ((out, matrix, block[:, 0]), "block must be contiguous"),
        ((out[:3], matrix, block), r"out must be .*\[4, 2\]"),
        ((out.double(), matrix, block), "out must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.skinny_cpu_(*arguments)
    for coarse, of, message in (
        (torch.empty(4, 6), matrix, "coarse must be contiguous, on the CPU, bfloat16"),
        (torch.empty(6, 4, dtype=BF16).T, matrix, "coarse must be"),
        (torch.empty(4, 6, dtype=BF16), matrix.to(BF16), "matrix must be"),
        (torch.empty(4, 6, dtype=BF16), torch.randn(6, 4).T, "matrix must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sketch_cpu_(out, coarse, of, block)
    assert (out == 7).all()


@pytest.mark.parametrize("library", ["compiled", "torch"])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_calls_are_the_same_with_and_without_the_library(
    library: str, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "torch":
        monkeypatch.setattr(skinny, "_compiled", lambda: False)
    matrix = torch.randn(130, 90).T if transposed else torch.randn(90, 130)
    block = torch.randn(20, 130).T
    assert excess(product(matrix, block), matrix, block) <= 1
    assert excess(product(matrix[::3], block), matrix[::3], block) <= 1
    coarse = torch.empty(90, 130, dtype=BF16)
    image, norm = sketch(matrix, block, coarse)
    assert torch.equal(coarse, matrix.to(BF16))
    assert norm == pytest.approx(float(matrix.double().norm()), rel=1e-5)
    exact = coarse.double() @ block.to(BF16).double()
    assert float((image - exact).norm()) <= 2**-8 * float(exact.norm())  # the matrix library rounds to bf16


@pytest.mark.parametrize("library", ["compiled", "torch"])
def test_leading_values_with_and_without_the_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "torch":
        monkeypatch.setattr(skinny, "_compiled", lambda: False)
    matrix = torch.randn(310, 6) @ torch.randn(6, 400)
    best = torch.linalg.svdvals(matrix.double())[:6]
    for one in (matrix, matrix.T):
        found = leading(one, 6)
        torch.testing.assert_close(found.values, best, rtol=1e-5, atol=0)
        assert residual(one, found, 6) <= 1e-5 * found.norm
        assert found.norm == pytest.approx(float(matrix.double().norm()), rel=1e-5)
    nothing = leading(torch.zeros(310, 400), 6)
    assert nothing.norm == 0
    assert (nothing.values == 0).all()
    assert all(factor.isfinite().all() for factor in nothing.factors(6))
