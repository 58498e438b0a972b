"""One piece of a checkpoint in memory, from one list of patches to another, with what takes it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .bind import ExpertLayout, Options, bind
from .errors import RecordError
from .execute import execute
from .patch import Patch
from .pieces import TensorPlan, memory, tensor_plans
from .planning import Plan, Update
from .record import Record
from .shards import Checkpoint, Stored
from .sums import digest, sector_sums
from .undostore import Piece, Undo, pack

if TYPE_CHECKING:
    from .sums import Sums


class Side:
    """A list of patches, bound to the checkpoint; raises as ``portllm.bind.bind``."""

    def __init__(
        self, checkpoint: Checkpoint, patches: list[tuple[Patch, float]], expert_layout: ExpertLayout | None
    ) -> None:
        self.plans: dict[str, TensorPlan] = {}
        if patches:
            plan = bind(checkpoint.target(), patches, Options("once", expert_layout, False))
            shapes = {name: checkpoint.locations[name][1].shape for name in plan.tensors}
            self.plans = tensor_plans(plan, shapes)

    def part(self, stored: Stored, begin: int, end: int) -> tuple[int, Plan]:
        """(columns, plan) of bytes [begin, end) of a tensor, as a matrix; (1, nothing) if no patch is for it."""
        change = self.plans.get(stored.name)
        if change is None:
            return 1, Plan(())
        row = change.columns * itemsize(stored)
        return change.columns, change.part(begin // row, end // row)


@dataclass(frozen=True)
class Task:
    """Bytes [begin, end) of a tensor to rewrite.

    Attributes:
        file: the name of its file.
        old: the pieces in it that are patched now.
        targets: (begin, end, hash) of those that shall be; the hash if they were so before, else None.
    """

    file: str
    stored: Stored
    begin: int
    end: int
    old: tuple[Undo, ...]
    targets: tuple[tuple[int, int, str | None], ...]

    @property
    def key(self) -> tuple[str, int, int]:
        return self.stored.name, self.begin, self.end

    @property
    def size(self) -> int:
        return self.end - self.begin

    def offset(self, begin: int) -> int:
        """Where in its file a byte of the tensor lies."""
        return self.stored.start + begin

    def bytes(self, data: Tensor, begin: int, end: int) -> Tensor:
        """Bytes [begin, end) of the tensor; ``data`` are those of the task."""
        return data[begin - self.begin : end - self.begin]

    def matrix(self, data: Tensor, begin: int, end: int, columns: int) -> Tensor:
        """The same, as a matrix."""
        assert self.stored.dtype is not None  # bind refuses kinds that torch does not know
        return self.bytes(data, begin, end).view(self.stored.dtype).view(-1, columns)


@dataclass
class Read:
    """A task's bytes, and their sums; ``changed``: old pieces that are not as portllm left them."""

    task: Task
    data: Tensor
    sums: Sums
    changed: tuple[Undo, ...]

    @classmethod
    def of(cls, task: Task, data: Tensor) -> Read:
        sums = sector_sums(memory(data), task.offset(task.begin))
        changed = tuple(u for u in task.old if piece_digest(task, data, sums, u.piece) != u.piece.after)
        return cls(task, data, sums, changed)


@dataclass
class Made:
    """A task's new bytes.

    Attributes:
        digest: of them all.
        pieces: with their undo parts; none where they are pristine.
        mend: the sums of the patched bytes, where the new ones or the old ones are pristine; else None.
        adding: whether the new ones are the patched ones.
        exact: false if patches were only subtracted.
    """

    task: Task
    data: Tensor
    digest: str
    pieces: list[tuple[Piece, list[memoryview]]]
    mend: Sums | None
    adding: bool
    exact: bool


@dataclass(frozen=True)
class Transform:
    """From the patches of ``before`` to those of ``after``."""

    before: Side
    after: Side
    backend: str

    def __call__(self, read: Read) -> Made:
        """In place, in memory.

        Raises:
            RecordError: the records do not give back what was there.
            BackendError: the patches were summed by a backend that does not run here.
        """
        task, data = read.task, read.data
        swap = self._swap(read)
        if swap is not None:
            piece = task.old[0].piece
            records = _exchange(
                task.matrix(data, task.begin, task.end, piece.columns), *swap, task.old[0].load()[0], self.backend
            )
            pieces, adding, mend = [_piece(piece, records, memoryview(b""))], True, False
        else:
            for undo in task.old:
                self._restore(read, undo)
            base, adding, mend = read.sums, not task.old, not read.changed
            if task.old:
                base = sector_sums(memory(data), task.offset(task.begin))
                for undo in task.old:
                    if undo not in read.changed and piece_digest(task, data, base, undo.piece) != undo.piece.before:
                        raise RecordError(f"{task.stored.name}: its undo record does not give back what was there")
            pieces, after = [], digest(base)
            for begin, end, _ in task.targets:
                columns, plan = self.after.part(task.stored, begin, end)
                if plan.updates or plan.assigns:
                    empty = Piece(task.stored.name, begin, end, columns, after, "", (), (), (), ())
                    pieces.append(self._add(task.matrix(data, begin, end, columns), plan, empty))
            mend = mend and bool(task.old) != bool(pieces) and task.stored.start % itemsize(task.stored) == 0
        sums = sector_sums(memory(data), task.offset(task.begin)) if pieces else base
        after = digest(sums)
        for begin, end, expected in task.targets:
            if expected is not None and _range_digest(task, data, sums, begin, end) != expected:
                raise RecordError(f"{task.stored.name}: what was there before cannot be computed again")
        pieces = [(replace(piece, after=after), parts) for piece, parts in pieces]
        patched = (sums if adding else read.sums) if mend else None
        return Made(task, data, after, pieces, patched, adding, not read.changed)

    def patched(self, read: Read, undos: Sequence[Undo]) -> Tensor:
        """Of bytes that are pristine in part: what ``before`` makes of them, as if they were so everywhere.

        ``undos`` are of the pieces that have been patched, or were to be.
        """
        task, data = read.task, read.data.clone()
        for undo in undos:
            piece = undo.piece
            records, kept = undo.load()
            _put_rows(task.bytes(data, piece.begin, piece.end), piece, kept)
            _, plan = self.before.part(task.stored, piece.begin, piece.end)
            matrix = task.matrix(data, piece.begin, piece.end, piece.columns)
            execute(plan, {piece.tensor: matrix}, backend=_backend_of(records, self.backend))
        return data

    def _swap(self, read: Read) -> tuple[Sequence[Update], Sequence[Update]] | None:
        """Updates to take off and to add in one pass, where both are for the same regions, and all there is."""
        task = read.task
        if read.changed or len(task.old) != 1 or len(task.targets) != 1:
            return None
        piece, target = task.old[0].piece, task.targets[0]
        if not (piece.begin, piece.end) == target[:2] == (task.begin, task.end):
            return None
        (columns, old), (new_columns, new) = (side.part(task.stored, *target[:2]) for side in (self.before, self.after))
        if not (old.is_linear and new.is_linear) or columns != new_columns:
            return None
        if not new.updates or _regions(old.updates) != _regions(new.updates):
            return None
        _check_regions(piece, old.updates)
        return old.updates, new.updates

    def _restore(self, read: Read, undo: Undo) -> None:
        """Take one piece's patches off: to the last bit, or, if somebody has changed it, by subtraction."""
        task, piece = read.task, undo.piece
        matrix = task.matrix(read.data, piece.begin, piece.end, piece.columns)
        _, plan = self.before.part(task.stored, piece.begin, piece.end)
        if undo in read.changed:
            execute(plan.negated(), {piece.tensor: matrix}, backend=self.backend)
            return
        plain = [update for update in plan.updates if not update.is_dora]
        _check_regions(piece, plain)
        records, kept = undo.load()
        _exchange(matrix, plain, [], records, self.backend)
        _put_rows(task.bytes(read.data, piece.begin, piece.end), piece, kept)

    def _add(self, matrix: Tensor, plan: Plan, empty: Piece) -> tuple[Piece, list[memoryview]]:
        """Apply a plan to a matrix."""
        plain = [update for update in plan.updates if not update.is_dora]
        dora = tuple(update for update in plan.updates if update.is_dora)
        kept = _kept_rows(plan, dora)
        old = b"".join(bytes(memory(matrix[first:last])) for first, last in kept)
        execute(Plan((), plan.assigns), {empty.tensor: matrix}, backend=self.backend)
        records = _exchange(matrix, [], plain, [None] * len(plain), self.backend)
        execute(Plan(dora), {empty.tensor: matrix}, backend=self.backend)
        return _piece(replace(empty, regions=_regions(plain), kept=kept), records, memoryview(old))


def itemsize(stored: Stored) -> int:
    """Bytes of an element; 1 for kinds that torch does not know."""
    return (stored.dtype or torch.uint8).itemsize


def signature(plan: Plan) -> tuple[Any, ...]:
    """Equal for plans that do the same with the same factors."""

    def of(tensor: Tensor | None) -> Any:
        return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)

    updates = [
        (u.region, [(of(t.lora_A), of(t.lora_B), t.scaling, of(t.magnitude), t.strength) for t in u.terms])
        for u in plan.updates
    ]
    return updates, [(of(a.value), a.rows, a.strength) for a in plan.assigns]


def _piece(piece: Piece, records: list[Record], kept: memoryview) -> tuple[Piece, list[memoryview]]:
    parts, buffers = pack(records, kept)
    return replace(piece, by=tuple(record.by for record in records), parts=parts), buffers


def _exchange(
    matrix: Tensor, old: Sequence[Update], new: Sequence[Update], records: Sequence[Record | None], backend: str
) -> list[Record]:
    """``ops.lowrank_exchange_`` on regions of a matrix: take ``old`` off, add ``new``; one is empty, or both fit."""
    both = [(*pair,) for pair in (zip(old, new, strict=True) if old and new else [(u,) for u in (*old, *new)])]
    if not both:
        return []
    terms = [term for updates in both for update in updates for term in update.terms]
    made = ops.lowrank_exchange_(
        [updates[0].region.view(matrix) for updates in both],
        [term.lora_A for term in terms],
        [term.lora_B for term in terms],
        [term.scaling for term in terms],
        [len(updates[0].terms) if old else 0 for updates in both],
        [len(updates[-1].terms) if new else 0 for updates in both],
        list(records),
        _backend_of(records, backend),
    )
    return [record for record in made if record is not None]


def _backend_of(records: Sequence[Record | None], backend: str) -> str:
    """The backend that summed what the records are of, which must do it again; ``backend`` if there are none."""
    known = next((record.by for record in records if record is not None), None)
    return backend if known is None else "cpu" if known.startswith("cpu") else "torch"


def _put_rows(data: Tensor, piece: Piece, kept: memoryview) -> None:
    """Put the rows that were kept back into a piece's bytes."""
    if not piece.kept:
        return
    row = len(kept) // sum(last - first for first, last in piece.kept)
    rows, offset = data.view(-1, row), 0
    for first, last in piece.kept:
        size = (last - first) * row
        memory(rows[first:last])[:] = kept[offset : offset + size]
        offset += size


def piece_digest(task: Task, data: Tensor, sums: Sums, piece: Piece) -> str:
    """The digest of a piece of a task; ``sums`` are those of ``data``, all of the task."""
    return _range_digest(task, data, sums, piece.begin, piece.end)


def _range_digest(task: Task, data: Tensor, sums: Sums, begin: int, end: int) -> str:
    if (begin, end) != (task.begin, task.end):
        sums = sector_sums(memory(task.bytes(data, begin, end)), task.offset(begin))
    return digest(sums)


def _regions(updates: Sequence[Update]) -> tuple[tuple[int, int, int, int], ...]:
    return tuple((*u.region.rows, *u.region.columns) for u in updates)


def _check_regions(piece: Piece, updates: Sequence[Update]) -> None:
    if _regions(updates) != piece.regions:
        raise RecordError(
            f"{piece.tensor}: the patches do not land where they did when they were applied; was config.json changed, "
            "or portllm?"
        )


def _kept_rows(plan: Plan, dora: Sequence[Update]) -> tuple[tuple[int, int], ...]:
    """Rows that no record brings back, as [start, stop) that do not touch."""
    ranges = [update.region.rows for update in dora]
    for assign in plan.assigns:
        rows = assign.rows
        assert rows is not None  # a part of a plan has them
        ranges += [(row, row + 1) for row in rows] if assign.by_index else [(rows[0], rows[1])]
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)
