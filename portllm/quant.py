"""Low-rank updates of quantised weights in plain torch: decode, add, encode, one tile of whole blocks at a time.

A quantised weight is two tensors: ``codes``, numbers of a few bits each, and ``scales``, one for each block of
weights. It stands for ``W = value(code) * scale`` (nvfp4: ``* (scale * global_scale)``).

Sources: fp8 e4m3, arXiv 2209.05433; e2m1, e8m0 and MXFP4, OCP Microscaling Formats (MX) v1.0; NVFP4, NVIDIA's
documentation of the format; NF4, arXiv 2305.14314, with the table that bitsandbytes writes beside its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import KEEP_ZEROS, STOCHASTIC, bits, modes_of
from .reference import Delta, ieee_matmul

# Larger blocks than this (the scale of a whole tensor) keep their scale by range alone, for which one number has to be
# remembered and not the block; smaller ones, at most 256 KB in fp32, by the error that each scale would leave.
LARGEST_TILED_BLOCK = 1 << 16
# Weights that are in fp32 at a time, if blocks are no larger.
TILE_ELEMENTS = 1 << 18

E8M0 = torch.float8_e8m0fnu
E4M3 = torch.float8_e4m3fn
E4M3_LARGEST, _E4M3_SMALLEST_NORMAL, _E4M3_SMALLEST = 448.0, 2.0**-6, 2.0**-9
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are the same with a minus

Shape = tuple[int, int]


@dataclass(frozen=True)
class Scheme:
    """How the numbers of one kind of weight are coded.

    Attributes:
        name: as the op takes it.
        codes: dtype of the codes.
        scales: dtypes that the scales may have; uint8 stands for e8m0.
        largest: the largest value of a code, to which a fresh scale brings the largest weight of its block.
        packing: codes in a byte: "one", or two, of which the first is in the "high" or the "low" nibble.
        decode: codes, uint8, one an element -> their values, fp32.
        encode: fp32 in units of the scale, and 32 random bits for each (int64) or None -> codes, uint8.
        is_flat: blocks run on from one row into the next.
        zero: the code of 0.
    """

    name: str
    codes: torch.dtype
    scales: tuple[torch.dtype, ...]
    largest: float
    packing: Literal["one", "high", "low"]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor | None], Tensor]
    is_flat: bool = False
    zero: int = 0

    def grid(self, shape: Shape, block: Shape) -> Shape:
        """How many scales a weight of this shape has, down and across."""
        if self.is_flat:
            return _ceil(shape[0] * shape[1], block[1]), 1
        return _ceil(shape[0], block[0]), _ceil(shape[1], block[1])

    def row_unit(self, columns: int, block: Shape) -> int:
        """After every so many rows blocks and bytes end, so that a weight may be cut there."""
        return block[1] // math.gcd(columns, block[1]) if self.is_flat else block[0]

    def tile_rows(self, columns: int, block: Shape) -> int:
        """Rows of a tile: of whole blocks, or, where they are large, of one of them."""
        if is_large(block):
            return max(1, TILE_ELEMENTS // columns)
        unit = self.row_unit(columns, block)
        return unit * max(1, TILE_ELEMENTS // max(1, columns * unit))

    def code_bytes(self, elements: int) -> int:
        """Bytes that so many codes take."""
        return elements if self.packing == "one" else _ceil(elements, 2)


def is_large(block: Shape) -> bool:
    """Whether blocks of this size are walked through twice, tile by tile."""
    return block[0] * block[1] > LARGEST_TILED_BLOCK


def lowrank_requantise_(
    codes: Tensor,
    scales: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    scheme: str,
    block_rows: int,
    block_columns: int,
    global_scale: float,
    modes: Sequence[int],
) -> Tensor:
    """In place: ``W <- requantise(W + sum_t scaling_t * (lora_B_t @ lora_A_t))``, in fp32.

    Args and result: those of ``portllm.requantise.lowrank_requantise_``, which checks them.

    The sum S = W + D is formed as ``reference.lowrank_add_`` forms it, and then, for each block:

    Scale. ``fresh = max|S| / largest`` (nvfp4: then ``/ global_scale``), rounded to the dtype of the scales (e8m0: up
    to a power of two). Where that is 0 or no finite number, the old scale stays. Of blocks of at most
    ``LARGEST_TILED_BLOCK`` weights the old scale stays as well if the squared error that it leaves, after rounding to
    nearest, is at most that of the fresh one; of larger blocks if ``max|S| <= largest * old scale``.

    Codes. ``S / scale`` in fp32, brought to the nearest value of the grid (ties to the even code, saturating), or
    rounded stochastically. Where S is W and the scale stays, the old code stays, whatever it is.
    """
    kind, block = SCHEMES[scheme], (block_rows, block_columns)
    weight = _Weight(kind, codes, scales, (lora_B[0].shape[0], lora_A[0].shape[1]), block, global_scale)
    like = torch.empty((), dtype=torch.float32, device=codes.device).expand(weight.shape)
    update = _Update(weight, Delta(like, lora_A, lora_B, scalings), modes)
    with ieee_matmul():
        for rows in weight.block_rows():
            if is_large(block):
                update.large_blocks(rows)
            else:
                update.small_blocks(rows)
    return update.sums


def dequantise(
    codes: Tensor, scales: Tensor, shape: Shape, scheme: str, block: Shape, global_scale: float = 1.0
) -> Tensor:
    """The weight [m, n] in fp32 that codes and scales stand for; args as ``lowrank_requantise_``."""
    weight = _Weight(SCHEMES[scheme], codes, scales, shape, block, global_scale)
    made = torch.empty(shape, dtype=torch.float32, device=codes.device)
    for blocks in weight.block_rows():
        for rows in weight.tiles(blocks):
            made[rows] = weight.from_blocks(weight.decode(weight.codes_of(rows), weight.scales_of(rows)), rows)
    return made


class _Weight:
    """One weight, as tiles of rows and as blocks: [blocks down, rows, blocks across, columns], padded with zeros."""

    def __init__(
        self, scheme: Scheme, codes: Tensor, scales: Tensor, shape: Shape, block: Shape, global_scale: float
    ) -> None:
        self.scheme, self.shape, self.block = scheme, shape, block
        self._codes = codes.view(-1).view(torch.uint8)
        self._scales = as_e8m0(scales).view(scheme.grid(shape, block))
        self._global_scale = torch.tensor(global_scale, dtype=torch.float32, device=codes.device)

    # -- tiles ---------------------------------------------------------------------------------------------------

    def block_rows(self) -> Iterator[slice]:
        """Rows of tiles of whole blocks; where blocks are large, of whole blocks, to be cut by ``tiles``."""
        large = is_large(self.block)
        return _slices(0, self.shape[0], self.block[0] if large else self._tile_rows)

    def tiles(self, rows: slice) -> Iterator[slice]:
        return _slices(rows.start, rows.stop, self._tile_rows)

    @property
    def _tile_rows(self) -> int:
        return self.scheme.tile_rows(self.shape[1], self.block)

    def to_blocks(self, rows: Tensor, fill: int = 0) -> Tensor:
        """[t, n] -> a tile as blocks."""
        height, width = self.block
        if is_large(self.block):
            height = rows.shape[0]
        if self.scheme.is_flat:
            rows = rows.reshape(1, -1)
        padding = (0, -rows.shape[1] % width, 0, -rows.shape[0] % height)
        padded = F.pad(rows, padding, value=fill) if any(padding) else rows
        if self.scheme.is_flat:
            return padded.view(-1, 1, 1, width)
        return padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)

    def from_blocks(self, blocks: Tensor, rows: slice) -> Tensor:
        """A tile as blocks -> [t, n]."""
        t, n = rows.stop - rows.start, self.shape[1]
        if self.scheme.is_flat:
            return blocks.reshape(-1)[: t * n].view(t, n)
        return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)[:t, :n]

    # -- what is stored ------------------------------------------------------------------------------------------

    def codes_of(self, rows: slice) -> Tensor:
        """Codes as blocks, uint8, one an element."""
        t, n = rows.stop - rows.start, self.shape[1]
        codes = _unpack(self._codes[self._bytes_of(rows)], self.scheme.packing)
        return self.to_blocks(codes[: t * n].view(t, n), fill=self.scheme.zero)

    def write_codes(self, rows: slice, codes: Tensor) -> None:
        flat = self.from_blocks(codes, rows).reshape(-1)
        self._codes[self._bytes_of(rows)] = _pack(flat, self.scheme.packing, self.scheme.zero)

    def scales_of(self, rows: slice) -> Tensor:
        """Scales as stored, [blocks down, blocks across]."""
        return self._scales[self._blocks_of(rows)]

    def write_scales(self, rows: slice, scales: Tensor) -> None:
        self.scales_of(rows).copy_(scales)

    def _bytes_of(self, rows: slice) -> slice:
        n, count = self.shape[1], self.scheme.code_bytes
        return slice(count(rows.start * n), count(rows.stop * n))

    def _blocks_of(self, rows: slice) -> slice:
        if self.scheme.is_flat:
            n, width = self.shape[1], self.block[1]
            return slice(rows.start * n // width, _ceil(rows.stop * n, width))
        return slice(rows.start // self.block[0], _ceil(rows.stop, self.block[0]))

    # -- numbers -------------------------------------------------------------------------------------------------

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes as blocks, scales as stored -> weights, fp32."""
        return self.scheme.decode(codes) * self._units(scales)

    def encode(self, weights: Tensor, scales: Tensor, bits: Tensor | None = None) -> Tensor:
        """Weights as blocks, scales as stored -> codes; stochastic where there are random bits."""
        return self.scheme.encode(weights / self._units(scales), bits)

    def fresh_scales(self, largest: Tensor) -> Tensor:
        """The scales, as stored, that bring weights of this size (fp32) to the largest code."""
        fresh, dtype = largest / self.scheme.largest, self._scales.dtype
        if dtype == E8M0:
            return _power_of_two_above(fresh)
        if dtype == E4M3:
            return _encode_e4m3(fresh / self._global_scale, None).view(E4M3)
        return fresh.clamp(max=torch.finfo(dtype).max).to(dtype)

    def range_of(self, scales: Tensor) -> Tensor:
        """The largest weight that each scale, as stored, can hold; fp32."""
        return self.scheme.largest * self._units(scales)[:, 0, :, 0]

    def _units(self, scales: Tensor) -> Tensor:
        """Scales as stored -> fp32 [blocks down, 1, blocks across, 1]."""
        wide = scales.float()
        if scales.dtype == E4M3:
            wide = wide * self._global_scale
        return wide[:, None, :, None]


class _Update:
    """The pass over one weight; ``sums`` are ``||D||^2``, ``<W' - W, D>`` and ``||W' - W||^2``, fp64."""

    def __init__(self, weight: _Weight, delta: Delta, modes: Sequence[int]) -> None:
        self._weight, self._delta = weight, delta
        (self._mode,) = modes_of(modes, 1)
        self.sums = torch.zeros(3, dtype=torch.float64, device=weight._codes.device)

    def small_blocks(self, rows: slice) -> None:
        """A tile of whole blocks."""
        weight = self._weight
        scales = weight.scales_of(rows).clone()
        codes, old, delta, total = self._add(rows, scales)
        fresh = weight.fresh_scales(total.abs().amax((1, 3)))
        kept = torch.where(total == old, codes, weight.encode(total, scales))
        renewed = weight.encode(total, fresh)
        renew = _is_usable(fresh) & ~(self._error(total, kept, scales) <= self._error(total, renewed, fresh))
        weight.write_scales(rows, _where(renew, fresh, scales))
        nearest = torch.where(renew[:, None, :, None], renewed, kept)
        self._write(rows, codes, old, delta, total, renew, nearest)

    def large_blocks(self, rows: slice) -> None:
        """Rows of whole blocks, in tiles: once for the range, once to write."""
        weight = self._weight
        scales = weight.scales_of(rows).clone()
        found = [self._add(tile, scales)[3].abs().amax((1, 3)) for tile in weight.tiles(rows)]
        largest = torch.stack(found).amax(0)
        fresh = weight.fresh_scales(largest)
        renew = _is_usable(fresh) & ~(largest <= weight.range_of(scales))
        chosen = _where(renew, fresh, scales)
        for tile in weight.tiles(rows):
            codes, old, delta, total = self._add(tile, scales)
            stays = (total == old) & ~renew[:, None, :, None]
            nearest = torch.where(stays, codes, weight.encode(total, chosen))
            weight.write_scales(rows, chosen)
            self._write(tile, codes, old, delta, total, renew, nearest)

    def _add(self, rows: slice, scales: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a tile, as blocks: codes, W, D and S."""
        weight = self._weight
        codes = weight.codes_of(rows)
        old = weight.decode(codes, scales)
        delta = weight.to_blocks(self._delta.rows(rows))
        total = old + delta
        if self._mode.flags & KEEP_ZEROS:
            total = torch.where(old == 0, old, total)
        return codes, old, delta, total

    def _error(self, total: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        """The squared error of each block, fp64."""
        return (self._weight.decode(codes, scales).double() - total).square().sum((1, 3))

    def _write(
        self, rows: slice, codes: Tensor, old: Tensor, delta: Tensor, total: Tensor, renew: Tensor, nearest: Tensor
    ) -> None:
        weight = self._weight
        scales = weight.scales_of(rows)
        chosen = nearest
        if self._mode.flags & STOCHASTIC:
            random = weight.to_blocks(bits(self._mode, rows, weight.shape[1], codes.device))
            stays = (total == old) & ~renew[:, None, :, None]
            chosen = torch.where(stays, codes, weight.encode(total, scales, random))
        weight.write_codes(rows, chosen)
        change, delta = weight.decode(chosen, scales).double() - old, delta.double()
        self.sums += torch.stack([delta.square().sum(), (change * delta).sum(), change.square().sum()])


def _rounds_up(fraction: Tensor, bits: Tensor) -> Tensor:
    """Whether to round away from zero, with the fraction as probability; all in fp32."""
    return fraction + (bits >> 8).float() * 2.0**-24 >= 1


# -- grids -------------------------------------------------------------------------------------------------------


def _decode_e4m3(codes: Tensor) -> Tensor:
    return codes.view(E4M3).float()


def _encode_e4m3(values: Tensor, bits: Tensor | None) -> Tensor:
    values = values.clamp(-E4M3_LARGEST, E4M3_LARGEST)
    if bits is not None:
        size = values.abs()
        # 20 of fp32's 23 bits are dropped: the random ones below them carry into those that stay, or do not.
        normal = (size.view(torch.int32) + (bits >> 12).int() & ~0xFFFFF).view(torch.float32)
        steps = size / _E4M3_SMALLEST
        whole = steps.floor()
        tiny = (whole + _rounds_up(steps - whole, bits)) * _E4M3_SMALLEST
        rounded = torch.where(size >= _E4M3_SMALLEST_NORMAL, normal, tiny).copysign(values)
        values = torch.where(size.isnan(), values, rounded)
    return values.to(E4M3).view(torch.uint8)


def _decode_int8(codes: Tensor) -> Tensor:
    return codes.view(torch.int8).float()


def _encode_int8(values: Tensor, bits: Tensor | None) -> Tensor:
    """-127 to 127; no number becomes 0."""
    values = values.nan_to_num(0.0).clamp(-127, 127)
    if bits is None:
        return values.round().to(torch.int8).view(torch.uint8)
    size = values.abs()
    whole = size.floor()
    return (whole + _rounds_up(size - whole, bits)).copysign(values).to(torch.int8).view(torch.uint8)


def _decode_nf4(codes: Tensor) -> Tensor:
    return _table(NF4_VALUES, codes)[codes.int()]


def _encode_nf4(values: Tensor, bits: Tensor | None) -> Tensor:
    return _nearest(_table(NF4_VALUES, values), values.nan_to_num(0.0), bits)


def _decode_e2m1(codes: Tensor) -> Tensor:
    return _table((*E2M1_MAGNITUDES, *(-x for x in E2M1_MAGNITUDES)), codes)[codes.int()]


def _encode_e2m1(values: Tensor, bits: Tensor | None) -> Tensor:
    """The sign is kept, also of what is rounded to zero; no number becomes 0."""
    values = values.nan_to_num(0.0)
    return _nearest(_table(E2M1_MAGNITUDES, values), values.abs(), bits) + values.signbit().byte() * 8


def _table(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _nearest(table: Tensor, values: Tensor, bits: Tensor | None) -> Tensor:
    """Indices into an ascending table that has a 0: of the nearest value, or of one of the two neighbours."""
    lower = (torch.bucketize(values, table, right=True) - 1).clamp(0, len(table) - 2)
    low, high = table[lower], table[lower + 1]
    if bits is None:
        middle = (low.double() + high.double()) / 2
        is_upper = (values > middle) | (values == middle) & (lower % 2 == 1)
    else:
        near, far = torch.where(low < 0, high.abs(), low), torch.where(low < 0, low.abs(), high)
        is_upper = _rounds_up((values.abs() - near) / (far - near), bits) != (low < 0)
    return (lower + is_upper).to(torch.uint8)


def nearest_in(table: Tensor, values: Tensor) -> Tensor:
    """Indices, uint8, of the nearest values in an ascending table of at most 256."""
    return _nearest(table, values, None)


def _power_of_two_above(values: Tensor) -> Tensor:
    """The smallest power of two that is no smaller, as e8m0."""
    mantissa, exponent = torch.frexp(values)
    code = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127) + 127
    # e8m0 has no 0: where there is nothing to scale its NaN stands, which is no usable scale.
    return torch.where((values > 0) & values.isfinite(), code, 255).to(torch.uint8).view(E8M0)


def as_e8m0(scales: Tensor) -> Tensor:
    """Scales kept as uint8 are e8m0."""
    return scales.view(E8M0) if scales.dtype == torch.uint8 else scales


def _is_usable(scales: Tensor) -> Tensor:
    wide = scales.float()
    return wide.isfinite() & (wide > 0)


def _where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """torch.where, also for types of which torch only knows the bits."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.where(condition, a.view(bits), b.view(bits)).view(a.dtype)


def _unpack(codes: Tensor, packing: str) -> Tensor:
    if packing == "one":
        return codes
    nibbles = (codes >> 4, codes & 15) if packing == "high" else (codes & 15, codes >> 4)
    return torch.stack(nibbles, dim=1).view(-1)


def _pack(codes: Tensor, packing: str, zero: int) -> Tensor:
    if packing == "one":
        return codes
    first, second = F.pad(codes, (0, codes.numel() % 2), value=zero).view(-1, 2).unbind(1)
    return first << 4 | second if packing == "high" else second << 4 | first


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


_FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
_MX_SCALES = (torch.uint8, E8M0)

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8_e4m3", E4M3, (*_FLOAT_SCALES, *_MX_SCALES), E4M3_LARGEST, "one", _decode_e4m3, _encode_e4m3),
        Scheme("int8", torch.int8, _FLOAT_SCALES, 127.0, "one", _decode_int8, _encode_int8),
        Scheme("nf4", torch.uint8, (torch.float32,), 1.0, "high", _decode_nf4, _encode_nf4, is_flat=True, zero=7),
        Scheme("mxfp4", torch.uint8, _MX_SCALES, 6.0, "low", _decode_e2m1, _encode_e2m1),
        Scheme("nvfp4", torch.uint8, (E4M3,), 6.0, "low", _decode_e2m1, _encode_e2m1),
    )
}
