"""Stochastic rounding: a sum goes up or down by chance, so that on average nothing of it is lost.

Rounding to nearest gives the same weight again where what is added is less than half a step. Here x, between its
neighbours ``lo <= |x| <= hi`` on the weight's grid, goes to ``hi`` with the probability ``(|x| - lo) / (hi - lo)``.
The random bits are a hash of the key, and of the element's row and column in the whole tensor: however a tensor is
cut, sharded or walked through, and whatever computes it, the bits are the same, and they can be had again.

The hash is two rounds of multiplication and shift, with odd multipliers that are known to mix well (C. Wellons'
"prospector"), on 32 bits: about ten integer operations for an element, once those of its row are done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STOCHASTIC, KEEP_ZEROS, FLIPPED = 1, 2, 4

_MASK = 0xFFFFFFFF
_STEP = 0x9E3779B9  # 2^32 over the golden ratio: neighbours in a row begin far apart


def key_for(seed: int, name: str) -> int:
    """64 bits for a tensor, by the canonical name under which it is stored: each has noise of its own."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


class Mode(NamedTuple):
    """How the sums of one weight are stored, as ops take it: four ints.

    Attributes:
        flags: STOCHASTIC: by chance, else to nearest. KEEP_ZEROS: what is 0 stays 0. FLIPPED: each random bit is its
            opposite. fp32 and fp64 weights are always rounded to nearest.
        key: 64 bits, as a signed int.
        row, column: of the weight's first element in the whole tensor.
    """

    flags: int = 0
    key: int = 0
    row: int = 0
    column: int = 0


NEAREST = Mode()


def modes_of(modes: Sequence[int], count: int) -> list[Mode]:
    """The modes of so many weights, from an op's list: empty, or four ints for each weight."""
    return [Mode(*modes[4 * i : 4 * i + 4]) for i in range(count)] if modes else [NEAREST] * count


def bits(mode: Mode, rows: slice, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """The random bits of some rows of a weight.

    Args:
        mode: the weight's.
        rows: with start and stop, counted from the weight's first.
        columns: of the weight.

    Returns:
        [rows, columns] int64, of values below 2^32.
    """
    row = torch.arange(mode.row + rows.start, mode.row + rows.stop, device=device).unsqueeze(1) & _MASK
    column = torch.arange(mode.column, mode.column + columns, device=device) & _MASK
    row_a = _mix((mode.key & _MASK) ^ row)
    row_b = _mix(row_a ^ (mode.key >> 32 & _MASK))
    random = _mix(((column ^ row_a) * _STEP + row_b) & _MASK)
    return random ^ _MASK if mode.flags & FLIPPED else random


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32 bits, in int64: products wrap, and their low halves are right."""
    x = x ^ x >> 16
    x = x * 0x21F0AAAD & _MASK
    x = x ^ x >> 15
    x = x * 0xD35A2D97 & _MASK
    return x ^ x >> 15


def rounded(values: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """``values`` on the grid of ``dtype``, away from zero where the bits dropped and the random ones carry.

    Args:
        values: fp32.
        dtype: bf16 or fp16.
        random: int64, of the same shape; values below 2^32.

    Exact values stay. NaN, infinities, and what would carry past the largest number are rounded to nearest.
    """
    pattern = values.view(torch.int32).long()
    magnitude = pattern & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        found = magnitude + (random >> 16) >> 16
        past = 0x7F80
    else:
        subnormal = magnitude < 0x38800000
        steps = values.abs().mul(2.0**24).masked_fill(~subnormal, 0)
        whole = steps.floor()
        up = steps - whole + (random >> 8).float() * 2.0**-24 >= 1
        found = torch.where(subnormal, whole.long() + up, magnitude - 0x38000000 + (random >> 19) >> 13)
        past = 0x7C00
    signed = (found | pattern >> 16 & 0x8000).to(torch.int16).view(dtype)
    return torch.where(found < past, signed, values.to(dtype))


def store_(weight: Tensor, sums: Tensor, mode: Mode, rows: slice) -> None:
    """``weight[rows]`` takes the sums, rounded as the mode says.

    Args:
        weight: [m, n].
        sums: of the weight and its terms, [rows, n], fp32 (fp64 for an fp64 weight).
        rows: with start and stop.
    """
    block = weight[rows]
    if mode.flags & STOCHASTIC and block.element_size() == 2:
        sums = rounded(sums, block.dtype, bits(mode, rows, block.shape[1], block.device))
    if mode.flags & KEEP_ZEROS:
        sums = torch.where(block == 0, block, sums.to(block.dtype))
    block.copy_(sums)
