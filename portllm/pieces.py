"""What a plan does to one tensor, cut into pieces of whole rows: each is read, patched and written on its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .planning import Assign, Plan, Region, Update
from .reference import rows_per_block


class TensorPlan:
    """The part of a plan that falls on one tensor.

    Attributes:
        updates, assigns: those of this tensor.
        shape: the tensor's, after it was resized.
        rows, columns: the tensor as the matrix that its updates speak of; stacked experts lie one below the other.
    """

    def __init__(self, updates: Sequence[Update], assigns: Sequence[Assign], shape: tuple[int, ...]) -> None:
        self.updates, self.assigns, self.shape = tuple(updates), tuple(assigns), shape
        self._leading = 2 if any(update.region.expert is not None for update in updates) else 1
        self.rows, self.columns = self.matrix(shape)

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a tensor of another length."""
        return math.prod(shape[: self._leading]), math.prod(shape[self._leading :])

    def cuts(self) -> list[int]:
        """Rows where the tensor may be cut: at the borders of its updates, and where the reference cuts as well.

        Every backend then sees the same blocks as it does live, so that both ways give the same bits.
        """
        over_columns = any(t.magnitude_axis == 1 and t.magnitude is not None for u in self.updates for t in u.terms)
        if over_columns or len({u.region.shape[1] for u in self.updates}) > 1:
            return [0, self.rows]  # norms over columns need all rows; blocks of several widths have no common borders
        cuts = {0, self.rows, *range(0, 0 if self.updates else self.rows, rows_per_block(self.columns))}
        for update in self.updates:
            first, last = self._rows_of(update)
            cuts.update(range(first, last, rows_per_block(update.region.shape[1])))
            cuts.add(last)
        return sorted(cuts)

    def pieces(self, limit: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of pieces of all rows, each of at most ``limit`` rows if the cuts allow."""
        return joined(self.cuts(), limit)

    def touches(self, start: int, stop: int) -> bool:
        """Whether anything falls on rows [start, stop)."""
        part = self.part(start, stop)
        return bool(part.updates or part.assigns)

    def part(self, start: int, stop: int) -> Plan:
        """The plan for rows [start, stop), as a 2-D tensor."""
        per_entry = self.rows // self.shape[0] if self.shape else 1
        parts = (_assign_for(assign, start, stop, self.columns, per_entry) for assign in self.assigns)
        updates = []
        for update in self.updates:
            first, last = self._rows_of(update)
            low, high = max(first, start), min(last, stop)
            if low < high:
                region = Region(None, (low - start, high - start), update.region.columns)
                cut = update.cut(slice(low - first, high - first), slice(None))
                updates.append(replace(cut, region=region))
        return Plan(tuple(updates), tuple(part for part in parts if part is not None))

    def _rows_of(self, update: Update) -> tuple[int, int]:
        """Rows of an update when stacked experts lie one below the other."""
        offset = 0 if update.region.expert is None else update.region.expert * self.shape[1]
        return offset + update.region.rows[0], offset + update.region.rows[1]


def tensor_plans(plan: Plan, shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorPlan]:
    """The parts of a plan, by tensor; ``shapes`` of all tensors that it changes."""
    updates: dict[str, list[Update]] = {}
    assigns: dict[str, list[Assign]] = {}
    for update in plan.updates:
        updates.setdefault(update.name, []).append(update)
    for assign in plan.assigns:
        assigns.setdefault(assign.name, []).append(assign)
    return {name: TensorPlan(updates.get(name, ()), assigns.get(name, ()), shapes[name]) for name in plan.tensors}


def joined(cuts: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of pieces from 0 to the last cut, each of at most ``limit`` rows if the cuts, ascending, allow."""
    start = previous = 0
    for cut in cuts:
        if cut - start > limit and previous > start:
            yield start, previous
            start = previous
        previous = cut
    yield start, previous


def memory(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy's stubs do not say that it is a buffer
    return memoryview(data)


def _assign_for(assign: Assign, start: int, stop: int, columns: int, per_entry: int) -> Assign | None:
    """The part of an Assign on rows [start, stop) of the matrix; ``per_entry`` rows make one of the first dimension."""
    value = assign.value.reshape(-1, columns)
    if assign.by_index:
        assert assign.rows is not None
        inside = [i for i, row in enumerate(assign.rows) if start <= row < stop]
        rows = tuple(assign.rows[i] - start for i in inside)
        return replace(assign, value=value[inside], rows=rows) if inside else None
    first = 0 if assign.rows is None else assign.rows[0] * per_entry
    low, high = max(first, start), min(first + len(value), stop)
    if low >= high:
        return None
    return replace(assign, value=value[low - first : high - first], rows=(low - start, high - start), resize=False)
