"""The Triton kernel against truth in float64.

Triton decides at its import whether it interprets, and another test may have imported it already. So the
checks run interpreted on the CPU in a process of their own (this file, run as a script), and compiled in this
process where there is a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, FP16, FP32)
# Half a unit in the last place, relative to a value.
ROUNDING = {BF16: 2**-8, FP16: 2**-11, FP32: 2**-24}
SEED = int(os.environ.get("PORTLLM_TEST_SEED") or random.SystemRandom().getrandbits(31))

Check = Callable[[str], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


# Each lays a matrix [m, n] into a larger buffer: the buffer's shape, and the matrix in it.
VIEWS: dict[str, tuple[Callable[[int, int], tuple[int, int]], Callable[[Tensor], Tensor]]] = {
    "contiguous": (lambda m, n: (m, n), lambda x: x),
    "rows": (lambda m, n: (m + 10, n), lambda x: x[3:-7]),
    "columns": (lambda m, n: (m, n + 24), lambda x: x[:, 8:-16]),
    "odd columns": (lambda m, n: (m, n + 3), lambda x: x[:, 1:-2]),
    "transposed": (lambda m, n: (n, m), lambda x: x.T),
    "transposed block": (lambda m, n: (n + 2, m + 16), lambda x: x[1:-1, 8:-8].T),
    "strided": (lambda m, n: (2 * m, 3 * n), lambda x: x[::2, ::3]),
}


class Laid:
    """A matrix in a buffer whose other elements are NaN, and a way to tell whether those were written."""

    def __init__(self, values: Tensor, view: str, dtype: torch.dtype, device: str) -> None:
        shape, self._cut = VIEWS[view]
        self._buffer = torch.full(shape(*values.shape), torch.nan, dtype=dtype, device=device)
        self.matrix = self._cut(self._buffer)
        self.matrix.copy_(values)
        self._before = self._bits()

    def _bits(self) -> Tensor:
        return self._buffer.clone().view(torch.int32 if self._buffer.dtype == FP32 else torch.int16)

    def assert_surroundings_untouched(self) -> None:
        outside = torch.ones_like(self._buffer, dtype=torch.bool)
        self._cut(outside).fill_(False)
        assert torch.equal(self._before[outside], self._bits()[outside]), "bytes beside the view were written"


def truth(w: Tensor, terms: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """In float64: the updated weight before rounding, and the sum of the magnitudes that went into it."""
    value = w.double().cpu()
    size = value.abs()
    for a, b, s in terms:
        a, b = a.double().cpu(), b.double().cpu()
        value = value + s * (b @ a)
        size = size + abs(s) * (b.abs() @ a.abs())
    return value, size


def assert_close(w: Tensor, expected: tuple[Tensor, Tensor], rank: int) -> None:
    value, size = expected
    # A plain sum of r products in fp32 may be off by r units of 2^-24; a few more for scaling and adding.
    allowed = (rank + 16) * 2**-24 * size
    if w.dtype != FP32:
        rounding = ROUNDING[w.dtype]
        allowed = allowed * (1 + rounding) + rounding * value.abs() + 2**-25
    error = (w.double().cpu() - value).abs()
    worst = (error / allowed.clamp_min(1e-300)).max().item()
    assert worst <= 1, f"{tuple(w.shape)} {w.dtype}, rank {rank}: {worst:.3g} times the allowed error"


def random_matrix(rows: int, columns: int, dtype: torch.dtype, device: str, view: str = "contiguous") -> Tensor:
    return Laid(torch.randn(rows, columns), view, dtype, device).matrix


def run_one(w: Tensor, terms: Sequence[tuple[Tensor, Tensor, float]]) -> None:
    from portllm.kernels import lowrank_add_

    lowrank_add_([w], [t[0] for t in terms], [t[1] for t in terms], [t[2] for t in terms], [len(terms)])


@check
def odd_shapes_and_ranks(device: str) -> None:
    shapes = [(1, 1), (1, 1000), (1000, 1), (63, 63), (63, 1000), (64, 128), (129, 65)]
    for (m, n), r in zip(shapes, [1, 3, 16, 130, 64, 16, 8], strict=True):
        for w_dtype, f_dtype in [(FP32, FP32), (BF16, FP32), (FP16, FP16), (FP32, BF16)]:
            w = random_matrix(m, n, w_dtype, device)
            terms = [(random_matrix(r, n, f_dtype, device), random_matrix(m, r, f_dtype, device), 0.375)]
            expected = truth(w, terms)
            run_one(w, terms)
            assert_close(w, expected, r)


@check
def every_pair_of_dtypes(device: str) -> None:
    for w_dtype in DTYPES:
        for a_dtype in DTYPES:
            for b_dtype in DTYPES:
                w = random_matrix(40, 72, w_dtype, device)
                terms = [(random_matrix(16, 72, a_dtype, device), random_matrix(40, 16, b_dtype, device), -1.5)]
                expected = truth(w, terms)
                run_one(w, terms)
                assert_close(w, expected, 16)


@check
def products_of_fp32_factors_keep_24_bits(device: str) -> None:
    # One product for each element and W = 0: bf16 parts left out would show as 2^-16, tf32 as 2^-11.
    a, b = random_matrix(1, 64, FP32, device), random_matrix(64, 1, FP32, device)
    w = torch.zeros(64, 64, device=device)
    run_one(w, [(a, b, 1.0)])
    exact = b.double() @ a.double()
    worst = ((w.double() - exact) / exact).abs().max().item()
    # Under the interpreter the parts are cut off, not rounded, which leaves 2^-21 instead of 2^-24.
    assert worst < (2**-20.9 if device == "cpu" else 2**-22), f"relative error 2^{torch.tensor(worst).log2()}"


@check
def halves_are_rounded_to_nearest_even(device: str) -> None:
    for w_dtype in (FP16, BF16):
        for f_dtype in DTYPES:
            # Halves below 2^13: sums are exact, and many of them lie midway between two representable values.
            w = torch.randint(-4096, 4097, (65, 96)).to(w_dtype).to(device)
            a, b = torch.randint(-3, 4, (20, 96)), torch.randint(-3, 4, (65, 20))
            expected = (w.double().cpu() + 0.5 * (b.double() @ a.double())).to(w_dtype)
            run_one(w, [(a.to(device, f_dtype), b.to(device, f_dtype), 0.5)])
            assert torch.equal(w.cpu(), expected), f"{w_dtype}, factors {f_dtype}"


@check
def modes_round_as_they_say(device: str) -> None:
    """The sums are had from fp32 weights; what is made of them is plain torch's."""
    from portllm.kernels import lowrank_add_
    from portllm.noise import Mode, store_

    for w_dtype in DTYPES:
        for view in ("contiguous", "odd columns", "transposed", "strided"):
            weights, wide, factors, modes, before = [], [], [], [], []
            for m, n in [(70, 96), (1, 1), (33, 130)]:
                w = torch.randn(m, n) * 10.0 ** torch.randint(-6, 1, (m, n))
                w[torch.rand(m, n) < 0.2] = 0
                w = w.to(w_dtype).to(device)
                w.view(-1)[: min(3, m)] = torch.tensor([torch.inf, torch.finfo(w_dtype).max, torch.nan])[: min(3, m)]
                before.append(w.clone())
                weights.append(Laid(w, view, w_dtype, device).matrix)
                wide.append(Laid(w, view, FP32, device).matrix)
                factors.append((torch.randn(8, n, device=device) * 1e-3, torch.randn(m, 8, device=device) * 1e-2))
                key, *place = (random.getrandbits(bits) for bits in (63, 32, 32))
                modes.append(Mode(len(modes) + 1 + 4 * random.getrandbits(1), key, *place))
            lists = [a for a, _ in factors], [b for _, b in factors], [0.5] * 3, [1] * 3
            lowrank_add_(wide, *lists)
            lowrank_add_(weights, *lists, [number for mode in modes for number in mode])
            for w, sums, mode, old in zip(weights, wide, modes, before, strict=True):
                expected = old.clone()
                store_(expected, sums.contiguous(), mode, slice(0, len(old)))
                same = (w == expected) | (w.isnan() & expected.isnan())
                assert same.all(), f"{w_dtype}, {view}, {mode}, {int((~same).sum())} of {same.numel()}"


@check
def exact_sums_are_exact_in_every_dtype(device: str) -> None:
    for w_dtype in DTYPES:
        for f_dtype in DTYPES:
            w = torch.randint(-8, 9, (70, 90)).to(device, w_dtype)
            a, b = torch.randint(-1, 2, (24, 90)), torch.randint(-1, 2, (70, 24))
            expected = w.double().cpu() + 2 * (b.double() @ a.double())
            run_one(w, [(a.to(device, f_dtype), b.to(device, f_dtype), 2.0)])
            assert torch.equal(w.double().cpu(), expected), f"{w_dtype}, factors {f_dtype}"


@check
def views_of_weights_leave_their_surroundings_alone(device: str) -> None:
    for view in VIEWS:
        for w_dtype, f_dtype in [(BF16, FP32), (FP32, FP16)]:
            laid = Laid(torch.randn(72, 136), view, w_dtype, device)
            terms = [(random_matrix(16, 136, f_dtype, device), random_matrix(72, 16, f_dtype, device), 0.5)]
            expected = truth(laid.matrix, terms)
            run_one(laid.matrix, terms)
            assert_close(laid.matrix, expected, 16)
            laid.assert_surroundings_untouched()


@check
def views_of_factors_lie_in_nan(device: str) -> None:
    for view_a, view_b in zip(VIEWS, [*list(VIEWS)[3:], *list(VIEWS)[:3]], strict=True):
        for f_dtype, r in [(FP32, 16), (BF16, 3)]:
            w = random_matrix(70, 72, FP16, device)
            a = random_matrix(r, 72, f_dtype, device, view_a)
            b = random_matrix(70, r, f_dtype, device, view_b)
            expected = truth(w, [(a, b, 0.25)])
            run_one(w, [(a, b, 0.25)])
            assert_close(w, expected, r)


@check
def many_weights_and_terms_in_one_call(device: str) -> None:
    from portllm.kernels import LaunchTable

    chance = random.Random(SEED)
    laid: list[Laid] = []
    terms: list[list[tuple[Tensor, Tensor, float]]] = []
    for _ in range(14):
        m, n = chance.choice([1, 16, 63, 64, 100]), chance.choice([1, 8, 64, 72, 130])
        laid.append(Laid(torch.randn(m, n), chance.choice(list(VIEWS)), chance.choice(DTYPES), device))
        own = []
        for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
            r = chance.choice([1, 3, 8, 16, 64, 130])
            a = random_matrix(r, n, chance.choice(DTYPES), device, chance.choice(list(VIEWS)))
            b = random_matrix(m, r, chance.choice([a.dtype, *DTYPES]), device, chance.choice(list(VIEWS)))
            own.append((a, b, chance.choice([-2.0, 0.125, 1.0])))
        terms.append(own)
    expected = [truth(w.matrix, own) for w, own in zip(laid, terms, strict=True)]
    every = [term for own in terms for term in own]
    weights = [w.matrix for w in laid]
    table = LaunchTable(weights, *([t[k] for t in every] for k in range(3)), [len(own) for own in terms])
    table.launch()
    for w, value, own in zip(laid, expected, terms, strict=True):
        assert_close(w.matrix, value, sum(a.shape[0] for a, _, _ in own))
        w.assert_surroundings_untouched()


@check
def a_weight_gets_the_same_bits_alone_and_in_company(device: str) -> None:
    from portllm.kernels import lowrank_add_

    weights = [random_matrix(70, 72 + 8 * i, FP32, device) for i in range(3)]
    lora_A = [random_matrix(16, 72 + 8 * i, FP32, device) for i in range(3)]
    lora_B = [random_matrix(70, 16, FP32, device) for i in range(3)]
    alone = [w.clone() for w in weights]
    lowrank_add_(weights, lora_A, lora_B, [0.3, 0.7, 1.1], [1, 1, 1])
    for w, single, a, b, s in zip(weights, alone, lora_A, lora_B, [0.3, 0.7, 1.1], strict=True):
        run_one(single, [(a, b, s)])
        assert torch.equal(w, single)


@check
def a_table_can_be_launched_again(device: str) -> None:
    from portllm.kernels import LaunchTable

    w, a, b = (random_matrix(m, n, FP32, device) for m, n in [(64, 96), (8, 96), (64, 8)])
    expected = truth(w, [(a, b, 0.5), (a, b, 0.5)])
    table = LaunchTable([w], [a], [b], [0.5], [1])
    table.launch()
    table.launch()
    assert_close(w, expected, 16)


@check
def nothing_to_add_leaves_the_bits(device: str) -> None:
    from portllm.kernels import lowrank_add_

    w = random_matrix(5, 6, BF16, device)
    before = w.clone()
    empty = torch.empty(0, 6, device=device)
    rank_0 = torch.empty(0, 6, device=device), torch.empty(5, 0, device=device)
    lora_A, lora_B = (
        [rank_0[0], torch.empty(2, 6, device=device)],
        [rank_0[1], torch.empty(0, 2, device=device)],
    )
    lowrank_add_([w, w, empty], lora_A, lora_B, [1.0, 1.0], [0, 1, 1])
    lowrank_add_([], [], [], [], [])
    assert torch.equal(w, before)


@check
def what_does_not_fit_is_refused_before_a_write(device: str) -> None:
    from portllm.kernels import lowrank_add_

    good = torch.zeros(6, 8, device=device)
    a, b = torch.ones(2, 8, device=device), torch.ones(6, 2, device=device)

    def second(w: Tensor, other_a: Tensor, other_b: Tensor) -> None:
        lowrank_add_([good, w], [a, other_a], [b, other_b], [1.0, 1.0], [1, 1])

    with pytest.raises(TypeError, match=re.escape("weights[1] is torch.float64")):
        second(good.double(), a, b)
    with pytest.raises(TypeError, match=re.escape("lora_B[1]")):
        second(good.clone(), a, b.double())
    with pytest.raises(ValueError, match=re.escape("weights[1]")):
        second(torch.zeros(6, 8, 1, device=device), a, b)
    with pytest.raises(ValueError, match=re.escape("lora_A[1] (2, 8) does not fit weights[1] (6, 9)")):
        second(torch.zeros(6, 9, device=device), a, b)
    with pytest.raises(ValueError, match=re.escape("share memory")):
        second(torch.zeros(1, 8, device=device).expand(6, 8), a, b)
    with pytest.raises(ValueError, match=re.escape("weights[1] is on meta")):
        second(good.to("meta"), a, b)
    with pytest.raises(ValueError, match=re.escape("term 1 is on meta")):
        second(good.clone(), a.to("meta"), b)
    with pytest.raises(ValueError, match=re.escape("1 weights and 1 counts")):
        lowrank_add_([good], [a], [b, b], [1.0], [1])
    assert not good.any()


@check
def alignment_is_claimed_only_where_it_holds(device: str) -> None:
    from portllm.kernels import LaunchTable

    def claimed(weight_view: str, factor_view: str = "contiguous", m: int = 64, n: int = 64, r: int = 16) -> str:
        w = random_matrix(m, n, BF16, device, weight_view)
        a, b = random_matrix(r, n, BF16, device, factor_view), random_matrix(m, r, BF16, device, factor_view)
        (launch,) = LaunchTable([w], [a], [b], [1.0], [1])._launches
        return "W" * launch.variant.w_aligned + "F" * launch.variant.f_aligned

    aligned = {view: claimed(view) for view in VIEWS}
    assert aligned["contiguous"] == aligned["rows"] == aligned["columns"] == "WF"
    assert aligned["transposed"] == "W"  # its A is the transpose of B, whose columns are not contiguous
    assert aligned["odd columns"] == "F"
    assert aligned["strided"] == "F"
    assert claimed("transposed", "transposed") == "WF"
    assert claimed("contiguous", "odd columns") == claimed("contiguous", r=4) == "W"
    assert claimed("contiguous", n=63) == ""
    assert claimed("contiguous", m=63) == "WF"


@check
def more_tiles_than_blocks(device: str) -> None:
    m, n = (2048, 4096) if device == "cuda" else (200, 300)
    w = random_matrix(m, n, BF16, device)
    terms = [(random_matrix(16, n, FP32, device), random_matrix(m, 16, FP32, device), 0.5)]
    expected = truth(w, terms)
    run_one(w, terms)
    assert_close(w, expected, 16)


def main() -> None:
    """Run all checks interpreted; print what went wrong in each, or null, as one line of JSON."""
    torch.set_num_threads(1)
    results: dict[str, str | None] = {}
    for name, function in CHECKS.items():
        torch.manual_seed(SEED)
        try:
            function("cpu")
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def run_python(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    output = run_python(__file__, TRITON_INTERPRET="1", PORTLLM_TEST_SEED=str(SEED))
    return json.loads(output.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    error = interpreted[name]
    if error and "only 0-dimensional arrays can be converted" in error:
        pytest.skip("the interpreter of this Triton is older than this NumPy")
    assert error is None, f"PORTLLM_TEST_SEED={SEED}\n{error}"


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="Triton interprets in this process")
@pytest.mark.parametrize("name", CHECKS)
def test_compiled(name: str) -> None:
    torch.manual_seed(SEED)
    try:
        CHECKS[name]("cuda")
    except AssertionError as error:
        raise AssertionError(f"PORTLLM_TEST_SEED={SEED}") from error


def test_importing_the_package_does_not_import_triton() -> None:
    run_python(
        "-c",
        "import sys, portllm.kernels; assert 'triton' not in sys.modules and 'kernels' not in sys.modules",
    )


def test_without_triton_the_first_use_says_so() -> None:
    script = """
import sys
sys.modules["triton"] = None
import portllm.kernels
try:
    portllm.kernels.lowrank_add_
except ImportError as error:
    assert "portllm.kernels.lowrank_add_ needs triton" in str(error), error
else:
    raise AssertionError("no ImportError")
assert not hasattr(portllm.kernels, "no_such_name")
"""
    run_python("-c", script)


@needs_triton
def test_compiled_kernel_refuses_the_cpu() -> None:
    script = """
import torch
from portllm.kernels import lowrank_add_
try:
    lowrank_add_([torch.zeros(2, 3)], [torch.ones(1, 3)], [torch.ones(2, 1)], [1.0], [1])
except ValueError as error:
    assert "weights[0] is on cpu; this kernel runs on a GPU" in str(error), error
else:
    raise AssertionError("no ValueError")
"""
    run_python("-c", script, TRITON_INTERPRET="0")


if __name__ == "__main__":
    main()
