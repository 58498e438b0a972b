"""Patches on a checkpoint in place: only the bytes that change are written, and every one of them comes back.

An operation takes the checkpoint from one list of patches to another: applying appends to the list, removing takes out.
What changes is read, computed and written in pieces of whole rows. Where a piece has patches already, they are taken
off first, to the last bit, in memory; so the files are always those of one merge of the list into the pristine model,
whatever came in between. ``portllm/undostore.py`` says what is kept beside the checkpoint, and ``portllm/journal.py``
how a crash is survived: whatever opens the checkpoint next completes the operation, or takes it back.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .bind import ExpertLayout
from .errors import CheckpointError
from .files import check_space, fsync, named_errors
from .journal import read_log
from .operation import STEP_BYTES, Done, Operation, changed_tensors
from .patch import Patch
from .planning import Plan
from .shards import Checkpoint
from .undostore import Active, State, Store


@dataclass(frozen=True)
class InPlaceReport:
    """What an operation in place did.

    Attributes:
        model: the checkpoint.
        patches: names of what is applied now.
        tensors_changed, bytes_changed: what the operation rewrote.
        bytes_written: all that went to disk for it, with the journal, the patches and the records.
        undo_bytes: what lies beside the checkpoint now, the patches not counted.
        seconds: of wall time.
        not_exact: tensors off which a patch was only subtracted, since somebody else had changed them.
        warnings: what a user should know, one line each.
    """

    model: str
    patches: tuple[str, ...]
    tensors_changed: int
    bytes_changed: int
    bytes_written: int
    undo_bytes: int
    seconds: float
    not_exact: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def apply_in_place(
    checkpoint: Checkpoint,
    plan: Plan,
    patches: Sequence[tuple[Patch, float]],
    expert_layout: ExpertLayout | None,
    backend: str,
    progress: bool,
) -> InPlaceReport:
    """Add patches on top of those that are applied; ``plan`` is what they alone do to the checkpoint.

    Raises as ``portllm.apply_checkpoint``; the checkpoint is then as it was before.
    """
    started = time.perf_counter()
    store = Store(checkpoint.path)
    _check_files(checkpoint, plan.tensors)
    with store.locked():
        _settle(store)
        old = store.state()
        layout = expert_layout or old.expert_layout
        if old.patches and layout != old.expert_layout:
            raise CheckpointError(
                f"{checkpoint.path}: expert_layout={layout!r}, but the patches that are applied were bound with "
                f"{old.expert_layout!r}; remove them first, or write a copy"
            )
        size = sum(tensor.nbytes for patch, _ in patches for tensor in patch.tensors.values())
        check_space(store.path, size + _undo_bytes(checkpoint, plan) + 2 * STEP_BYTES)
        actives: list[Active] = []
        with named_errors(store.path):
            fsync(store.path.parent)
            (store.path / "patches").mkdir(exist_ok=True)
            for i, (patch, strength) in enumerate(patches):
                directory = f"patches/{old.generation + 1}-{i}"
                store.save(patch, directory)
                taken = {active.name for active in (*old.patches, *actives)}
                actives.append(_active(patch, strength, directory, taken))
        target = replace(old, patches=(*old.patches, *actives), expert_layout=layout)
        done = Operation(store, checkpoint, old, target, backend, progress=progress).run()
    return _report(target, checkpoint, done, started, plan.warnings)


def remove_from_checkpoint(
    model: str | os.PathLike[str], patch: str | None = None, *, subtract: bool = False, progress: bool = False
) -> InPlaceReport:
    """Take one patch, or all, off a checkpoint that was patched in place: each byte is as if it had never been there.

    Args:
        model: a directory, or a single safetensors file.
        patch: the name of one (``portllm.checkpoint_status`` tells them), wherever in the list; None: all.
        subtract: tensors that somebody else has changed since are no error: the patch's values are subtracted, which
            is not exact, and the report names them.
        progress: show a bar on stderr.

    Raises:
        CheckpointError: nothing was applied in place, no patch has this name, another process is at it, or the disk
            fails.
        RecordError: the bytes are not those that portllm left; names the tensor.
        BackendError: the patch was added on another kind of machine, whose sums differ in the last bit.
        The checkpoint is then as it was before.
    """
    started = time.perf_counter()
    store = Store(Path(model))
    if not store.path.exists():
        raise CheckpointError(f"{model}: no patch was applied to it in place")
    with store.locked():
        _settle(store)
        checkpoint, old = Checkpoint.open(store.model, recover=False), store.state()
        if not old.patches:
            raise CheckpointError(f"{model}: no patch is applied to it in place")
        names = [active.name for active in old.patches]
        if patch is not None and patch not in names:
            raise CheckpointError(f"{model}: no patch {patch!r} is applied, only {', '.join(names)}")
        kept = tuple(active for active in old.patches if patch is not None and active.name != patch)
        _check_files(checkpoint, [name for name, (shard, _) in checkpoint.locations.items() if shard.name in old.files])
        target = replace(old, patches=kept)
        done = Operation(store, checkpoint, old, target, "auto", progress=progress, subtract=subtract).run()
    return _report(target, checkpoint, done, started, ())


def _report(
    target: State, checkpoint: Checkpoint, done: Done, started: float, warnings: tuple[str, ...]
) -> InPlaceReport:
    return InPlaceReport(
        model=str(checkpoint.path),
        patches=tuple(active.name for active in target.patches),
        tensors_changed=done.tensors,
        bytes_changed=done.changed,
        bytes_written=done.written,
        undo_bytes=done.undo,
        seconds=time.perf_counter() - started,
        not_exact=done.not_exact,
        warnings=warnings,
    )


@dataclass(frozen=True)
class CheckpointStatus:
    """What is applied to a checkpoint in place.

    Attributes:
        model: the checkpoint.
        patches: in the order in which they were added (``portllm.undostore.Active``).
        pending: an operation was cut short, or is going on.
        files: names of the files that differ from the pristine ones.
        tensors, bytes: how much of them.
        undo_bytes: what the records take.
        summed_by: who summed, and must take off again.
        verified: whether the bytes were compared.
        changed: tensors that are not as portllm left them; empty unless verified.
    """

    model: str
    patches: tuple[Active, ...]
    pending: bool
    files: tuple[str, ...]
    tensors: int
    bytes: int
    undo_bytes: int
    summed_by: tuple[str, ...]
    verified: bool
    changed: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def checkpoint_status(model: str | os.PathLike[str], *, verify: bool = False) -> CheckpointStatus:
    """What is applied to a checkpoint in place; changes nothing, and completes nothing.

    Args:
        model: a directory, or a single safetensors file.
        verify: read what was changed, and compare it with the hashes kept.

    Raises:
        CheckpointError: there is no such checkpoint, or what lies beside it cannot be read.
    """
    store = Store(Path(model))
    checkpoint = Checkpoint.open(store.model, recover=False)
    state, pending = store.state(), store.pending
    shards = {shard.name: shard for shard in checkpoint.shards}
    missing = sorted(set(state.files) - set(shards))
    if missing:
        raise CheckpointError(f"{store.file(missing[0])}: was patched in place, and is missing; put it back")
    undos = {name: store.undo(changed) for name, changed in state.files.items()}
    pieces = [undo.piece for of_file in undos.values() for undo in of_file]
    changed = [t for name, of_file in undos.items() for t in changed_tensors(shards[name], of_file)] if verify else []
    return CheckpointStatus(
        model=str(store.model),
        patches=state.patches,
        pending=pending,
        files=tuple(state.files),
        tensors=len({piece.tensor for piece in pieces}),
        bytes=sum(piece.end - piece.begin for piece in pieces),
        undo_bytes=sum((store.path / c.records).stat().st_size for c in state.files.values() if c.records),
        summed_by=tuple(sorted({by for piece in pieces for by in piece.by})),
        verified=verify,
        changed=tuple(changed),
    )


def recover(model: Path) -> bool:
    """Complete, or take back, an operation that was cut short; returns whether there was one.

    Raises:
        CheckpointError: it is still going on, in another process; or the disk fails.
    """
    store = Store(model)
    if not store.pending:
        return False
    with store.locked():
        return _settle(store)


def _settle(store: Store) -> bool:
    if not store.pending:
        return False
    begin = read_log(store.path)[0].value
    old = store.state()
    if begin["generation"] > old.generation:
        checkpoint = Checkpoint.open(store.model, recover=False)
        patches = [_from_json(raw) for raw in begin["patches"]]
        target = replace(old, patches=tuple(patches), expert_layout=begin["expert_layout"])
        Operation(store, checkpoint, old, target, begin["backend"], subtract=begin["subtract"]).resume()
    else:
        store.commit(old)  # all that was left to do is to delete the journal
    return True


def _from_json(raw: dict[str, Any]) -> Active:
    return Active(**{**raw, "ranks": tuple(raw["ranks"])})


def _active(patch: Patch, strength: float, directory: str, taken: set[str]) -> Active:
    plain = Path(patch.name).name or "patch"
    name = next(n for n in (plain, *(f"{plain}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Active(name, directory, strength, patch.ranks, now, patch.name)


def _check_files(checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse files that are not this checkpoint's alone, or cannot be written."""
    for path in {checkpoint.locations[name][0].path: None for name in names}:
        other = Store(path) if checkpoint.path.is_dir() else Store(path.parent)
        if path.name in other.state().files:
            raise CheckpointError(f"{path}: has been patched in place as part of {other.model}; name that instead")
        status = os.lstat(path)
        why = None
        if stat.S_ISLNK(status.st_mode):
            why = f"is a link to {os.readlink(path)}, which others may use as well"
        elif status.st_nlink > 1:
            why = f"is one file with {status.st_nlink} names, all of which would change"
        elif not os.access(path, os.W_OK):
            why = "may not be written"
        if why:
            raise CheckpointError(f"{path}: {why}; copy the model first, or write a patched copy (without --in-place)")


def _undo_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """About what the records take at most, in bytes; of what has none, all."""
    whole = {a.name for a in plan.assigns} | {u.name for u in plan.updates if u.is_dora}
    sizes = {name: stored.stop - stored.start for name, (_, stored) in checkpoint.locations.items()}
    return sum(sizes[name] if name in whole else sizes[name] // 10 for name in plan.tensors)
