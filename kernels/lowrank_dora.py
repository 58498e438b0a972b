"""DoRA in place, in two passes: the squares of ``W + D`` summed over rows or columns, then what they scale, written.

From top to bottom: the kernels, the launches, the public functions; tiles, sums and tables are those of
``lowrank_add``. Not yet measured on a device.

Why two passes: a block would have to hold a whole row until its norm is known, 57 KB of fp32 for 14336 columns, and
columns could not be done so at all. W is read twice and written once, 6 bytes for each bf16 of W instead of 4. Norms
from the Gram of the factors, ``||w||^2 + 2 s (w A') b + s^2 b (A A') b'``, would read W as often, for products with A'
instead of with A, and lose what cancels where W + D is small; so ``W + D`` is summed as the second pass sums it, and
squared in fp64. Every tile writes its own partial sums, which are then added up in one order: deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lowrank_add import (
    BLOCK_M,
    COLUMNS,
    NUM_WARPS,
    _check,
    _describe,
    _Launch,
    _multiprocessors,
    _on,
    _upload,
    locate,
    narrow,
    scaled_term,
    tile_sum,
)

# Without a limit on registers: fp64 takes two, and what waits for memory here is a second read anyway.
OPTIONS = {"num_warps": NUM_WARPS, "num_stages": 1, "enable_fp_fusion": False}
BLOCKS_PER_SM = 2


@triton.jit(do_not_specialize=["i_term", "n_tiles"])
def dora_squares_kernel(
    p_weight,  # int64 [8]: a row of the table of lowrank_add_kernel
    p_terms,  # int64 [n_terms, 8]
    p_scalings,  # fp32 [n_terms]
    p_partial,  # fp64 [tiles along the vectors, vectors]
    i_term,
    n_tiles,
    AXIS: tl.constexpr,  # 0: of each row, 1: of each column
    W_DTYPE: tl.constexpr,
    F_DTYPE: tl.constexpr,
    W_VECTOR: tl.constexpr,
    F_VECTOR: tl.constexpr,
    ONE_TERM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    m = tl.load(p_weight + 3)
    n = tl.load(p_weight + 4)
    tiles_n = tl.cdiv(n, BN)
    p_term = p_terms + i_term * COLUMNS
    p_scaling = p_scalings + i_term
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        p_w, o_m, o_n, m_m, m_n = locate(p_weight, i_tile, W_DTYPE, W_VECTOR, BM, BN)
        m_w = m_m[:, None] & m_n[None, :]
        b_w = tl.load(p_w, mask=m_w, other=0.0)  # [BM, BN]
        b_sum = scaled_term(p_term, p_scaling, o_m, o_n, m_m, m_n, F_DTYPE, F_VECTOR, BM, BN, BK, INTERPRET)
        # An infinite factor times what lies beside W would be NaN.
        b_tuned = tl.where(m_w, b_w.to(tl.float32) + b_sum, 0.0).to(tl.float64)
        b_squares = tl.sum(b_tuned * b_tuned, 1 - AXIS)  # [BM] or [BN]
        if AXIS == 0:
            tl.store(p_partial + (i_tile % tiles_n) * m + o_m, b_squares, mask=m_m)
        else:
            tl.store(p_partial + (i_tile // tiles_n) * n + o_n, b_squares, mask=m_n)


@triton.jit(do_not_specialize=["n_norms", "n_tiles", "keep"])
def dora_write_kernel(
    p_weight,  # int64 [8], p_terms, p_scalings: as above; terms with a norm come first
    p_terms,
    p_scalings,
    p_factors,  # fp32: strength * magnitude / norm, of one term after the other
    p_places,  # int64 [n_norms, 2]: where in them a term's begin; its axis
    n_norms,
    n_tiles,
    keep,  # fp32: the share of W that stays; NaN: none
    W_DTYPE: tl.constexpr,
    F_DTYPE: tl.constexpr,
    W_VECTOR: tl.constexpr,
    F_VECTOR: tl.constexpr,
    ONE_TERM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    i_end = tl.load(p_weight + 7)
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        p_w, o_m, o_n, m_m, m_n = locate(p_weight, i_tile, W_DTYPE, W_VECTOR, BM, BN)
        m_w = m_m[:, None] & m_n[None, :]
        b_w = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32)  # [BM, BN]
        b_total = tl.where(keep == keep, keep * b_w, -0.0)
        for i_term in range(n_norms):
            o_factor = tl.load(p_places + 2 * i_term)
            axis = tl.full([1], tl.load(p_places + 2 * i_term + 1), tl.int64)  # see load_factor
            # The one that is masked off is zero, and costs no branch.
            b_rows = tl.load(p_factors + o_factor + o_m, mask=m_m & (axis == 0), other=0.0)
            b_columns = tl.load(p_factors + o_factor + o_n, mask=m_n & (axis == 1), other=0.0)
            b_sum = scaled_term(
                p_terms + i_term * COLUMNS,
                p_scalings + i_term,
                o_m,
                o_n,
                m_m,
                m_n,
                F_DTYPE,
                F_VECTOR,
                BM,
                BN,
                BK,
                INTERPRET,
            )
            b_total += (b_rows[:, None] + b_columns[None, :]) * (b_w + b_sum)
        b_total += tile_sum(
            p_terms, p_scalings, n_norms, i_end, o_m, o_n, m_m, m_n,
            F_DTYPE, F_VECTOR, False, BM, BN, BK, INTERPRET,
        )  # fmt: skip
        tl.store(p_w, narrow(b_total, W_DTYPE, INTERPRET), mask=m_w)


class _Job:
    """One weight, laid so that its rows are contiguous, and its terms, those with a norm first."""

    def __init__(
        self,
        weight: Tensor,
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        axes: Sequence[int],
    ) -> None:
        order = sorted(range(len(axes)), key=lambda t: axes[t] < 0)  # keeps the order among equals
        flipped = weight.stride(0) < weight.stride(1)  # as _describe has it
        self.weight = weight
        self.axes = [1 - axes[t] if flipped else axes[t] for t in order if axes[t] >= 0]
        self.shape = weight.shape[::-1] if flipped else weight.shape
        factors = [lora_A[t] for t in order], [lora_B[t] for t in order]
        variant, entry = _describe(weight, *factors, [scalings[t] for t in order])
        self.launch: _Launch = _upload(weight.device, {variant: [entry]})[0]

    @property
    def grid(self) -> tuple[int]:
        return (min(self.launch.n_tiles, _multiprocessors(self.launch.device) * BLOCKS_PER_SM),)

    def squares(self) -> list[Tensor]:
        (m, n), variant = self.shape, self.launch.variant
        found = []
        for i, axis in enumerate(self.axes):
            tiles = -(-n // variant.block_n) if axis == 0 else -(-m // BLOCK_M)
            partial = self.weight.new_zeros(tiles, (m, n)[axis], dtype=torch.float64)
            if self.launch.n_tiles:
                with _on(self.launch.device):
                    dora_squares_kernel[self.grid](
                        self.launch.weights, self.launch.terms, self.launch.scalings, partial, i, self.launch.n_tiles,
                        AXIS=axis, **variant.constants(), **OPTIONS,
                    )  # fmt: skip
            found.append(partial.sum(0))
        return found

    def write(self, factors: Sequence[Tensor], keep: float) -> None:
        if not self.launch.n_tiles:
            return
        starts = [0, *accumulate(len(factor) for factor in factors)]
        places = torch.tensor(
            [[start, axis] for start, axis in zip(starts, self.axes, strict=False)] or [[0, 0]], dtype=torch.int64
        ).to(self.weight.device)
        packed = torch.cat(factors) if factors else self.weight.new_zeros(1, dtype=torch.float32)
        with _on(self.launch.device):
            dora_write_kernel[self.grid](
                self.launch.weights, self.launch.terms, self.launch.scalings, packed, places, len(factors),
                self.launch.n_tiles, keep if keep else float("nan"), **self.launch.variant.constants(), **OPTIONS,
            )  # fmt: skip


def _slices(n_terms: Sequence[int]) -> list[slice]:
    starts = [0, *accumulate(n_terms)]
    return [slice(*pair) for pair in pairwise(starts)]


def lowrank_dora_squares(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    axes: Sequence[int],
) -> list[Tensor]:
    """For each term with a norm, the squares of ``W + D`` summed over its vectors: fp64 [m] or [n].

    Args and errors are those of ``lowrank_add_``, and ``axes`` those of ``portllm.reference.lowrank_dora_``.
    """
    found = []
    for i, (weight, terms) in enumerate(zip(weights, _slices(n_terms), strict=True)):
        _check(i, weight, range(terms.start, terms.stop), lora_A, lora_B)
        found += _Job(weight, lora_A[terms], lora_B[terms], scalings[terms], axes[terms]).squares()
    return found


def lowrank_dora_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    magnitudes: Sequence[Tensor],
    axes: Sequence[int],
    strengths: Sequence[float],
    squares: Sequence[Tensor] = (),
) -> None:
    """DoRA in place; args and arithmetic: ``portllm.reference.lowrank_dora_``; errors: ``lowrank_add_``."""
    for i, (weight, terms) in enumerate(zip(weights, _slices(n_terms), strict=True)):
        _check(i, weight, range(terms.start, terms.stop), lora_A, lora_B)
    first = 0
    for weight, terms in zip(weights, _slices(n_terms), strict=True):
        mine = list(zip(scalings[terms], axes[terms], strengths[terms], strict=True))
        taken = [strength for _, axis, strength in mine if axis >= 0]
        scaled = [scaling if axis >= 0 else scaling * strength for scaling, axis, strength in mine]
        job = _Job(weight, lora_A[terms], lora_B[terms], scaled, axes[terms])
        last = first + len(taken)
        factors = []
        found = squares[first:last] if squares else job.squares()
        for magnitude, square, strength in zip(magnitudes[first:last], found, taken, strict=True):
            norm = square.sqrt().float()
            factors.append(torch.where(norm > 0, magnitude.float() / norm, 0.0) * strength)
        job.write(factors, 1.0 - sum(taken))
        first = last
