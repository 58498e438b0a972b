"""Stochastic rounding: the bits that Python's own numbers say, on every backend and in every cut; no bias."""

from __future__ import annotations

import math
import os
import random
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portllm import BackendError, lowrank_add_, noise, ops
from portllm.execute import execute
from portllm.noise import FLIPPED, KEEP_ZEROS, STOCHASTIC, Mode
from portllm.planning import Noise, Plan, Region, Term, Update

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BACKENDS = [name for name in ("torch", "cpu") if ops.unavailable(name) is None]
MASK = 0xFFFFFFFF


def _python_bits(mode: Mode, row: int, column: int) -> int:
    """The definition, in Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD & MASK
        x ^= x >> 15
        x = x * 0xD35A2D97 & MASK
        return x ^ x >> 15

    row_a = mix((mode.key ^ mode.row + row) & MASK)
    row_b = mix(row_a ^ mode.key >> 32 & MASK)
    found = mix(((mode.column + column & MASK ^ row_a) * 0x9E3779B9 + row_b) & MASK)
    return found ^ MASK if mode.flags & FLIPPED else found


def _python_rounded(x: float, dtype: torch.dtype, bits: int) -> float:
    """The definition, in fractions; ``x`` is a number of fp32."""
    mantissa, least, largest = (8, -133, 255 * 2.0**120) if dtype == BF16 else (11, -24, 65504.0)
    if x == 0 or not math.isfinite(x):
        return x
    size = Fraction(abs(x))
    exponent = math.frexp(abs(x))[1]
    # bf16 has the exponents of fp32, whose subnormal numbers are rounded as the others.
    unit = Fraction(2) ** max(exponent - mantissa, least)
    lo = size // unit * unit
    rest = (size - lo) / unit
    if dtype == FP16 and exponent <= -14:
        up = struct.unpack("f", struct.pack("f", float(rest + Fraction(bits >> 8, 1 << 24))))[0] >= 1
    else:
        dropped = 24 - mantissa
        up = rest + Fraction(bits >> 32 - dropped, 1 << dropped) >= 1
    found = float(lo + unit * up)
    if found > largest:
        return float(torch.tensor(x).to(dtype))
    return math.copysign(found, x)


def _same(a: Tensor, b: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@pytest.mark.parametrize("flags", [STOCHASTIC, STOCHASTIC | FLIPPED])
def test_the_noise_is_that_of_its_definition(flags: int) -> None:
    for _ in range(20):
        place = random.getrandbits(33), random.getrandbits(33)
        mode = Mode(flags, random.getrandbits(64) - (1 << 63), *place)
        found = noise.bits(mode, slice(3, 7), 9)
        expected = [[_python_bits(mode, row, column) for column in range(9)] for row in range(3, 7)]
        assert found.tolist() == expected


def test_keys_come_of_the_seed_and_the_name() -> None:
    # The first bytes of sha256("0:w"), as any tool gives them.
    assert noise.key_for(0, "w") == int.from_bytes(bytes.fromhex("9ee2c982b06e3546"), "little")
    assert len({noise.key_for(seed, name) for seed in (0, 1, -1) for name in ("w", "v")}) == 6


def _numbers() -> list[float]:
    """Numbers of fp32 of every size, exact ones, and those next to the borders of the formats."""
    patterns = [random.getrandbits(32) for _ in range(300)]
    patterns += [random.getrandbits(16) << 16 for _ in range(50)]
    for border in (0x7F7F0000, 0x7F800000, 0x477FE000, 0x477FF000, 0x47800000, 0x38800000, 0x33800000, 0x00800000, 0):
        patterns += [max(border + offset, 0) for offset in (-0x1801, -1, 0, 1, 0x1801)]
    # Where weights are.
    patterns += [struct.unpack("I", struct.pack("f", random.gauss(0, 0.02)))[0] for _ in range(300)]
    patterns += [struct.unpack("I", struct.pack("f", random.gauss(0, 2e-5)))[0] for _ in range(300)]
    return [struct.unpack("f", struct.pack("I", p ^ sign))[0] for p in patterns for sign in (0, 1 << 31)]


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_number_is_rounded_as_fractions_say(dtype: torch.dtype) -> None:
    values = torch.tensor(_numbers(), dtype=FP32)
    bits = torch.tensor([random.choice([0, MASK, random.getrandbits(32)]) for _ in values])
    found = noise.rounded(values, dtype, bits)
    for x, random_bits, y in zip(values.tolist(), bits.tolist(), found.tolist(), strict=True):
        expected = _python_rounded(x, dtype, random_bits)
        assert y == expected or (math.isnan(y) and math.isnan(expected)), (x, random_bits)
        assert math.copysign(1, y) == math.copysign(1, expected) or math.isnan(y)


def _case(m: int, n: int, dtype: torch.dtype, size: float = 1e-3) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with every kind of number, and factors of a small sum."""
    weight = torch.randn(m, n) * 0.02
    weight[torch.rand(m, n) < 0.2] = 0
    weight[torch.rand(m, n) < 0.05] *= 1e-4
    weight.view(-1)[::7] *= -1
    return weight.to(dtype), torch.randn(5, n) * size, torch.randn(m, 5) * 0.02


def _hostile(weight: Tensor, a: Tensor) -> None:
    """Infinities, NaN, overflow and subnormal numbers."""
    largest = torch.finfo(weight.dtype).max
    odd = [math.inf, -math.inf, math.nan, largest, -largest, torch.finfo(weight.dtype).tiny / 4, -0.0]
    for i, number in enumerate(odd):
        weight[i % len(weight), i % weight.shape[1]] = number
    a[:, -1] = min(largest / 8, 1e30)  # sums that overflow fp16


SHAPES = [(1, 1), (7, 5), (16, 64), (33, 129), (70, 200), (130, 47)]


@pytest.mark.parametrize("flags", [STOCHASTIC, KEEP_ZEROS, STOCHASTIC | KEEP_ZEROS, STOCHASTIC | FLIPPED])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["plain", "turned", "strided", "both"])
@pytest.mark.parametrize("hostile", [False, True])
def test_every_backend_rounds_its_sum_as_defined(
    backend: str, dtype: torch.dtype, flags: int, layout: str, hostile: bool
) -> None:
    """The sum is had from the same backend, with fp32 weights in which the 16-bit ones lie."""
    for m, n in SHAPES:
        weight, a, b = _case(m, n, dtype)
        if hostile:
            _hostile(weight, a)
        mode = Mode(flags, random.getrandbits(63), random.getrandbits(32), random.getrandbits(32))
        wide = _laid(weight.to(FP64 if dtype == FP64 else FP32), layout)
        lowrank_add_([wide], [a], [b], [0.5], [1], backend)
        expected = weight.clone()
        noise.store_(expected, wide.contiguous(), mode, slice(0, m))
        given = _laid(weight, layout)
        lowrank_add_([given], [a], [b], [0.5], [1], backend, list(mode))
        nan = expected.isnan()
        assert torch.equal(given.isnan(), nan)
        assert _same(given.masked_fill(nan, 0), expected.masked_fill(nan, 0)), (m, n)
        if flags & KEEP_ZEROS:
            assert _same(given[weight == 0], weight[weight == 0])


def _laid(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, lying otherwise in memory."""
    m, n = tensor.shape
    if layout == "plain":
        return tensor.clone()
    if layout == "turned":
        return tensor.t().clone(memory_format=torch.contiguous_format).t()
    room = torch.zeros(2 * m, 3 * n, dtype=tensor.dtype)
    view = room[1::2, ::3] if layout == "both" else room[:m, n : 2 * n]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_cut_gives_the_same_bits(backend: str, dtype: torch.dtype) -> None:
    """Rectangles of each expert's matrix, through Update.cut; integers, so that no order of summing matters."""
    experts, m, n = 3, 40, 150
    weight = (torch.randn(experts, m, n) * 0.02).to(dtype)
    updates = []
    for expert in range(experts):
        a = torch.randint(-3, 4, (4, n)).float()
        b = torch.randint(-3, 4, (m, 4)).float()
        place = Region(expert, (0, m), (0, n))
        at = Noise(noise.key_for(3, "w"), row=expert * m)
        updates.append(Update("w", place, (Term(a, b, 2.0**-14),), ("w",), at, keep_zeros=expert == 1))
    whole = weight.clone()
    execute(Plan(tuple(updates)), {"w": whole}, backend=backend)
    assert not _same(whole[0], whole[1])
    for _ in range(4):
        top, left = random.randint(1, m - 1), random.randint(1, n - 1)
        parts = [
            update.cut(rows, columns)
            for update in updates
            for rows in (slice(0, top), slice(top, None))
            for columns in (slice(0, left), slice(left, None))
        ]
        random.shuffle(parts)
        cut = weight.clone()
        execute(Plan(tuple(parts)), {"w": cut}, backend=backend)
        assert _same(cut, whole)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_average_nothing_is_lost(dtype: torch.dtype) -> None:
    """Hoeffding: the mean of N numbers in [0, 1] is off by more than t with a probability below 2 exp(-2 N t^2)."""
    count = 1 << 20
    for place in (0.001, 0.25, 0.5, 0.9):
        x = torch.full((1, count), 0.75)
        step = torch.finfo(dtype).eps / 2  # of numbers in [0.5, 1)
        x += place * step
        rounded = noise.rounded(x, dtype, noise.bits(Mode(1, random.getrandbits(63)), slice(0, 1), count))
        share = ((rounded.double() - 0.75) / step).mean().item()
        exact = (float(x[0, 0]) - 0.75) / step
        assert abs(share - exact) < 0.005  # fails by chance once in 10^22


def test_neighbours_are_not_alike() -> None:
    """Of independent bits, the mean product of signs stays within 0.005 but once in 10^5 cases at N = 2^20 * 32."""
    found = noise.bits(Mode(1, random.getrandbits(63)), slice(0, 1024), 1024)
    signs = torch.stack([(found >> i & 1) * 2 - 1 for i in range(32)]).float()
    for other in (signs.roll(1, 1), signs.roll(1, 2), signs.roll(1, 0), signs.roll((1, 1), (1, 2))):
        assert abs((signs * other).mean().item()) < 0.005
    assert abs(signs.mean().item()) < 0.005


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_flipped_noise_takes_off_what_was_added(backend: str, dtype: torch.dtype) -> None:
    """Exactly, where the weight stays between two powers of two and the sums are exact."""
    weight = (torch.rand(40, 70) * 0.5 + 1.2).to(dtype)
    a, b = torch.randint(-3, 4, (4, 70)).float(), torch.randint(-3, 4, (40, 4)).float()
    update = Update("w", Region(None, (0, 40), (0, 70)), (Term(a, b, 2.0**-14),), ("w",), Noise(random.getrandbits(64)))
    changed = weight.clone()
    execute(Plan((update,)), {"w": changed}, backend=backend)
    assert not _same(changed, weight)
    execute(Plan((update,)).negated(), {"w": changed}, backend=backend)
    assert _same(changed, weight)


def test_modes_are_checked() -> None:
    weight, a, b = _case(4, 6, BF16)
    before = weight.clone()
    for backend in BACKENDS:
        with pytest.raises(ValueError, match="modes has 3 ints, but 1 weights need four each"):
            lowrank_add_([weight], [a], [b], [1.0], [1], backend, [1, 2, 3])
        with pytest.raises(ValueError, match="modes has the flags 8"):
            lowrank_add_([weight], [a], [b], [1.0], [1], backend, [8, 0, 0, 0])
    assert _same(weight, before)


def test_cuda_kernels_take_no_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "unavailable", lambda name: None)
    monkeypatch.setattr(ops, "_takes", lambda name, weight: None)
    weight = torch.empty(1, 1, dtype=BF16)
    assert ops.backend_for(weight, "cuda") == "cuda"
    with pytest.raises(BackendError, match="it rounds to nearest only"):
        ops.backend_for(weight, "cuda", plain=False)


_AGREE = """
import sys, torch
from portllm import lowrank_add_
state = torch.load(sys.argv[1])
for case in state:
    lowrank_add_([case["weight"]], [case["a"]], [case["b"]], [0.5], [1], "cpu", case["mode"])
torch.save([case["weight"] for case in state], sys.argv[2])
"""


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled library")
def test_every_variant_of_the_library_gives_the_same_bits(tmp_path: Path) -> None:
    """Those without a matrix unit, which sum in the same order."""
    cases: list[dict[str, Any]] = []
    for dtype in (BF16, FP16, FP32):
        for shape in SHAPES:
            weight, a, b = _case(*shape, dtype)
            _hostile(weight, a)
            for flags in (1, 2, 3, 5):
                mode = [flags, random.getrandbits(63), random.getrandbits(31), random.getrandbits(31)]
                cases.append({"weight": weight, "a": a, "b": b, "mode": mode})
    torch.save(cases, tmp_path / "cases.pt")
    found = {}
    for isa in ("portable", "avx2", "avx512", "avx512_bf16"):
        command = [sys.executable, "-c", _AGREE, str(tmp_path / "cases.pt"), str(tmp_path / isa)]
        done = subprocess.run(command, env={**os.environ, "PORTLLM_CPU_ISA": isa}, capture_output=True, text=True)
        if done.returncode == 0:
            found[isa] = torch.load(tmp_path / isa)
        else:
            assert "names a variant this CPU does not have" in done.stderr, done.stderr
    assert "portable" in found
    for made in found.values():
        for ours, plain in zip(made, found["portable"], strict=True):
            assert _same(ours, plain)
