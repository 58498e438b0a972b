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

from .reference import ieee_matmul, row_blocks
from .skinny import frobenius, has_fast_bf16, product, sketch

_BLOCKS = 3  # of the Krylov basis
_WIDTH = 16  # columns come in whole vectors of the matrix library
_MEASURE_BELOW = 1e-2  # relative residuals that the difference of two squares no longer tells


class Workspace:
    """Memory that is used again for every matrix: fresh pages cost more than a pass over them."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[*shape], overwritten by the next call for this dtype and device."""
        size, key = shape.numel(), (device, dtype)
        if key not in self._buffers or len(self._buffers[key]) < size:
            self._buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self._buffers[key][:size].view(shape)


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


def leading(
    matrix: Tensor, count: int, *, generator: torch.Generator | None = None, workspace: Workspace | None = None
) -> Leading:
    """The ``count`` largest singular values of ``matrix`` [m, n] fp32 and their vectors, at most min(m, n) of them."""
    short = min(matrix.shape)
    count = min(count, short)
    width = -(-count // _WIDTH) * _WIDTH
    with ieee_matmul():
        if 2 * _BLOCKS * width >= short:
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            left, values, right = left[:, :count], values[:count].double(), right[:count].T
            return Leading(left * values.to(left), right, values, frobenius(matrix))
        row_space, norm = _row_space(matrix, width, generator, workspace or Workspace())
        # The column space to fp32's precision: then a matrix of no higher rank is found to that precision.
        column_space = torch.linalg.qr(product(matrix, row_space).double())[0].to(matrix)
        weights = product(matrix.T, column_space)
        squares, rotation = torch.linalg.eigh((weights.T @ weights).double())
        values = squares.flip(0)[:count].clamp(min=0).sqrt()
        rotation = rotation.flip(1)[:, :count].to(matrix)
        inverse = torch.where(values > 0, 1 / values, 0).to(matrix)
        return Leading(column_space @ rotation * values.to(matrix), weights @ rotation * inverse, values, norm)


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


def _row_space(
    matrix: Tensor, width: int, generator: torch.Generator | None, workspace: Workspace
) -> tuple[Tensor, float]:
    """[n, width], the directions among the inputs that matter most, about orthonormal; and the matrix's norm."""
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    if has_fast_bf16(matrix.device):
        coarse = workspace.empty(matrix.shape, torch.bfloat16, matrix.device)
        image, norm = sketch(matrix, start, coarse)
    else:
        coarse = matrix
        image, norm = product(matrix, start), frobenius(matrix)
    basis = start.new_empty(len(start), _BLOCKS * width)
    images = image.new_empty(len(image), _BLOCKS * width)
    for done in range(0, _BLOCKS * width, width):
        block = _orthonormal(product(coarse.T, _orthonormal(image)))
        if done:
            others = basis[:, :done]
            block = _orthonormal(block - others @ (others.T @ block))
        image = product(coarse, block)
        basis[:, done : done + width] = block
        images[:, done : done + width] = image
    _, rotation = torch.linalg.eigh((images.T @ images).double())
    return basis @ rotation.flip(1)[:, :width].to(matrix), norm


def _orthonormal(block: Tensor) -> Tensor:
    """Shifted CholeskyQR2 (Fukaya et al., arXiv 1809.11085): two passes over [m, k] where Householder takes many."""
    identity = torch.eye(block.shape[1], dtype=torch.float64, device=block.device)
    for _ in range(2):
        gram = (block.T @ block).double()
        gram.diagonal().add_(torch.finfo(torch.float32).eps * gram.trace() + torch.finfo(torch.float32).tiny)
        lower, _ = torch.linalg.cholesky_ex(gram)
        block = block @ torch.linalg.solve_triangular(lower, identity, upper=False).T.to(block)
    return block
