"""Products of a large matrix and a few columns: the compiled ops' schemas, and plain torch where they do not serve."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from . import _native
from .reference import accumulation_dtype

# out <- matrix @ block in fp32; with a matrix in bf16, block is rounded to bf16.
torch.library.define("portllm::skinny_cpu_", "(Tensor(a!) out, Tensor matrix, Tensor block) -> ()")
# coarse <- matrix in bf16; out <- coarse @ block; returns the sum of matrix's squares: all in one read of it.
torch.library.define(
    "portllm::sketch_cpu_", "(Tensor(a!) out, Tensor(b!) coarse, Tensor matrix, Tensor block) -> float"
)

_FASTER = ("amx_bf16", "avx512_bf16", "avx512", "avx2")  # than the matrix library


def product(matrix: Tensor, block: Tensor) -> Tensor:
    """``matrix @ block``, [m, k] fp32.

    Args:
        matrix: [m, n] fp32 or bf16, transposed or not.
        block: [n, k] fp32; rounded to bf16 where the matrix is bf16.
    """
    if _serves(matrix):
        out = block.new_empty(matrix.shape[0], block.shape[1])
        torch.ops.portllm.skinny_cpu_(out, matrix, block.contiguous())
        return out
    return (matrix @ block.to(matrix.dtype)).to(block.dtype)


def sketch(matrix: Tensor, block: Tensor, coarse: Tensor) -> tuple[Tensor, float]:
    """Round ``matrix`` to bf16, and begin: (``coarse @ block`` [m, k] fp32, the Frobenius norm of ``matrix``).

    Args:
        matrix: [m, n] fp32.
        block: [n, k] fp32; rounded to bf16.
        coarse: [m, n] bf16, contiguous; overwritten.
    """
    if _serves(matrix) and matrix.stride(1) == 1:
        out = block.new_empty(matrix.shape[0], block.shape[1])
        squares = torch.ops.portllm.sketch_cpu_(out, coarse, matrix, block.contiguous())
        return out, squares**0.5
    return product(coarse.copy_(matrix), block), frobenius(matrix)


def frobenius(matrix: Tensor) -> float:
    """The Frobenius norm of [m, n]; rows in fp32 (fp64 where the matrix is fp64), and their sum in fp64."""
    return float(torch.linalg.vector_norm(matrix, dim=1, dtype=accumulation_dtype(matrix)).double().norm())


def has_fast_bf16(device: torch.device) -> bool:
    """Whether products are faster in bf16."""
    return device.type == "cuda" or (device.type == "cpu" and _native.isa() in ("amx_bf16", "avx512_bf16"))


def _serves(matrix: Tensor) -> bool:
    """Whether the compiled ops take this matrix, and are faster."""
    fits = matrix.dtype in (torch.float32, torch.bfloat16) and 1 in matrix.stride()
    return matrix.device.type == "cpu" and fits and _compiled()


@cache
def _compiled() -> bool:
    return _native.isa() in _FASTER
