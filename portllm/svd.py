"""The leading singular values and vectors of a matrix, by a randomised block Krylov method.

Halko, Martinsson, Tropp, arXiv 0909.4061; Musco and Musco, arXiv 1504.05477 (block Krylov: the same products as
power iteration, and a better subspace). The passes that only find the subspace may run in bf16 where the hardware
has it; the last two are in fp32, so that a matrix of the asked-for rank comes out to fp32's precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _native
from .reference import ieee_matmul, row_blocks

_BLOCKS = 3  # of the Krylov basis: as good as two power iterations with half as many columns again
_WIDTH = 16  # columns come in whole vectors of the matrix library
_MEASURE_BELOW = 1e-2  # relative residuals that the difference of two squares no longer tells


@dataclass(frozen=True)
class Leading:
    """``matrix ~ left @ right.T``.

    Attributes:
        left: [m, k] fp32, the left singular vectors times the singular values.
        right: [n, k] fp32, orthonormal columns.
        values: [k] fp64, singular values, descending.
        norm: Frobenius norm of the matrix.
    """

    left: Tensor
    right: Tensor
    values: Tensor
    norm: float

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """(lora_A [r, n], lora_B [m, r]) with the singular values shared evenly between them."""
        root = self.values[:rank].sqrt().to(self.left)
        inverse = torch.where(root > 0, 1 / root, 0)
        return (self.right[:, :rank] * root).T.contiguous(), self.left[:, :rank] * inverse

    def rank_for(self, energy: float) -> int | None:
        """The least rank that keeps this share of the squared norm; None if k singular values do not reach it."""
        kept = self.values.square().cumsum(0)
        enough = (kept >= energy * self.norm**2 * (1 - 1e-12)).nonzero()
        return int(enough[0]) + 1 if len(enough) else None


def leading(matrix: Tensor, count: int, *, generator: torch.Generator | None = None) -> Leading:
    """The ``count`` largest singular values of ``matrix`` [m, n] fp32 and their vectors, at most min(m, n) of them."""
    norm = math.sqrt(sum(float(matrix[rows].double().square().sum()) for rows in row_blocks(*matrix.shape)))
    short = min(matrix.shape)
    count = min(count, short)
    width = -(-count // _WIDTH) * _WIDTH
    with ieee_matmul():
        if norm == 0 or _BLOCKS * width >= short // 2:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            left, values, right = left[:, :count], values[:count].double(), right[:count].T
            return Leading(left * values.to(left), right, values, norm)
        row_space = _row_space(matrix, width, generator)
        image = matrix @ row_space
        squares, rotation = torch.linalg.eigh((image.T @ image).double())
        rotation = rotation.flip(1)[:, :count].to(image)
        values = squares.flip(0)[:count].clamp(min=0).sqrt()
        return Leading(image @ rotation, row_space @ rotation, values, norm)


def residual(matrix: Tensor, found: Leading, rank: int) -> float:
    """``||matrix - left @ right.T||_F`` at this rank: from the norms, or measured where they are too close."""
    kept = float(found.values[:rank].square().sum())
    estimate = math.sqrt(max(found.norm**2 - kept, 0.0))
    if estimate > _MEASURE_BELOW * found.norm:
        return estimate
    total = 0.0
    with ieee_matmul():
        for rows in row_blocks(*matrix.shape):
            rest = torch.addmm(matrix[rows], found.left[rows, :rank], found.right[:, :rank].T, alpha=-1)
            total += float(rest.double().square().sum())
    return math.sqrt(total)


def _row_space(matrix: Tensor, width: int, generator: torch.Generator | None) -> Tensor:
    """[n, width] orthonormal: the directions among the inputs that matter most."""
    coarse = matrix.bfloat16() if _has_fast_bf16(matrix.device) else matrix
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis: list[Tensor] = []
    images: list[Tensor] = []
    block = _times(coarse, start)
    for _ in range(_BLOCKS):
        block = _orthonormal(block)
        if basis:
            others = torch.cat(basis, 1)
            block = _orthonormal(block - others @ (others.T @ block))
        basis.append(block)
        images.append(_times(coarse.T, block))
        if len(basis) < _BLOCKS:
            block = _times(coarse, images[-1])
    image = torch.cat(images, 1)
    _, rotation = torch.linalg.eigh((image.T @ image).double())
    column_space = torch.cat(basis, 1) @ rotation.flip(1)[:, :width].to(matrix)
    return torch.linalg.qr((matrix.T @ column_space).double())[0].to(matrix)


def _times(matrix: Tensor, block: Tensor) -> Tensor:
    return (matrix @ block.to(matrix.dtype)).to(block.dtype)


def _orthonormal(block: Tensor) -> Tensor:
    """Shifted CholeskyQR2 (Fukaya et al., arXiv 1809.11085): two passes over [m, k] where Householder takes many."""
    for _ in range(2):
        gram = (block.T @ block).double()
        shift = torch.finfo(torch.float32).eps * gram.diagonal().sum() + torch.finfo(torch.float32).tiny
        lower, _ = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        block = block @ torch.linalg.inv(lower).T.to(block)
    return block


def _has_fast_bf16(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and _native.isa() in ("amx_bf16", "avx512_bf16"))
