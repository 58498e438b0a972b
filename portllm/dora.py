"""DoRA's ops ``torch.ops.portllm.lowrank_dora_`` and ``lowrank_dora_squares``: schemas, checks, fake kernels, backends.

Two ops, because a weight may be cut into rectangles that lie on several machines: each sums the squares of its own
rectangle, the sums are added up, and each writes its own. Where a weight is whole, ``lowrank_dora_`` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .reference import FLOAT_DTYPES

_ARGUMENTS = ops._ARGUMENTS.replace("(a!)", "")  # of an op that writes to no weight
_MORE = "Tensor[] magnitudes, int[] axes, float[] strengths, Tensor[] squares"
torch.library.define(
    "portllm::lowrank_dora_",
    f"({ops._ARGUMENTS}, {_MORE}, str backend='auto', int[] modes=[]) -> ()",
)
torch.library.define("portllm::lowrank_dora_squares", f"({_ARGUMENTS}, int[] axes, str backend='auto') -> Tensor[]")
# The compiled library adds implementations to these.
torch.library.define("portllm::lowrank_dora_cpu_", f"({ops._ARGUMENTS}, {_MORE}) -> ()")
torch.library.define("portllm::lowrank_dora_squares_cpu_", f"({_ARGUMENTS}, int[] axes, Tensor(a!)[] squares) -> ()")


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
    backend: str = "auto",
    modes: Sequence[int] = (),
) -> None:
    """In place, for each weight: ``W <- round(W + sum_t strength_t (magnitude_t (W + D_t) / ||W + D_t|| - W))``.

    ``D_t = scaling_t * (lora_B_t @ lora_A_t)``; a plain term adds ``strength_t D_t``. Every term sees the weight as
    it was before the call. ``portllm.reference.lowrank_dora_`` states the arithmetic. The same as
    ``torch.ops.portllm.lowrank_dora_``.

    Args:
        weights, lora_A, lora_B, scalings, n_terms: as for ``lowrank_add_``.
        magnitudes: [m] or [n] by the axis, one for each term of axis 0 or 1, in their order; bf16, fp16, fp32 or fp64.
        axes: of each term 0 (each row has a norm), 1 (each column has) or -1 (a plain term).
        strengths: of each term, the share of the way to what it would make of the weight alone.
        squares: one for each magnitude, fp64: ``lowrank_dora_squares``, summed over all the rectangles that a weight is
            cut into. Empty: the weights are whole, and the squares are summed here.
        backend: "auto", or one of ``BACKENDS``; those without kernels for norms leave it to "torch".
        modes: as for ``lowrank_add_``; weights with flags are left to "torch".

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit; nothing has been written then.
        BackendError: the backend is not available, or does not take such a weight; nothing has been written then.
    """
    arguments = weights, lora_A, lora_B, scalings, n_terms, magnitudes, axes, strengths, squares
    if not weights:
        check(*arguments)  # without a tensor the dispatcher does not know where to go
    else:
        torch.ops.portllm.lowrank_dora_(*arguments, backend, modes)


def lowrank_dora_squares(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    axes: Sequence[int],
    backend: str = "auto",
) -> list[Tensor]:
    """The squared norms that ``lowrank_dora_`` divides by, of the rectangles that are here: fp64 [m] or [n] each.

    Those of the rectangles that a weight is cut into add up to those of the weight. Args and errors are those of
    ``lowrank_dora_``; there is one result for each term of axis 0 or 1, in their order. Nothing is written.
    """
    if not weights:
        _check_squares(weights, lora_A, lora_B, scalings, n_terms, axes)
        return []
    found: list[Tensor] = torch.ops.portllm.lowrank_dora_squares(
        weights, lora_A, lora_B, scalings, n_terms, axes, backend
    )
    return found


def check(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    magnitudes: Sequence[Tensor],
    axes: Sequence[int],
    strengths: Sequence[float],
    squares: Sequence[Tensor] = (),
    backend: str = "auto",
    modes: Sequence[int] = (),
) -> None:
    """Raise ValueError where ``lowrank_dora_`` would."""
    wanted = [size for sizes in _vectors(weights, lora_A, lora_B, scalings, n_terms, axes) for size in sizes]
    if len(strengths) != len(axes):
        raise ValueError(f"lowrank_dora_: {len(axes)} terms, but {len(strengths)} strengths")
    for name, vectors in (("magnitudes", magnitudes), ("squares", squares)):
        if name == "squares" and not vectors:
            continue
        if len(vectors) != len(wanted):
            raise ValueError(f"lowrank_dora_: {len(wanted)} terms have a norm, but there are {len(vectors)} {name}")
        dtypes = FLOAT_DTYPES if name == "magnitudes" else (torch.float64,)
        for i, (vector, (size, device)) in enumerate(zip(vectors, wanted, strict=True)):
            if vector.shape != (size,) or vector.dtype not in dtypes or vector.device != device:
                raise ValueError(
                    f"lowrank_dora_: {name}[{i}] is {ops._describe(vector)} on {vector.device}; it must be "
                    f"{'fp64' if name == 'squares' else 'floating point'} ({size},) on {device}"
                )


def _check_squares(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    axes: Sequence[int],
    backend: str = "auto",
) -> list[Tensor]:
    """The fake kernel of ``lowrank_dora_squares``, whose results' values are not set."""
    vectors = _vectors(weights, lora_A, lora_B, scalings, n_terms, axes)
    return [
        weight.new_empty(size, dtype=torch.float64)
        for weight, sizes in zip(weights, vectors, strict=True)
        for size, _ in sizes
    ]


def _vectors(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    axes: Sequence[int],
) -> list[list[tuple[int, torch.device]]]:
    """Check what both ops take; of each weight, how long a vector each term with a norm needs, and where."""
    ops._check(weights, lora_A, lora_B, scalings, n_terms)
    if len(axes) != len(lora_A) or not set(axes) <= {-1, 0, 1}:
        raise ValueError(f"lowrank_dora_: axes must have 0, 1 or -1 for each of the {len(lora_A)} terms, not {axes}")
    starts = [0, *accumulate(n_terms)]
    return [
        [(weight.shape[axis], weight.device) for axis in axes[starts[i] : starts[i + 1]] if axis >= 0]
        for i, weight in enumerate(weights)
    ]


def _dispatch(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    magnitudes: Sequence[Tensor],
    axes: Sequence[int],
    strengths: Sequence[float],
    squares: Sequence[Tensor] = (),
    backend: str = "auto",
    modes: Sequence[int] = (),
) -> None:
    check(weights, lora_A, lora_B, scalings, n_terms, magnitudes, axes, strengths, squares)
    for name, part in _parts(weights, n_terms, axes, backend, modes).items():
        own = [number for i in part.weights for number in modes[4 * i : 4 * i + 4]]
        _launchers(name)[0](
            *part.of_weights(weights, lora_A, lora_B, scalings, n_terms),
            part.vectors(magnitudes),
            [axes[t] for t in part.terms],
            [strengths[t] for t in part.terms],
            part.vectors(squares),
            *([own] if name == "torch" else []),
        )


def _dispatch_squares(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    axes: Sequence[int],
    backend: str = "auto",
) -> list[Tensor]:
    found = _check_squares(weights, lora_A, lora_B, scalings, n_terms, axes)
    for name, part in _parts(weights, n_terms, axes, backend).items():
        made = _launchers(name)[1](
            *part.of_weights(weights, lora_A, lora_B, scalings, n_terms), [axes[t] for t in part.terms]
        )
        for i, squares in zip(part.norms, made, strict=True):
            found[i] = squares
    return found


class _Part(NamedTuple):
    """The weights of a call that one backend updates: indices of them, of their terms, and of those with a norm."""

    weights: list[int]
    terms: list[int]
    norms: list[int]  # among the terms with a norm

    def of_weights(
        self,
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        n_terms: Sequence[int],
    ) -> tuple[list[Any], ...]:
        of_terms = ([values[t] for t in self.terms] for values in (lora_A, lora_B, scalings))
        return [weights[i] for i in self.weights], *of_terms, [n_terms[i] for i in self.weights]

    def vectors(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [values[i] for i in self.norms] if values else []


def _parts(
    weights: Sequence[Tensor], n_terms: Sequence[int], axes: Sequence[int], backend: str, modes: Sequence[int] = ()
) -> dict[str, _Part]:
    """The backends of a call, and what each of them does."""
    chosen = ops.backends_for(weights, backend)
    starts, norms = [0, *accumulate(n_terms)], [0, *accumulate(axis >= 0 for axis in axes)]
    parts: dict[str, _Part] = {}
    for i, weight in enumerate(weights):
        name = chosen[weight.device, weight.dtype]
        takes = name in _BACKENDS and not (modes and modes[4 * i])
        part = parts.setdefault(name if takes else "torch", _Part([], [], []))
        part.weights.append(i)
        part.terms.extend(range(starts[i], starts[i + 1]))
        part.norms.extend(range(norms[starts[i]], norms[starts[i + 1]]))
    return parts


_BACKENDS = ("torch", "cpu", "triton")  # which have kernels for norms; "torch" does it for the others
_Launchers = tuple[Callable[..., None], Callable[..., list[Tensor]]]


def _launchers(name: str) -> _Launchers:
    """(``lowrank_dora_``, ``lowrank_dora_squares``) of a backend."""
    if name == "cpu":
        return _cpu, _squares_cpu
    if name == "triton":
        return _triton, _squares_triton
    return reference.lowrank_dora_, reference.lowrank_dora_squares


def _cpu(*arguments: Any) -> None:
    *others, squares = arguments
    torch.ops.portllm.lowrank_dora_cpu_(*others, [of_term.contiguous() for of_term in squares])


def _squares_cpu(weights: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    found = _check_squares(weights, *arguments)
    torch.ops.portllm.lowrank_dora_squares_cpu_(weights, *arguments, found)
    return found


def _triton(weights: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *arguments: Any) -> None:
    from . import kernels

    kernels.lowrank_dora_(weights, ops._narrowed(lora_A), ops._narrowed(lora_B), *arguments)


def _squares_triton(
    weights: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *arguments: Any
) -> list[Tensor]:
    from . import kernels

    return kernels.lowrank_dora_squares(weights, ops._narrowed(lora_A), ops._narrowed(lora_B), *arguments)


torch.library.impl("portllm::lowrank_dora_", "CompositeExplicitAutograd", _dispatch)
torch.library.impl(
    "portllm::lowrank_dora_", "ADInplaceOrView", partial(ops._bump_versions, torch.ops.portllm.lowrank_dora_)
)
torch.library.register_fake("portllm::lowrank_dora_", check)
torch.library.impl("portllm::lowrank_dora_squares", "CompositeExplicitAutograd", _dispatch_squares)
torch.library.register_fake("portllm::lowrank_dora_squares", _check_squares)
