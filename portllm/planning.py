"""Plan: every change that a patch makes to a target, checked whole before the first write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .errors import PlanError
from .noise import FLIPPED, KEEP_ZEROS, STOCHASTIC, Mode
from .reference import FLOAT_DTYPES

if TYPE_CHECKING:
    from .quantised import Quantised


@dataclass(frozen=True)
class Term:
    """One ``scaling * lora_B @ lora_A`` in the orientation in which the weight is stored.

    Attributes:
        lora_A: [r, n]; any strides.
        lora_B: [m, r]; any strides.
        scaling: alpha / r (or alpha / sqrt(r)), times the strength asked for.
        magnitude: DoRA's magnitudes, [m] or [n] by ``magnitude_axis``; None for plain LoRA.
        magnitude_axis: 0 if each row of the stored matrix has its magnitude, 1 if each column has.
        strength: DoRA only: the share of the way from W to DoRA's weight.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    magnitude_axis: int = 0
    strength: float = 1.0

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def cut(self, rows: slice, columns: slice) -> Term:
        """The term for a rectangle of the matrix; views, nothing is copied."""
        magnitude = self.magnitude
        if magnitude is not None:
            magnitude = magnitude[(rows, columns)[self.magnitude_axis]]
        return Term(
            self.lora_A[:, columns], self.lora_B[rows], self.scaling, magnitude, self.magnitude_axis, self.strength
        )


@dataclass(frozen=True)
class Region:
    """A rectangle of a tensor seen as a matrix.

    Attributes:
        expert: index into the first dimension of a stacked (3-D) weight, or None.
        rows, columns: [start, stop) each. A 1-D tensor [n] counts as [n, 1]; a convolution
            [out, in, *kernel] as [out, in * kernel].
    """

    expert: int | None
    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    def is_whole(self, tensor: Tensor) -> bool:
        """Whether the region is all of ``tensor``, which is a matrix."""
        return self.expert is None and tuple(tensor.shape) == self.shape

    def overlaps(self, other: Region) -> bool:
        """Whether the two rectangles of one tensor share an element."""
        return self.expert == other.expert and all(
            a[0] < b[1] and b[0] < a[1] for a, b in ((self.rows, other.rows), (self.columns, other.columns))
        )

    def view(self, tensor: Tensor) -> Tensor:
        """The region as a 2-D view of ``tensor``, sharing its memory."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        if matrix.dim() == 1:
            matrix = matrix.unsqueeze(1)
        elif matrix.dim() > 2:
            matrix = matrix.view(matrix.shape[0], -1)
        return matrix[slice(*self.rows), slice(*self.columns)]


@dataclass(frozen=True)
class Noise:
    """The random bits that an update is rounded with, by position (see ``portllm.noise``).

    Attributes:
        key: 64 bits, from the seed and the tensor's name.
        row, column: of the update's first element in the matrix of the whole tensor, as it is stored: not sharded,
            stacked experts one below the other.
        flipped: every bit is its opposite: so a subtraction undoes what was added with these bits.
    """

    key: int
    row: int = 0
    column: int = 0
    flipped: bool = False


@dataclass(frozen=True)
class Update:
    """``W[region] += sum of the terms``, rounded to W's dtype.

    Attributes:
        name: the target's tensor.
        region: the part of it.
        terms: what is added.
        sources: the patch's modules, for messages.
        noise: what the sum is rounded stochastically with; None: to nearest, ties to even.
        keep_zeros: elements that are 0 stay 0 (2:4 sparsity).
    """

    name: str
    region: Region
    terms: tuple[Term, ...]
    sources: tuple[str, ...]
    noise: Noise | None = None
    keep_zeros: bool = False

    @property
    def is_dora(self) -> bool:
        return any(term.magnitude is not None for term in self.terms)

    @property
    def mode(self) -> Mode:
        """How the op is to store the sums."""
        zeros = KEEP_ZEROS * self.keep_zeros
        if self.noise is None:
            return Mode(zeros)
        key = self.noise.key - (self.noise.key >> 63 << 64)  # as signed
        flags = STOCHASTIC | zeros | FLIPPED * self.noise.flipped
        return Mode(flags, key, self.noise.row, self.noise.column)

    def cut(self, rows: slice, columns: slice) -> Update:
        """The update for a rectangle of its region: the same bits there. Slices count from the region's first element.

        Whoever cuts an update must do so here.
        """
        spans = [s.indices(size)[:2] for s, size in zip((rows, columns), self.region.shape, strict=True)]
        (top, bottom), (left, right) = spans
        (row, _), (column, _) = self.region.rows, self.region.columns
        noise = self.noise
        return replace(
            self,
            region=Region(self.region.expert, (row + top, row + bottom), (column + left, column + right)),
            terms=tuple(term.cut(slice(top, bottom), slice(left, right)) for term in self.terms),
            noise=noise and replace(noise, row=noise.row + top, column=noise.column + left),
        )

    def negated(self) -> Update:
        """The update that subtracts what this one adds."""
        noise = self.noise
        return replace(
            self,
            terms=tuple(replace(term, scaling=-term.scaling) for term in self.terms),
            noise=noise and replace(noise, flipped=not noise.flipped),
        )

    def delta_norm(self) -> float:
        """Frobenius norm of the sum of the plain terms, in fp64, through r x r matrices (no delta is formed).

        ``||sum s_i B_i A_i||^2 = sum_ij s_i s_j <B_i^T B_j, A_i A_j^T>``. DoRA terms are counted as plain LoRA.
        """
        total = 0.0
        wide = [(t.lora_A.double(), t.lora_B.double(), t.scaling * t.strength) for t in self.terms]
        for a_i, b_i, s_i in wide:
            for a_j, b_j, s_j in wide:
                total += s_i * s_j * float(((b_i.T @ b_j) * (a_i @ a_j.T)).sum())
        return math.sqrt(max(total, 0.0))


@dataclass(frozen=True)
class Assign:
    """A tensor, or rows of it, takes new values.

    Attributes:
        name: the target's tensor.
        value: the new values; rounded to the target's dtype.
        rows: [start, stop) of the first dimension, a tuple of row indices, or None for the whole tensor.
        strength: 1 replaces; else the share of the way from the old values to the new ones.
        resize: the value has more rows than the tensor, which is replaced by a larger one.
        sources: the patch's keys, for messages.
    """

    name: str
    value: Tensor
    rows: tuple[int, int] | tuple[int, ...] | None
    strength: float
    sources: tuple[str, ...]
    by_index: bool = False
    resize: bool = False


@dataclass(frozen=True)
class Plan:
    """What a patch, or several, will do to one target.

    Attributes:
        updates: low-rank updates, each rectangle of each weight at most once.
        assigns: replaced tensors and rows; they come before the updates.
        untie: names of tied tensors that get a tensor of their own -> the tensor they are copied from.
        unmatched_patch: the patch's modules and tensors that the target does not have.
        unmatched_target: the target's modules that the patch's target_modules cover, but that it has no factors for.
        warnings: what a user should know, one line each.
        quantised: of the weights that change, those that are stored as codes and scales.
    """

    updates: tuple[Update, ...]
    assigns: tuple[Assign, ...] = ()
    untie: Mapping[str, str] = field(default_factory=dict)
    unmatched_patch: tuple[str, ...] = ()
    unmatched_target: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    quantised: Mapping[str, Quantised] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors (quantised: of the weights) that change, in order, without repeats."""
        return tuple(dict.fromkeys([*(a.name for a in self.assigns), *(u.name for u in self.updates)]))

    @property
    def stored(self) -> tuple[str, ...]:
        """As ``tensors``, with codes and scales in the place of quantised weights."""
        parts = ((name,) if name not in self.quantised else self.quantised[name].parts for name in self.tensors)
        return tuple(part for names in parts for part in names)

    @property
    def is_linear(self) -> bool:
        """Whether the plan only adds terms, so that subtracting them takes it off again (to rounding)."""
        return not self.assigns and not any(update.is_dora for update in self.updates)

    def check_complete(self, *, strict: bool = True) -> None:
        """Raise PlanError if nothing matches, or, when ``strict``, if anything on either side does not."""
        if not self.updates and not self.assigns:
            raise PlanError(
                f"the patch matches nothing in the target; the first of its names: {some(self.unmatched_patch)}; "
                "is it a patch for another model?"
            )
        if strict and self.unmatched_patch:
            raise PlanError(
                f"{len(self.unmatched_patch)} names of the patch are not in the target: {some(self.unmatched_patch)}; "
                "strict=False (--no-strict) applies the rest"
            )
        if strict and self.unmatched_target:
            raise PlanError(
                f"the patch has no factors for {len(self.unmatched_target)} modules that its target_modules cover: "
                f"{some(self.unmatched_target)}; strict=False (--no-strict) leaves them as they are"
            )

    def negated(self) -> Plan:
        """The plan that subtracts what this one adds, with the opposite noise.

        Raises:
            PlanError: the plan replaces values, has DoRA terms, or changes quantised weights: no subtraction brings
                the old values back.
        """
        if self.quantised:
            raise PlanError(
                f"{some(tuple(self.quantised))} cannot be subtracted: the sum was quantised, and the old codes cannot "
                "be told from it; keep a copy of them, or load the model again"
            )
        if not self.is_linear:
            names = [a.name for a in self.assigns] + [u.name for u in self.updates if u.is_dora]
            raise PlanError(
                f"{some(tuple(names))} cannot be subtracted (replaced values, or DoRA); keep a copy of them"
            )
        return replace(self, updates=tuple(update.negated() for update in self.updates), untie={})

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for ``--json`` and for people's tables."""
        return {
            "updates": [
                {
                    "tensor": u.name,
                    "expert": u.region.expert,
                    "rows": list(u.region.rows),
                    "columns": list(u.region.columns),
                    "ranks": [t.rank for t in u.terms],
                    "scalings": [t.scaling for t in u.terms],
                    "dora": u.is_dora,
                    "sources": list(u.sources),
                }
                for u in self.updates
            ],
            "assigns": [
                {
                    "tensor": a.name,
                    "rows": None if a.rows is None else list(a.rows),
                    "shape": list(a.value.shape),
                    "resize": a.resize,
                    "sources": list(a.sources),
                }
                for a in self.assigns
            ],
            "untie": dict(self.untie),
            "unmatched_patch": list(self.unmatched_patch),
            "unmatched_target": list(self.unmatched_target),
            "warnings": list(self.warnings),
        }

    def __repr__(self) -> str:
        return (
            f"Plan({len(self.updates)} updates, {len(self.assigns)} assigns, {len(self.unmatched_patch)} unmatched in "
            f"the patch, {len(self.unmatched_target)} in the target)"
        )


def modes_for(updates: Sequence[Update]) -> list[int]:
    """The updates' modes as the op takes them: an empty list if all are the plain one."""
    modes = [update.mode for update in updates]
    return [number for mode in modes for number in mode] if any(mode.flags for mode in modes) else []


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first of the names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise PlanError for a weight that cannot take a sum: quantised, integer, or of a type not yet supported."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise PlanError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}: quantised weights cannot be patched yet; "
            "apply the patch to the 16-bit weights and quantise the result"
        )
