"""The op on quantised weights: its grids and scales against brute force, and no more error than the long way round."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from portllm import quant
from portllm.errors import BackendError
from portllm.quant import E8M0, LARGEST_TILED_BLOCK, SCHEMES, dequantise
from portllm.requantise import lowrank_requantise_

Shape = tuple[int, int]

# Values of all codes, written down again: e4m3 from its definition, the others as tables.
E2M1 = [s * x for s in (1, -1) for x in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
E4M3 = [
    (-1) ** (c >> 7) * (2.0**-6 * (c & 7) / 8 if c >> 3 & 15 == 0 else 2.0 ** ((c >> 3 & 15) - 7) * (1 + (c & 7) / 8))
    for c in range(256)
]
VALUES = {
    "fp8_e4m3": torch.tensor([math.nan if c & 127 == 127 else v for c, v in enumerate(E4M3)], dtype=torch.float64),
    "int8": torch.tensor([c - 256 * (c > 127) for c in range(256)], dtype=torch.float64),
    "nf4": torch.tensor(quant.NF4_VALUES, dtype=torch.float64),
    "mxfp4": torch.tensor(E2M1, dtype=torch.float64),
    "nvfp4": torch.tensor(E2M1, dtype=torch.float64),
}
BLOCKS = {
    "fp8_e4m3": ("tensor", "row", (128, 128), (1, 128), (16, 32)),
    "int8": ("tensor", "row", (1, 128)),
    "nf4": ((1, 64), (1, 128)),
    "mxfp4": ((1, 32),),
    "nvfp4": ((1, 16),),
}
SHAPES = ((1, 2), (130, 96), (64, 64), (261, 330), (7, 32), (3, 258))
CASES = [
    pytest.param(scheme.name, dtype, block, id=f"{scheme.name}-{str(dtype).removeprefix('torch.')}-{block}")
    for scheme in SCHEMES.values()
    for dtype in scheme.scales
    for block in BLOCKS[scheme.name]
]


class Weight:
    """A quantised weight of random codes and scales."""

    def __init__(self, name: str, dtype: torch.dtype, block: Any, shape: Shape) -> None:
        self.name, self.shape, self.scheme = name, shape, SCHEMES[name]
        self.block: Shape = {"tensor": shape, "row": (1, shape[1])}.get(block, block)
        count = self.scheme.code_bytes(math.prod(shape))
        codes = torch.randint(0, 256, (count,), dtype=torch.uint8)
        if name == "fp8_e4m3":
            codes[codes & 127 == 127] = 0x7E  # no NaN
        if name == "int8":
            codes[codes == 128] = 129  # -128 is no code of ours
        if name == "nf4" and math.prod(shape) % 2:
            codes[-1] = codes[-1] & 0xF0 | 7  # the half byte that is over
        self.codes = codes.view(self.scheme.codes)
        grid = self.scheme.grid(shape, self.block)
        if dtype in (torch.uint8, E8M0):
            self.scales = torch.randint(115, 124, grid, dtype=torch.uint8).view(dtype)
        else:
            self.scales = (torch.rand(grid) + 0.5).mul(0.01 if name != "nvfp4" else 100).to(dtype)
        self.global_scale = 1e-4 if name == "nvfp4" else 1.0

    def copy(self) -> Weight:
        made = object.__new__(Weight)
        made.__dict__ = self.__dict__ | {"codes": self.codes.clone(), "scales": self.scales.clone()}
        return made

    def units(self) -> Tensor:
        """The scale of each weight [m, n] in fp64."""
        scales = self.scales.view(E8M0) if self.scales.dtype == torch.uint8 else self.scales
        wide = scales.double().view(self.scheme.grid(self.shape, self.block))
        if self.name == "nvfp4":
            wide = wide * self.global_scale
        return self.spread(wide)

    def spread(self, grid: Tensor) -> Tensor:
        m, n = self.shape
        if self.name == "nf4":
            return grid.view(-1).repeat_interleave(self.block[1])[: m * n].view(m, n)
        return grid.repeat_interleave(self.block[0], 0)[:m].repeat_interleave(self.block[1], 1)[:, :n]

    def values(self) -> Tensor:
        """What the codes stand for, in units of the scale; fp64."""
        codes = self.codes.view(torch.uint8).int()
        if self.scheme.packing != "one":
            high, low = codes >> 4, codes & 15
            codes = torch.stack((high, low) if self.name == "nf4" else (low, high), 1).flatten()
        return VALUES[self.name][codes[: math.prod(self.shape)]].view(self.shape)

    def weight(self) -> Tensor:
        return self.values() * self.units()

    def update(
        self, *terms: tuple[Tensor, Tensor, float], modes: tuple[int, ...] = (), backend: str = "torch"
    ) -> Tensor:
        lora_A, lora_B, scalings = zip(*terms, strict=True)
        return lowrank_requantise_(
            self.codes, self.scales, lora_A, lora_B, scalings, self.name, *self.block, self.global_scale, modes, "torch"
        )

    def same_as(self, other: Weight) -> bool:
        pairs = ((self.codes, other.codes), (self.scales, other.scales))
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def round_to(values: Tensor, table: Tensor) -> Tensor:
    """The nearest of the table's values; fp64."""
    grid = table[~table.isnan()].unique()
    middles = (grid[1:] + grid[:-1]) / 2
    return grid[torch.bucketize(values, middles)]


def fresh_units(weight: Weight, total: Tensor) -> Tensor:
    """The scales that one pass over the whole weight in fp64 gives, spread."""
    m, n = weight.shape
    rows, columns = weight.block
    if weight.name == "nf4":
        padded = torch.nn.functional.pad(total.flatten(), (0, -m * n % columns)).view(-1, columns)
        largest = padded.abs().amax(1, keepdim=True)
    else:
        padded = torch.nn.functional.pad(total, (0, -n % columns, 0, -m % rows))
        largest = padded.abs().unflatten(1, (-1, columns)).amax(2).unflatten(0, (-1, rows)).amax(1)
    scale = largest / weight.scheme.largest
    if weight.scales.dtype in (torch.uint8, E8M0):
        scale = torch.exp2(torch.log2(scale).ceil()).clamp(2.0**-127)
    elif weight.name == "nvfp4":
        scale = (scale / weight.global_scale).float().clamp(max=448).to(quant.E4M3).double() * weight.global_scale
    else:
        scale = scale.to(weight.scales.dtype).double()
    return weight.spread(scale)


def term(shape: Shape, size: float, rank: int = 3) -> tuple[Tensor, Tensor, float]:
    """A term whose product has elements of about this size."""
    return torch.randn(rank, shape[1]), torch.randn(shape[0], rank), size / math.sqrt(rank)


def shapes_for(name: str) -> Iterator[Shape]:
    yield from (shape for shape in SHAPES if shape[1] % 2 == 0 or name not in ("mxfp4", "nvfp4"))
    if name not in ("mxfp4", "nvfp4"):
        yield 37, 53


@pytest.mark.parametrize(("name", "dtype", "block"), CASES)
def test_no_more_error_than_to_dequantise_add_and_quantise_anew(name: str, dtype: torch.dtype, block: Any) -> None:
    for shape in shapes_for(name):
        for relative in (1e-4, 1e-2, 0.3, 10.0):
            weight = Weight(name, dtype, block, shape)
            before = weight.weight()
            lora_A, lora_B, scaling = term(shape, relative * float(before.square().mean().sqrt()) + 1e-6)
            total = before + scaling * (lora_B.double() @ lora_A.double())
            weight.update((lora_A, lora_B, scaling))
            ours = float((weight.weight() - total).square().sum())
            units = fresh_units(weight, total)
            steps = torch.where(units > 0, total / units, 0.0)
            theirs = float((round_to(steps, VALUES[name]) * units - total).square().sum())
            if math.prod(weight.block) > LARGEST_TILED_BLOCK:
                # The scale of a whole tensor stays if it reaches: finer than need be, or up to a quarter step coarser.
                theirs *= 2.0
            # Of norms, since W, D and S are rounded to fp32 on the way: a few units in the last place of each weight.
            rounding = 1e-6 * float(before.norm() + (total - before).norm())
            assert math.sqrt(ours) <= math.sqrt(theirs) * (1 + 1e-6) + rounding, (shape, relative)


@pytest.mark.parametrize(("name", "dtype", "block"), CASES)
@pytest.mark.parametrize("modes", [(), (1, 7, 0, 0), (3, 7, 5, 5)], ids=["nearest", "stochastic", "zeros"])
def test_without_a_change_every_code_stays(name: str, dtype: torch.dtype, block: Any, modes: tuple[int, ...]) -> None:
    for shape in shapes_for(name):
        weight = Weight(name, dtype, block, shape)
        before = weight.copy()
        lora_A, lora_B, _ = term(shape, 1.0)
        sums = weight.update((lora_A, lora_B, 0.0), modes=modes)
        assert weight.same_as(before)
        assert sums.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("name", "dtype", "block"), CASES)
def test_decodes_as_the_tables_say_and_sums_what_it_wrote(name: str, dtype: torch.dtype, block: Any) -> None:
    for shape in shapes_for(name):
        weight = Weight(name, dtype, block, shape)
        before = weight.weight()
        found = dequantise(weight.codes, weight.scales, shape, name, weight.block, weight.global_scale)
        torch.testing.assert_close(found.double(), before, rtol=2e-7, atol=0)
        lora_A, lora_B, scaling = term(shape, 0.05)
        delta = scaling * (lora_B.double() @ lora_A.double())
        sums = weight.update((lora_A, lora_B, scaling))
        change = weight.weight() - before
        expected = torch.stack([delta.square().sum(), (change * delta).sum(), change.square().sum()])
        size = float(delta.norm() * change.norm() + delta.norm() ** 2 + change.norm() ** 2 + before.norm() ** 2 * 1e-5)
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5 * size)


@pytest.mark.parametrize("name", SCHEMES)
def test_nearest_and_ties_and_saturation(name: str) -> None:
    """Every value, every middle between neighbours, and what is beyond the ends."""
    scheme, table = SCHEMES[name], VALUES[name]
    usable = table[table != -128] if name == "int8" else table
    grid = usable[~usable.isnan()].unique()
    middles = ((grid[1:] + grid[:-1]) / 2).float()
    exact = middles.double() == (grid[1:] + grid[:-1]) / 2
    tests = torch.cat([grid.float(), middles, torch.randn(4000) * scheme.largest, torch.tensor([1e9, -1e9, 0.0])])
    codes = scheme.encode(tests, None)
    expected = round_to(tests.double(), usable)
    found = table[codes.int()]
    tied = torch.zeros(len(tests), dtype=torch.bool)
    tied[len(grid) : len(grid) + len(middles)] = exact
    assert torch.equal(found[~tied], expected[~tied])
    lower, upper = grid[:-1][exact], grid[1:][exact]
    for low, high, value, code in zip(lower, upper, found[tied], codes[tied].tolist(), strict=True):
        assert value in (low, high)
        assert code % 2 == 0 or float(value) == 0.0


def largest_steps(weight: Weight, total: Tensor) -> Tensor:
    """At least the distance of the two neighbours of each number, for the scales that the weight has."""
    units = weight.units()
    size = (total / units).abs()
    if weight.name == "fp8_e4m3":
        return units * (size / 8).clamp(min=2.0**-9)
    if weight.name == "int8":
        return units
    return units * (size / 2).clamp(min=0.5) if weight.name != "nf4" else units * 0.31


@pytest.mark.parametrize(("name", "dtype", "block"), CASES)
def test_stochastic_rounding_is_unbiased(name: str, dtype: torch.dtype, block: Any) -> None:
    """By Hoeffding's inequality the sums stay within the bound in all but one of 10^13 runs."""
    shape, seeds = (96, 64), 24
    weight = Weight(name, dtype, block, shape)
    before = weight.weight()
    inside = VALUES[name].nan_to_num(0).abs().max() * 0.8
    lora_A, lora_B = torch.ones(1, shape[1]), torch.rand(shape[0], 1) + 0.5
    scaling = 1e-3 * float(weight.units().mean())
    delta = scaling * (lora_B.double() @ lora_A.double())
    total, variance, error = before + delta, 0.0, 0.0
    for seed in range(seeds):
        made = weight.copy()
        made.update((lora_A, lora_B, scaling), modes=(1, seed * 0x123456789ABCDEF % (1 << 63), 3, 4))
        counted = made.values().abs() <= inside  # what saturates is not meant
        counted &= weight.values().abs() <= inside
        error += float(((made.weight() - total) * delta)[counted].sum())
        variance += float((largest_steps(made, total) * delta)[counted].square().sum())
        again = weight.copy()
        again.update((lora_A, lora_B, scaling), modes=(1, seed * 0x123456789ABCDEF % (1 << 63), 3, 4))
        assert again.same_as(made)
    assert abs(error) <= math.sqrt(15.0 * variance) + 1e-6 * seeds * float((total * delta).abs().sum())


@pytest.mark.parametrize(("name", "dtype", "block"), CASES)
def test_stochastic_rounding_keeps_what_nearest_loses(name: str, dtype: torch.dtype, block: Any) -> None:
    """Of a patch far below a step nothing survives to nearest; by chance, its share does."""
    shape = (96, 64)
    weight = Weight(name, dtype, block, shape)
    size = 1e-4 * float(weight.units().min())
    near, far = weight.copy(), weight.copy()
    lora_A, lora_B, scaling = torch.ones(1, 64), torch.ones(96, 1), size
    assert float(near.update((lora_A, lora_B, scaling))[2]) <= float(near.weight().square().sum()) * 1e-2
    by_chance = far.update((lora_A, lora_B, scaling), modes=(1, 99, 0, 0))
    assert float(by_chance[0]) == pytest.approx(96 * 64 * size**2, rel=1e-4)


@pytest.mark.parametrize(("name", "dtype", "block"), [c for c in CASES if c.values[2] != "tensor"])
@pytest.mark.parametrize("flags", [0, 1])
def test_the_same_bits_however_the_weight_is_cut(name: str, dtype: torch.dtype, block: Any, flags: int) -> None:
    shape = (384, 96)
    whole = Weight(name, dtype, block, shape)
    pieces = whole.copy()
    lora_A, lora_B, scaling = term(shape, 0.02, rank=1)  # one product: no order of summation
    whole.update((lora_A, lora_B, scaling), modes=(flags, 12345, 10, 20))
    unit = whole.scheme.row_unit(shape[1], whole.block)
    grid, cut = whole.scheme.grid(shape, whole.block), 128 // unit * unit
    down = cut * shape[1] // whole.block[1] if name == "nf4" else cut // whole.block[0]
    at = whole.scheme.code_bytes(cut * shape[1])
    codes, scales = pieces.codes.view(-1), pieces.scales.view(grid)
    for rows, c, s in ((slice(0, cut), codes[:at], scales[:down]), (slice(cut, None), codes[at:], scales[down:])):
        modes = (flags, 12345, 10 + rows.start, 20)
        lowrank_requantise_(
            c, s, [lora_A], [lora_B[rows]], [scaling], name, *whole.block, whole.global_scale, modes, "torch"
        )
    assert pieces.same_as(whole)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay(name: str) -> None:
    weight = Weight(name, SCHEMES[name].scales[0], BLOCKS[name][-1], (64, 96))
    half = weight.codes.view(torch.uint8)
    half[: len(half) // 2] = {"nf4": 0x77}.get(name, 0)
    zeros = weight.values() == 0
    weight.update(term((64, 96), 0.5), modes=(2, 0, 0, 0))
    assert torch.equal(weight.values()[zeros], torch.zeros(int(zeros.sum()), dtype=torch.float64))
    assert not (weight.values() == 0).all()


def test_weights_of_nothing_take_a_patch() -> None:
    """All scales 0, as libraries write for rows of zeros."""
    weight = Weight("int8", torch.float32, "row", (8, 64))
    weight.codes.zero_()
    weight.scales.zero_()
    lora_A, lora_B, scaling = term((8, 64), 1.0)
    weight.update((lora_A, lora_B, scaling))
    delta = scaling * (lora_B @ lora_A)
    assert (weight.weight() - delta).norm() < 0.01 * delta.norm()


class _Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("block", ["first", "last"])
def test_no_more_than_a_tile_is_in_memory(name: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "TILE_ELEMENTS", 1 << 12)
    shape = (2048, 256)  # a hundred times a tile
    weight = Weight(name, SCHEMES[name].scales[0], BLOCKS[name][0 if block == "first" else -1], shape)
    with _Largest() as largest:
        quant.lowrank_requantise_(
            weight.codes, weight.scales, *([x] for x in term(shape, 0.1)), name, *weight.block, weight.global_scale, []
        )
    factors = 4 * 3 * max(shape)
    assert largest.nbytes <= max(8 * (1 << 12), 8 * 128 * 256 * ("fp8" in name), factors)


def test_what_does_not_fit_is_refused_before_a_write() -> None:
    weight = Weight("fp8_e4m3", torch.float32, (128, 128), (130, 96))
    before = weight.copy()
    lora_A, lora_B, scaling = term((130, 96), 1.0)
    good = [weight.codes, weight.scales, [lora_A], [lora_B], [scaling], "fp8_e4m3", 128, 128, 1.0, []]
    for index, value, message in (
        (5, "int9", "no scheme 'int9'"),
        (0, weight.codes[:-1], "must be 12480 contiguous"),
        (1, weight.scales[:1], "must be 2 x 1"),
        (1, weight.scales.double(), "float64"),
        (2, [], "at least one term"),
        (3, [lora_B[:, :1]], "does not give the shape"),
        (3, [lora_B.int()], "factors are"),
        (6, 0, "blocks of 0"),
        (9, [1], "must have 4"),
    ):
        arguments = list(good)
        arguments[index] = value
        with pytest.raises(ValueError, match=message):
            lowrank_requantise_(*arguments)
    with pytest.raises(BackendError, match="no backend 'gpu'"):
        lowrank_requantise_(*good, backend="gpu")
    assert weight.same_as(before)


def test_the_op_is_what_pytorch_asks_of_one() -> None:
    weight = Weight("int8", torch.float32, "row", (16, 32))
    lora_A, lora_B, scaling = term((16, 32), 0.1)
    arguments = (weight.codes, weight.scales, [lora_A], [lora_B], [scaling], "int8", 1, 32, 1.0, [])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.portllm.lowrank_requantise_, (*arguments, "torch"), test_utils=tests)
