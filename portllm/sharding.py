"""Sharded targets: a plan for whole tensors, cut to the parts of them that lie here.

A patch is bound against whole tensors, so every rank makes the same plan and finds the same errors; each then cuts it
to its own boxes, and updates these with its slices of lora_B and lora_A. No weight moves between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .errors import PlanError
from .planning import Assign, Plan, Region, Update

Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A box of a whole tensor, and where it lies here.

    Attributes:
        local: name of the tensor here.
        at: the box's first index in it. With one dimension more than ``start``, the box is in an entry of a stacked
            tensor, of which that is the first index.
        start: its first index in the whole tensor.
        shape: its size in each dimension of the whole tensor.
    """

    local: str
    at: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]


def localise(plan: Plan, pieces: Mapping[str, Sequence[Piece]]) -> Plan:
    """The part of a plan for whole tensors that falls on the pieces, as a plan for the tensors that they lie in.

    Args:
        pieces: of each whole tensor those that lie here; of one that is missing nothing does.

    Raises:
        PlanError: a tensor that is to be untied or resized, or whose new values have no whole rows here.
    """
    if plan.untie:
        raise PlanError(f"{min(plan.untie)} is sharded and cannot be untied here; untie the model before it is sharded")
    updates = [_cut_update(update, piece) for update in plan.updates for piece in pieces.get(update.name, ())]
    assigns = [_cut_assign(assign, piece) for assign in plan.assigns for piece in pieces.get(assign.name, ())]
    return replace(
        plan,
        updates=tuple(update for update in updates if update is not None),
        assigns=tuple(assign for assign in assigns if assign is not None),
    )


def _cut_update(update: Update, piece: Piece) -> Update | None:
    region, start, shape, at, expert = update.region, piece.start, piece.shape, piece.at, None
    if region.expert is not None:
        entry = region.expert - start[0]
        if not 0 <= entry < shape[0]:
            return None
        expert, start, shape, at = at[0] + entry, start[1:], shape[1:], at[1:]
    elif len(at) > len(start):
        expert, at = at[0], at[1:]
    whole, here = matrix_box(start, shape), matrix_box(at, shape)
    rows, columns = _common(region.rows, whole[0]), _common(region.columns, whole[1])
    if rows is None or columns is None:
        return None
    cut = update.cut(slice(*_moved(rows, -region.rows[0])), slice(*_moved(columns, -region.columns[0])))
    place = Region(expert, _moved(rows, here[0][0] - whole[0][0]), _moved(columns, here[1][0] - whole[1][0]))
    vectors = {t.magnitude_axis for t in update.terms if t.magnitude is not None}
    is_cut = any(place.shape[1 - axis] < region.shape[1 - axis] for axis in vectors)
    return replace(cut, name=piece.local, region=place, cut_vectors=is_cut)


def _cut_assign(assign: Assign, piece: Piece) -> Assign | None:
    if assign.resize:
        raise PlanError(f"{assign.name} is sharded and cannot get another size here; resize it before it is sharded")
    if not piece.shape:
        return replace(assign, name=piece.local)
    if len(piece.at) != len(piece.start) or any(piece.at[1:]):
        raise PlanError(f"{assign.name} ({assign.sources[0]}) is replaced, but {piece.local} holds no whole rows of it")
    inner: tuple[slice, ...] = tuple(
        slice(first, first + size) for first, size in zip(piece.start[1:], piece.shape[1:], strict=True)
    )
    box, shift = (piece.start[0], piece.start[0] + piece.shape[0]), piece.at[0] - piece.start[0]
    if assign.by_index:
        assert assign.rows is not None
        inside = [i for i, row in enumerate(assign.rows) if box[0] <= row < box[1]]
        indices = tuple(assign.rows[i] + shift for i in inside)
        return (
            replace(assign, name=piece.local, value=assign.value[inside][(slice(None), *inner)], rows=indices)
            if inside
            else None
        )
    first, stop = assign.rows or (0, len(assign.value))
    rows = _common((first, stop), box)
    if rows is None:
        return None
    value = assign.value[(slice(*_moved(rows, -first)), *inner)]
    return replace(assign, name=piece.local, value=value, rows=_moved(rows, shift))


def matrix_box(first: Sequence[int], shape: Sequence[int]) -> tuple[Range, Range]:
    """(rows, columns) of a box of a tensor that counts as a matrix, see ``planning.Region``."""
    width = math.prod(shape[2:])
    columns = (first[1] * width, (first[1] + shape[1]) * width) if len(shape) > 1 else (0, 1)
    return (first[0], first[0] + shape[0]), columns


def _common(a: Range, b: Range) -> Range | None:
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None


def _moved(a: Range, by: int) -> Range:
    return a[0] + by, a[1] + by
