"""An operation in place: from one list of patches to another, step by step, so that a crash costs nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, RecordError
from .execute import hold_interrupts
from .files import named_errors, read_exactly, write_at
from .journal import Entry, Journal, Write, read_log
from .pieces import memory
from .progress import Progress
from .shards import Checkpoint, Shard, Stored
from .stream import stream
from .sums import digest, from_bytes, sector_sums, to_bytes
from .transform import Made, Read, Side, Task, Transform, itemsize, signature
from .undostore import Changed, Piece, State, Store, Undo

# Bytes of a piece, and of the pieces that are one step of the journal; how many steps are in memory at once.
# Smaller pieces cost more than they bring: the kernel's threads wait for one another, spinning, at the end of each.
PIECE_BYTES = 32 << 20
STEP_BYTES = 32 << 20
_IN_FLIGHT = 4


@dataclass(frozen=True)
class _Last:
    """What the log tells last of a task: ``undo`` is of its patched bytes, and ``sums`` where in the log theirs lie."""

    told: dict[str, Any]
    back: bool
    undo: Undo | None
    sums: int


@dataclass(frozen=True)
class Done:
    """What an operation did, in bytes; ``not_exact``: tensors off which a patch was only subtracted."""

    tensors: int
    changed: int
    written: int
    undo: int
    not_exact: tuple[str, ...]


class Operation:
    """Takes a checkpoint from the patches of ``old`` to those of ``target``; under the store's lock."""

    def __init__(
        self,
        store: Store,
        checkpoint: Checkpoint,
        old: State,
        target: State,
        backend: str,
        *,
        subtract: bool = False,
        progress: bool = False,
    ) -> None:
        self._store, self._checkpoint, self._old, self._target = store, checkpoint, old, target
        self._backend, self._subtract, self._progress = backend, subtract, progress
        loaded = {active.directory: store.load(active) for active in (*old.patches, *target.patches)}
        self._before, self._after = (
            Side(checkpoint, [(loaded[a.directory], a.strength) for a in state.patches], state.expert_layout)
            for state in (old, target)
        )
        self._undos = {name: store.undo(changed) for name, changed in old.files.items()}
        self._shards = {shard.name: shard for shard in checkpoint.shards}
        self._limit = PIECE_BYTES
        # Of each task that is done: what takes it back to the pristine bytes; None if they are there now.
        self._done: dict[tuple[str, int, int], Undo | None] = {}
        self._last: dict[tuple[str, int, int], _Last] = {}
        self._not_exact: dict[str, None] = {}
        self._begin: dict[str, Any] = {}
        self._files: dict[str, int] = {}
        self._journal: Journal

    def run(self) -> Done:
        """Do it.

        Raises:
            RecordError, BackendError, CheckpointError: all is as it was before, unless the message says that it is not.
        """
        tasks = self._tasks()
        names = dict.fromkeys([*(task.file for task in tasks), *self._old.files])
        stats = {name: os.stat(self._shards[name].path) for name in names}
        self._check_unchanged(stats)
        self._begin = {
            "generation": self._old.generation + 1,
            "patches": [asdict(active) for active in self._target.patches],
            "expert_layout": self._target.expert_layout,
            "backend": self._backend,
            "subtract": self._subtract,
            "limit": self._limit,
            "files": {name: [status.st_size, status.st_mtime_ns] for name, status in stats.items()},
        }
        with self._opened(), named_errors(self._store.path):
            self._journal = Journal.create(self._store.path, self._files, self._begin)
            try:
                self._steps(tasks, back=False)
                with hold_interrupts(deliver=False):  # it is done then, and there is nothing to take back
                    undo, written = self._commit()
            except BaseException as error:
                with hold_interrupts():
                    self._take_back(error)
                raise
            finally:
                self._journal.close()
        return Done(
            tensors=len({task.stored.name for task in tasks}),
            changed=sum(task.size for task in tasks),
            written=self._journal.bytes_written + written,
            undo=undo,
            not_exact=tuple(self._not_exact),
        )

    def resume(self) -> None:
        """Take up what a crash has cut short; raises as ``run``."""
        self._begin = read_log(self._store.path)[0].value
        with self._opened(), named_errors(self._store.path):
            aborted = self._reopen()
            try:
                if aborted:
                    self._back()
                else:
                    self._steps([task for task in self._tasks() if task.key not in self._done], back=False)
                    self._commit()
            except RecordError as error:
                self._take_back(error)
                raise
            finally:
                self._journal.close()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in self._begin["files"]:
                path = self._shards[name].path
                with named_errors(path):
                    self._files[name] = os.open(path, os.O_RDWR)
                stack.callback(os.close, self._files[name])
            yield

    def _reopen(self) -> bool:
        """Read the journal, as after a crash; returns whether the operation is being taken back."""
        self._journal, entries = Journal.open(self._store.path, self._files)
        self._limit = self._begin["limit"]
        self._done, self._last = {}, {}
        for entry in entries[1:]:
            self._remember(entry)
        for key, last in self._last.items():
            self._mend(key, last)
        self._journal.sync()
        return any("abort" in entry.value for entry in entries)

    def _remember(self, entry: Entry) -> None:
        at = entry.payload
        for raw in entry.value.get("pieces", ()):
            key, back, undo = (*raw["key"],), entry.value["back"], None
            if not raw["exact"]:
                self._not_exact[key[0]] = None
            if raw["undo"] is not None:
                piece = Piece.from_dict(raw["undo"])
                read, copy = partial(self._read_log, at), partial(self._copy_log, at, piece.stored_bytes)
                undo = Undo(piece, read, copy)
                at += piece.stored_bytes
            self._last[key] = _Last(raw, back, self._done.get(key) if back else undo, at)
            at += raw["sums"]
            if back:
                self._done.pop(key, None)
            else:
                self._done[key] = undo

    def _mend(self, key: tuple[str, int, int], last: _Last) -> None:
        """What a step was writing when it was cut short is written whole (``portllm/mend.py``)."""
        tensor, begin, end = key
        shard, stored = self._checkpoint.locations[tensor]
        here = [u for u in self._undos.get(shard.name, ()) if u.piece.tensor == tensor]
        old = tuple(u for u in here if begin <= u.piece.begin and u.piece.end <= end)
        adding, back = last.told["adding"], last.back
        # The patches that the bytes are to get, or were to lose; and what of them is known.
        side, undos = self._before, old
        if adding != back:
            side, undos = self._after, (last.undo,) if last.undo else ()
        task = Task(shard.name, stored, begin, end, undos, ((begin, end, None),))
        data = torch.empty(task.size, dtype=torch.uint8)
        offset, path = task.offset(begin), shard.path
        with named_errors(path):
            read_exactly(self._files[shard.name], memory(data), offset)
        if digest(sector_sums(memory(data), offset)) == last.told["digest"]:
            return
        if not last.told["sums"]:
            raise CheckpointError(f"{path}: tensor {tensor} is neither as it was before the operation nor after it")
        from .mend import mended  # loads numpy

        sums = from_bytes(self._journal.read(last.sums, last.told["sums"]))
        transform = Transform(side, Side(self._checkpoint, [], None), self._backend)
        computed = transform.patched(Read(task, data, sums, ()), undos)
        patched = mended(memory(data), memory(computed), sums, offset, itemsize(stored), adding=adding)
        if patched is None:
            raise CheckpointError(f"{path}: tensor {tensor} was changed by something else while it was half written")
        memory(data)[:] = patched
        if not adding:
            transform(Read(task, data, sums, ()))
        if digest(sector_sums(memory(data), offset)) != last.told["digest"]:
            raise CheckpointError(f"{path}: tensor {tensor} cannot be computed again; was portllm changed meanwhile?")
        with named_errors(path):
            write_at(self._files[shard.name], memory(data), offset)

    def _read_log(self, at: int, offset: int, size: int) -> memoryview:
        return self._journal.read(at + offset, size)

    def _copy_log(self, at: int, size: int, out: int, to: int) -> None:
        self._journal.copy(at, size, out, to)

    def _take_back(self, error: BaseException) -> None:
        """All as it was before, as if the error had been a crash."""
        if self._store.state().generation > self._old.generation:
            return  # it came too late: the operation is done
        pending = f"{self._checkpoint.path}: {error}; it is left half done: run portllm status --recover on it"
        if self._not_exact:
            raise CheckpointError(pending) from error  # what was subtracted cannot be taken back
        try:
            self._journal.close()
            self._reopen()
            self._journal.append({"abort": f"{type(error).__name__}: {error}"})
            self._back()
        except Exception as second:
            raise CheckpointError(f"{pending} ({second})") from error

    def _back(self) -> None:
        tasks = []
        for (tensor, begin, end), undo in self._done.items():
            shard, stored = self._checkpoint.locations[tensor]
            inside = [u.piece for u in self._undos.get(shard.name, ()) if u.piece.tensor == tensor]
            targets = tuple((p.begin, p.end, p.after) for p in inside if begin <= p.begin and p.end <= end)
            tasks.append(Task(shard.name, stored, begin, end, () if undo is None else (undo,), targets))
        self._steps(tasks, back=True)
        self._journal.sync()
        for name, (_, mtime) in self._begin["files"].items():
            os.utime(self._shards[name].path, ns=(mtime, mtime))
        self._store.commit(self._old)

    def _commit(self) -> tuple[int, int]:
        """Returns (bytes of the records, of which were written now)."""
        self._journal.sync()
        generation, total, written = self._begin["generation"], 0, 0
        ranges: dict[str, list[tuple[int, int]]] = {}
        for tensor, begin, end in self._done:
            ranges.setdefault(tensor, []).append((begin, end))
        files: dict[str, Changed] = {}
        for name, (size, mtime) in self._begin["files"].items():
            before = self._old.files.get(name)
            kept = [u for u in self._undos.get(name, ()) if not _covered(u.piece, ranges)]
            made = [
                undo
                for (tensor, _, _), undo in self._done.items()
                if undo is not None and self._checkpoint.locations[tensor][0].name == name
            ]
            first = before.mtime_before if before else mtime
            records = f"records/{generation}-{name}" if kept or made else None
            if records and before and not made and len(kept) == len(self._undos[name]):
                records = before.records  # nothing in it has changed
            elif records:
                written += self._store.write_records(records, [*kept, *made])
            path = self._shards[name].path
            if records is None:
                if not self._not_exact:
                    os.utime(path, ns=(first, first))  # the file is what it was then
                continue
            total += (self._store.path / records).stat().st_size
            files[name] = Changed(size, first, os.stat(path).st_mtime_ns, records)
        self._store.commit(replace(self._target, generation=generation, files=files))
        return total, written

    # -- what to do --------------------------------------------------------------------------------------------------

    def _tasks(self) -> list[Task]:
        tasks = []
        for shard in self._checkpoint.shards:
            undos: dict[str, list[Undo]] = {}
            for undo in sorted(self._undos.get(shard.name, ()), key=lambda u: u.piece.begin):
                undos.setdefault(undo.piece.tensor, []).append(undo)
            for stored in shard.tensors:
                old = undos.get(stored.name, [])
                for begin, end in self._cut(stored, old):
                    inside = tuple(u for u in old if begin <= u.piece.begin and u.piece.end <= end)
                    if not self._is_same(stored, begin, end, inside):
                        tasks.append(Task(shard.name, stored, begin, end, inside, ((begin, end, None),)))
        return tasks

    def _cut(self, stored: Stored, old: list[Undo]) -> Iterator[tuple[int, int]]:
        """The ranges of a tensor's bytes that are patched now, or shall be; no border is within an old piece."""
        change = self._after.plans.get(stored.name)
        pieces = [(u.piece.begin, u.piece.end) for u in old]
        if change is None or stored.start == stored.stop:
            yield from pieces
            return
        row = change.columns * itemsize(stored)
        cuts = [cut * row for cut in change.cuts() if not any(b < cut * row < e for b, e in pieces)]
        run: list[tuple[int, int]] = []
        for low, high in pairwise(cuts):
            alone = (low, high) in pieces
            touched = alone or any(low <= b and e <= high for b, e in pieces) or change.touches(low // row, high // row)
            if run and (alone or not touched or high - run[0][0] > self._limit):
                yield run[0][0], run[-1][1]
                run = []
            if alone:
                yield low, high
            elif touched:
                run.append((low, high))
        if run:
            yield run[0][0], run[-1][1]

    def _is_same(self, stored: Stored, begin: int, end: int, old: tuple[Undo, ...]) -> bool:
        """Whether the same patches do the same to these bytes before and after."""
        if len(old) != 1 or (old[0].piece.begin, old[0].piece.end) != (begin, end):
            return False
        before, after = (side.part(stored, begin, end) for side in (self._before, self._after))
        return before[0] == after[0] and signature(before[1]) == signature(after[1])

    def _check_unchanged(self, stats: Mapping[str, os.stat_result]) -> None:
        """Before anything is written, look at files whose size or time is not that which was left."""
        for name, changed in self._old.files.items():
            size, mtime = stats[name].st_size, stats[name].st_mtime_ns
            if size != changed.size:
                raise RecordError(f"{self._shards[name].path}: is of another size than portllm left it; restore it")
            if mtime != changed.mtime and not self._subtract:
                for tensor in changed_tensors(self._shards[name], self._undos[name]):
                    raise self._not_as_left(tensor)

    def _not_as_left(self, tensor: str) -> RecordError:
        path = self._checkpoint.locations[tensor][0].path
        return RecordError(
            f"{path}: tensor {tensor} was changed by something else since the patch was applied; put it back, or "
            "take the patch off with subtract=True (--subtract), which is not exact"
        )

    # -- the steps ---------------------------------------------------------------------------------------------------

    def _steps(self, tasks: list[Task], *, back: bool) -> None:
        sides = (self._after, self._before) if back else (self._before, self._after)
        transform = Transform(*sides, self._backend)
        buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_IN_FLIGHT)]
        with Progress(sum(task.size for task in tasks), enabled=self._progress) as bar:
            stream(
                list(_batches(tasks)),
                lambda batch, turn: self._read(batch, buffers, turn),
                lambda reads: [transform(read) for read in reads],
                lambda batch: self._write(batch, back, bar),
                _IN_FLIGHT,
            )

    def _read(self, tasks: list[Task], buffers: list[Tensor], turn: int) -> list[Read]:
        starts = [0, *accumulate(-(-task.size // 64) * 64 for task in tasks)]  # aligned for any dtype
        if buffers[turn].numel() < starts[-1]:  # used again: fresh pages cost more than the read that fills them
            buffers[turn] = torch.empty(starts[-1], dtype=torch.uint8)
        reads = []
        for task, start in zip(tasks, starts, strict=False):
            data = buffers[turn][start : start + task.size]
            with named_errors(self._shards[task.file].path):
                read_exactly(self._files[task.file], memory(data), task.offset(task.begin))
            read = Read.of(task, data)
            if read.changed and not self._subtract:
                raise self._not_as_left(task.stored.name)
            reads.append(read)
        return reads

    def _write(self, batch: list[Made], back: bool, bar: Progress) -> Future[None]:
        writes, told, payload = [], [], []
        for made in batch:
            task, mend = made.task, made.mend
            write = Write(task.file, task.offset(task.begin), memory(made.data), made.digest, mend is None)
            writes.append(write)
            undo = None
            if not back:  # there the records are those of the old state, which are still there
                for piece, parts in made.pieces:
                    undo = asdict(piece)
                    payload += parts
            sums = b"" if mend is None else to_bytes(mend)
            payload.append(memoryview(sums))
            told.append(
                {"key": task.key, "undo": undo, "exact": made.exact, "sums": len(sums), "adding": made.adding}
                | {"file": write.file, "offset": write.offset, "digest": write.digest}
            )
        entry, going = self._journal.step(writes, {"pieces": told, "back": back}, payload)
        self._remember(entry)
        bar.update(sum(made.task.size for made in batch))
        return going


def changed_tensors(shard: Shard, undos: Sequence[Undo]) -> Iterator[str]:
    """Names of the tensors of a file whose bytes are not those that portllm left; reads all of them."""
    places = {stored.name: stored for stored in shard.tensors}
    wrong: dict[str, None] = {}
    with named_errors(shard.path), open(shard.path, "rb", buffering=0) as file:
        for piece in (undo.piece for undo in undos):
            if piece.tensor in wrong:
                continue
            data = memoryview(bytearray(piece.end - piece.begin))
            read_exactly(file.fileno(), data, places[piece.tensor].start + piece.begin)
            if digest(sector_sums(data, places[piece.tensor].start + piece.begin)) != piece.after:
                wrong[piece.tensor] = None
                yield piece.tensor


def _batches(tasks: list[Task]) -> Iterator[list[Task]]:
    batch: list[Task] = []
    size = 0
    for task in tasks:
        if batch and size + task.size > STEP_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(task)
        size += task.size
    if batch:
        yield batch


def _covered(piece: Piece, ranges: Mapping[str, list[tuple[int, int]]]) -> bool:
    return any(begin <= piece.begin and piece.end <= end for begin, end in ranges.get(piece.tensor, ()))
