"""The update in plain torch: the truth that every kernel is held against, and the way where no kernel fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .noise import modes_of, store_

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
    modes: Sequence[int] = (),
) -> None:
    """In place, for each weight: ``W <- round(W + sum_t scaling_t * (lora_B_t @ lora_A_t))``.

    Args:
        weights: 2-D tensors [m, n]; fp64, fp32, fp16 or bf16; any strides.
        lora_A: [r, n] each, the terms of all weights one after the other.
        lora_B: [m, r] each, as ``lora_A``.
        scalings: one factor for each term.
        n_terms: how many terms belong to each weight.
        modes: empty, or a ``noise.Mode`` for each weight, one after the other.

    Products are summed in fp32 (fp64 for fp64 weights), scaled, summed over the terms and added to the weight
    in that dtype; then one rounding into the weight's dtype: to nearest even, or as its mode says.
    """
    first = 0
    with ieee_matmul():
        for weight, count, mode in zip(weights, n_terms, modes_of(modes, len(weights)), strict=True):
            terms = slice(first, first + count)
            first += count
            delta = Delta(weight, lora_A[terms], lora_B[terms], scalings[terms])
            for rows in row_blocks(*weight.shape):
                store_(weight, delta.rows(rows).add_(weight[rows]), mode, rows)


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
