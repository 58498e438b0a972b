"""The update in plain torch: the truth that every kernel is held against, and the way where no kernel fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

# Elements of the fp32 scratch block: large enough for the matrix library, small enough to stay in cache.
_BLOCK_ELEMENTS = 1 << 21


# What weights and factors may be; all else is quantised, or no number to add to.
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def accumulation_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that products and sums are held in: fp64 for fp64 weights, else fp32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@contextmanager
def ieee_matmul() -> Iterator[None]:
    """Hold fp32 matrix products to IEEE fp32, whatever the user allowed (tf32, bf16) for the model itself."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    previous = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, previous, strict=True):
            switch.fp32_precision = precision


def rows_per_block(columns: int) -> int:
    """How many rows of ``columns`` elements are updated at a time, so that the fp32 scratch stays small."""
    return max(1, _BLOCK_ELEMENTS // max(1, columns))


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Cut ``rows`` into slices of ``rows_per_block``."""
    step = rows_per_block(columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def lowrank_add_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
) -> None:
    """In place, for each weight: ``W <- round(W + sum_t scaling_t * (lora_B_t @ lora_A_t))``.

    Args:
        weights: 2-D tensors [m, n]; fp64, fp32, fp16 or bf16; any strides.
        lora_A: [r, n] each, the terms of all weights one after the other.
        lora_B: [m, r] each, as ``lora_A``.
        scalings: one factor for each term.
        n_terms: how many terms belong to each weight.

    Products are summed in fp32 (fp64 for fp64 weights), scaled, summed over the terms and added to the weight
    in that dtype; then one round to nearest even into the weight's dtype.
    """
    first = 0
    with ieee_matmul():
        for weight, count in zip(weights, n_terms, strict=True):
            terms = slice(first, first + count)
            first += count
            delta = Delta(weight, lora_A[terms], lora_B[terms], scalings[terms])
            for rows in row_blocks(*weight.shape):
                block = weight[rows]
                block.copy_(delta.rows(rows).add_(block))


class Delta:
    """The sum of a weight's terms, a block of rows at a time."""

    def __init__(
        self, weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scalings: Sequence[float]
    ) -> None:
        self._like = weight
        self._dtype = accumulation_dtype(weight)
        self._terms = [(a.to(self._dtype), b, s) for a, b, s in zip(lora_A, lora_B, scalings, strict=True)]

    def rows(self, rows: slice) -> Tensor:
        """[rows, n], in the dtype that sums are held in; of zeros where there is no term."""
        block = self._like[rows]
        delta = torch.zeros(block.shape, dtype=self._dtype, device=block.device)
        for lora_A, lora_B, scaling in self._terms:
            delta.add_(lora_B[rows].to(self._dtype) @ lora_A, alpha=scaling)
        return delta


def lowrank_dora_squares(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    axes: Sequence[int],
) -> list[Tensor]:
    """For each term with a magnitude: ``sum (W + scaling * (lora_B @ lora_A))^2`` over each row, or each column.

    Args:
        weights, lora_A, lora_B, scalings, n_terms: as for ``lowrank_add_``.
        axes: of each term 0 (each row has a norm), 1 (each column has) or -1 (none: a plain term).

    Returns:
        fp64 [m] for each term of axis 0, [n] for each of axis 1. Elements are those that ``lowrank_dora_`` speaks of;
        their squares are fp64, which is exact unless the weight is fp64, and so are the sums, in any order.
    """
    found: list[Tensor] = []
    with ieee_matmul():
        for weight, terms in _slices(weights, n_terms):
            dora = [t for t in terms if axes[t] >= 0]
            mine = [torch.zeros(weight.shape[axes[t]], dtype=torch.float64, device=weight.device) for t in dora]
            deltas = [Delta(weight, [lora_A[t]], [lora_B[t]], [scalings[t]]) for t in dora]
            for rows in row_blocks(*weight.shape):
                base = weight[rows].to(accumulation_dtype(weight))
                for t, delta, squares in zip(dora, deltas, mine, strict=True):
                    tuned = base + delta.rows(rows)
                    squares[rows if axes[t] == 0 else slice(None)] += _squares(tuned, axes[t])
            found += mine
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
    """In place, for each weight: ``W <- round(W + sum_t strength_t (magnitude_t (W + D_t) / ||W + D_t|| - W))``.

    DoRA (arXiv 2402.09353, eq. 5), where ``D_t = scaling_t * (lora_B_t @ lora_A_t)``; a plain term adds
    ``strength_t D_t``. Every term sees the weight as it was before the call.

    Args:
        weights, lora_A, lora_B, scalings, n_terms, axes: as for ``lowrank_dora_squares``.
        magnitudes: [m] or [n] by the axis, for each term that has one; any floating-point dtype.
        strengths: of each term, the share of the way to what it would make of the weight alone.
        squares: what ``lowrank_dora_squares`` gives; summed here if there are none.

    Arithmetic, in fp32 (fp64 for fp64 weights)::

        tuned_t = W + D_t                                       as in lowrank_add_, for each term with a magnitude
        norm_t  = sqrt(squares_t)                               in fp64, then rounded once
        ratio_t = magnitude_t / norm_t, or 0 where not norm_t > 0 (a vector of zeros has no direction and stays zero)
        keep    = 1 - sum of the strengths of terms with a magnitude; in fp64, then rounded once
        total   = keep * W (nothing where keep is 0) + sum_t (strength_t * ratio_t) * tuned_t
                  + the sum of the plain terms, each scaled by scaling_t * strength_t, as in lowrank_add_
        W       = total, rounded once to nearest even

    A product and the sum that takes it may be fused.
    """
    given = iter(squares)
    magnitude_of = dict(zip((t for t, axis in enumerate(axes) if axis >= 0), magnitudes, strict=True))
    with ieee_matmul():
        for weight, terms in _slices(weights, n_terms):
            dtype = accumulation_dtype(weight)
            dora, plain = [t for t in terms if axes[t] >= 0], [t for t in terms if axes[t] < 0]
            known = {t: next(given) for t in dora} if squares else {}
            # Norms of columns take a pass of their own; those of rows are found on the way.
            for t in () if squares else (t for t in dora if axes[t] == 1):
                of_term = [[lora_A[t]], [lora_B[t]], [scalings[t]], [1], [1]]
                known[t] = lowrank_dora_squares([weight], *of_term)[0]  # type: ignore[arg-type]
            deltas = {t: Delta(weight, [lora_A[t]], [lora_B[t]], [scalings[t]]) for t in dora}
            factors = [lora_A[t] for t in plain], [lora_B[t] for t in plain]
            added = Delta(weight, *factors, [scalings[t] * strengths[t] for t in plain])
            keep = 1.0 - sum(strengths[t] for t in dora)
            for rows in row_blocks(*weight.shape):
                base = weight[rows].to(dtype)
                total = base * keep if keep else torch.full_like(base, -0.0)  # which changes no sum
                for t in dora:
                    tuned = base + deltas[t].rows(rows)
                    if axes[t] == 0:
                        square = known[t][rows] if t in known else _squares(tuned, 0)
                        ratio = _ratio(magnitude_of[t][rows], square, dtype).unsqueeze(1)
                    else:
                        ratio = _ratio(magnitude_of[t], known[t], dtype)
                    total += tuned * (ratio * strengths[t])
                if plain:
                    total += added.rows(rows)
                weight[rows] = total.to(weight.dtype)


def _slices(weights: Sequence[Tensor], n_terms: Sequence[int]) -> Iterator[tuple[Tensor, range]]:
    """Each weight, and the indices of its terms."""
    first = 0
    for weight, count in zip(weights, n_terms, strict=True):
        yield weight, range(first, first + count)
        first += count


def _squares(tuned: Tensor, axis: int) -> Tensor:
    return tuned.double().square().sum(1 - axis)


def _ratio(magnitude: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    norm = squares.sqrt().to(dtype)
    return torch.where(norm > 0, magnitude.to(dtype) / norm, 0.0)
