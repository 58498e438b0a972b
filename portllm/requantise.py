"""The op ``torch.ops.portllm.lowrank_requantise_``: schema, checks, fake kernel and the choice of backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from . import quant
from .errors import BackendError
from .ops import asked_for, unavailable
from .quant import SCHEMES, is_large
from .reference import FLOAT_DTYPES

_ARGUMENTS = (
    "Tensor(a!) codes, Tensor(b!) scales, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, str scheme, "
    "int block_rows, int block_columns, float global_scale, int[] modes"
)
torch.library.define("portllm::lowrank_requantise_", f"({_ARGUMENTS}, str backend='auto') -> Tensor")
# The compiled library only adds an implementation to this schema, if it has one.
torch.library.define("portllm::lowrank_requantise_cpu_", f"({_ARGUMENTS}) -> Tensor")


def lowrank_requantise_(
    codes: Tensor,
    scales: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    scheme: str,
    block_rows: int,
    block_columns: int,
    global_scale: float = 1.0,
    modes: Sequence[int] = (),
    backend: str = "auto",
) -> Tensor:
    """In place, for one quantised weight [m, n]: ``W <- requantise(W + sum_t scaling_t * (lora_B_t @ lora_A_t))``.

    The same as ``torch.ops.portllm.lowrank_requantise_``. The rule by which scales and codes are chosen stands in
    ``portllm.quant.lowrank_requantise_``, the reference.

    Args:
        codes: contiguous, of the dtype of the scheme and as many elements as m x n weights take; any shape.
        scales: contiguous, one for each block, row-major; any shape.
        lora_A: [r, n] each; bf16, fp16, fp32 or fp64.
        lora_B: [m, r] each, as ``lora_A``.
        scalings: one factor for each term.
        scheme: one of ``portllm.quant.SCHEMES``: "fp8_e4m3", "int8", "nf4", "mxfp4" or "nvfp4".
        block_rows, block_columns: weights that share a scale (those at the edges may be fewer); nf4 counts
            ``block_columns`` weights on through all rows.
        global_scale: nvfp4 only: what each scale is multiplied by.
        modes: empty, or flags (1 round stochastically, 2 weights that are 0 stay 0), key, and row and column of the
            first weight in the whole tensor, by which random bits are drawn.
        backend: "auto", "torch" or "cpu".

    Returns:
        [3] fp64: ``||D||^2``, ``<W' - W, D>`` and ``||W' - W||^2``, with D the sum of the terms, W and W' what is
        stored before and after. The second by the first is the share of the patch that survives.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; nothing has been written then.
        BackendError: the backend is not available; nothing has been written then.
    """
    made: Tensor = torch.ops.portllm.lowrank_requantise_(
        codes, scales, lora_A, lora_B, scalings, scheme, block_rows, block_columns, global_scale, modes, backend
    )
    return made


def backend_for(codes: Tensor, requested: str = "auto") -> str:
    """The one place where the backend of this op is chosen: "cpu" (the compiled library) if it is there, or "torch".

    Raises:
        BackendError: the named backend does not exist, or does not requantise.
    """
    name = asked_for(requested)
    reason = unavailable_on_cpu() if codes.device.type == "cpu" else f"it runs on the CPU only, not on {codes.device}"
    if name == "cpu" and reason:
        raise BackendError(f"backend 'cpu' cannot update a quantised weight: {reason}")
    # Triton and CUDA kernels of this op there are none yet.
    return "torch" if name != "cpu" and (name != "auto" or reason) else "cpu"


@cache
def unavailable_on_cpu() -> str | None:
    """Why the compiled library cannot requantise, or None if it can."""
    missing = unavailable("cpu")
    if missing is not None:
        return missing
    if not torch._C._dispatch_has_kernel_for_dispatch_key("portllm::lowrank_requantise_cpu_", "CPU"):
        return "the compiled library has no kernel for it; build it again"
    return None


def _dispatch(
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
    backend: str = "auto",
) -> Tensor:
    arguments = codes, scales, lora_A, lora_B, scalings, scheme, block_rows, block_columns, global_scale, modes
    _check(*arguments)
    if backend_for(codes, backend) == "cpu":
        # LibTorch's stable ABI knows e8m0 from torch 2.12 on only.
        scales = scales.view(torch.uint8) if scales.dtype == quant.E8M0 else scales
        made: Tensor = torch.ops.portllm.lowrank_requantise_cpu_(codes, scales, *arguments[2:])
        return made
    return quant.lowrank_requantise_(*arguments)


def _check(
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
    backend: str = "auto",
) -> Tensor:
    kind = SCHEMES.get(scheme)
    if kind is None:
        raise ValueError(f"lowrank_requantise_: there is no scheme {scheme!r}; choose from {', '.join(SCHEMES)}")
    if not len(lora_A) == len(lora_B) == len(scalings) > 0:
        raise ValueError(
            f"lowrank_requantise_: {len(lora_A)} lora_A, {len(lora_B)} lora_B, {len(scalings)} scalings; "
            "at least one term is needed, and one of each for each term"
        )
    if lora_A[0].dim() != 2 or lora_B[0].dim() != 2:
        raise ValueError("lowrank_requantise_: factors must be 2-D")
    m, n = lora_B[0].shape[0], lora_A[0].shape[1]
    for t, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or b.shape[0] != m or a.shape[1] != n:
            raise ValueError(
                f"lowrank_requantise_: lora_B[{t}] {tuple(b.shape)} @ lora_A[{t}] {tuple(a.shape)} "
                f"does not give the shape {(m, n)} of the first term"
            )
        if a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
            raise ValueError(f"lowrank_requantise_: term {t} is {a.dtype}, {b.dtype}; factors are bf16 to fp64")
    if len({tensor.device for tensor in (codes, scales, *lora_A, *lora_B)}) > 1:
        raise ValueError("lowrank_requantise_: codes, scales and factors must lie on one device")
    if block_rows < 1 or block_columns < 1:
        raise ValueError(f"lowrank_requantise_: blocks of {block_rows} x {block_columns} weights")
    block = block_rows, block_columns
    if kind.is_flat and (block_rows != 1 or is_large(block) or block_columns % 2):
        raise ValueError(f"lowrank_requantise_: {scheme} has blocks of an even number of weights of 1 row, not {block}")
    if kind.packing == "low" and (n % 2 or block_columns % 2):
        raise ValueError(f"lowrank_requantise_: two codes of {scheme} share a byte; {n} columns do not fit")
    if codes.dtype != kind.codes or not codes.is_contiguous() or codes.numel() != kind.code_bytes(m * n):
        raise ValueError(
            f"lowrank_requantise_: codes of {scheme} for {m} x {n} weights must be {kind.code_bytes(m * n)} contiguous "
            f"elements of {kind.codes}, not {codes.dtype} {tuple(codes.shape)}"
        )
    down, across = kind.grid((m, n), block)
    if scales.dtype not in kind.scales or not scales.is_contiguous() or scales.numel() != down * across:
        raise ValueError(
            f"lowrank_requantise_: scales of {scheme} for {m} x {n} weights in blocks of {block_rows} x "
            f"{block_columns} must be {down} x {across}, contiguous, not {scales.dtype} {tuple(scales.shape)}"
        )
    if len(modes) not in (0, 4):
        raise ValueError(f"lowrank_requantise_: modes has {len(modes)} numbers; it must have 4, or none")
    return torch.empty(3, dtype=torch.float64, device=codes.device)


torch.library.impl("portllm::lowrank_requantise_", "CompositeExplicitAutograd", _dispatch)
torch.library.register_fake("portllm::lowrank_requantise_", _check)
