"""Checkpoints on disk: stream the shards through the plan, into a copy that is whole or absent.

Several processes may share the work (``portllm.ranks``): each writes some of the shards into the same copy.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bind import ExpertLayout, Options, Tied, bind
from .copying import Job
from .dcp import DistributedCheckpoint, is_dcp, quoted
from .errors import CheckpointError, PlanError
from .files import (
    check_destination,
    named_errors,
    read_exactly,
    whole_or_absent,
)
from .hub import resolve
from .inplace import InPlaceReport, apply_in_place
from .live import Patches, as_patches
from .patch import Patch
from .pieces import TensorPlan, memory
from .planning import Plan, Update
from .progress import Progress
from .ranks import Ranks
from .reference import FLOAT_DTYPES
from .rounding import Kind, ReadRows, Rounding, lost, survivals
from .shards import MODEL_FILES, Checkpoint
from .sparsity import with_losses


@dataclass(frozen=True)
class CheckpointReport:
    """What ``apply_checkpoint`` did; sizes in bytes, time in seconds.

    ``survival``: for each weight, the share of what was added that is left after rounding (see
    ``portllm.rounding.survival``); of quantised weights measured, not estimated.
    """

    out: str
    shards: int
    tensors_updated: int
    tensors_copied: int
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]
    survival: Mapping[str, float] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float:
        """Read plus written, in 10^9 bytes a second."""
        return (self.bytes_read + self.bytes_written) / max(self.seconds, 1e-9) / 1e9

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gigabytes_per_second": self.gigabytes_per_second}


def plan_checkpoint(
    model: str | os.PathLike[str],
    patch: Patches,
    scale: float = 1.0,
    *,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    resize: bool = False,
    part: str | None = None,
) -> tuple[Checkpoint | DistributedCheckpoint, Plan]:
    """Open a checkpoint and bind the patch to it, reading headers only. Args and errors as ``apply_checkpoint``."""
    patches = as_patches(patch, scale)
    options = Options(tied, expert_layout, resize)
    path = resolve(model, what="model", allow=MODEL_FILES)
    checkpoint: Checkpoint | DistributedCheckpoint
    if is_dcp(path):
        checkpoint, made = _bind_dcp(DistributedCheckpoint.open(path), patches, options, part)
    elif part is not None:
        raise CheckpointError(
            f"{path}: part={part!r} is only for torch.distributed.checkpoint directories; leave it out"
        )
    else:
        checkpoint = Checkpoint.open(path)
        made = bind(checkpoint.target(), patches, options)
    try:
        made.check_complete(strict=strict)
    except PlanError as error:
        is_known = isinstance(checkpoint, Checkpoint) and checkpoint.quantised.weights
        if "quantization_config" in checkpoint.config and not is_known:
            raise PlanError(f"{error} ({checkpoint.path} is quantised; patch the 16-bit model instead)") from None
        raise
    return checkpoint, made


def _bind_dcp(
    checkpoint: DistributedCheckpoint, patches: list[tuple[Patch, float]], options: Options, part: str | None
) -> tuple[DistributedCheckpoint, Plan]:
    """Bind to the part that is named, or else to the only one in which the patch finds any of its names.

    Raises:
        PlanError: several parts have weights of the patch's names, or what ``bind`` raises.
        CheckpointError: no such part, or none that could be a model.
    """
    if part is not None:
        chosen = checkpoint.choose(part)
        return chosen, bind(chosen.target(), patches, options)
    if not checkpoint.parts:
        raise CheckpointError(f"{checkpoint.path}: no tensor with a name such as layers.0.weight: no model in it")
    found: dict[str, Plan | PlanError] = {}
    for name in checkpoint.parts:
        try:
            made: Plan | PlanError = bind(checkpoint.choose(name).target(), patches, options)
        except PlanError as error:  # found, but it does not fit
            made = error
        if isinstance(made, PlanError) or made.updates or made.assigns or len(checkpoint.parts) == 1:
            found[name] = made
    if not found:
        raise PlanError(
            f"the patch matches nothing in {checkpoint.path}: none of its parts {quoted(checkpoint.parts)} has a "
            "weight of its names; is it a patch for another model?"
        )
    if len(found) > 1:
        raise PlanError(
            f"{checkpoint.path}: the patch's weights are in several parts: {quoted(found)}; say which one is to be "
            f"patched, such as part={next(iter(found))!r} (--part)"
        )
    ((name, only),) = found.items()
    if isinstance(only, PlanError):
        raise only
    return checkpoint.choose(name), only


def apply_checkpoint(
    model: str | os.PathLike[str],
    patch: Patches,
    out: str | os.PathLike[str] | None = None,
    scale: float = 1.0,
    *,
    in_place: bool = False,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    resize: bool = False,
    rounding: Kind = "nearest",
    seed: int = 0,
    keep_zeros: bool = False,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    overwrite: bool = False,
    link: bool = False,
    part: str | None = None,
    group: Any = None,
    progress: bool = False,
) -> CheckpointReport | InPlaceReport:
    """Write a patched copy of a checkpoint, or patch a safetensors one in place; the model is never in memory.

    Peak extra memory is the patch and a few pieces of ``CHUNK_BYTES`` (DoRA over columns, and quantised weights with
    one scale for all: the codes of a few tensors). Quantised weights stay quantised, see ``portllm.quantised``. Shards,
    their layout and metadata stay as they are; untouched tensors are copied byte for byte; configuration,
    tokenizer and generation files come along. ``out`` appears under its name only when all of it is on disk.

    A torch.distributed.checkpoint (DCP) directory is copied in the same way, with the layout that it has: only the
    numbers of the weights change in it, and its metadata, the optimizer's state and all else stay byte for byte.

    In place, only the bytes that change are written, on top of patches that were applied so before; the model is then
    what one merge of all of them into the pristine one gives. What takes them off again, to the last bit
    (``portllm.remove_from_checkpoint``), lies beside the checkpoint, in ``.portllm``. After a crash, the next use of
    the checkpoint through portllm completes what was begun, or takes it back.

    Args:
        model: a directory, a single safetensors file, or a hub id; or a DCP directory.
        out: a directory (a file, if ``model`` is a file) that does not exist yet; None in place.
        in_place: change the checkpoint itself; what would give a tensor another size, or a name of its own, is refused.
        resize: a vocabulary saved larger in the patch makes the checkpoint's larger.
        rounding, seed, keep_zeros: as ``portllm.apply``; for a copy only.
        dtype: also cast every floating-point tensor; the sum is rounded once, into this dtype.
        overwrite: replace ``out`` if it exists.
        link: shards in which nothing changes become hard links, where the file system can: no copy, but whoever
            writes to one of the two files changes both.
        part: of a DCP checkpoint, the dict of the saved state dict in which the weights lie: "model" for those of
            ``{"model": ..., "optim": ...}``. Needed only where several have weights of the patch's names, such as
            "model" and "ema". All other parts stay as they are.
        group: a process group of torch.distributed (any backend, gloo too), whose processes all make this call and
            then write the shards together, each some of them, on a file system that they share. The patch is read on
            rank 0 and sent to the others, who may give None; it is the same for all then, even if its files change.
        progress: show a bar on stderr (of rank 0's shards).
        Others: as ``portllm.apply``.

    Raises:
        PatchError, PlanError, BackendError: as ``portllm.apply``.
        CheckpointError: the checkpoint is broken, ``out`` exists, or the disk is full or read-only.
        After any error, and after an interrupt, ``out`` is as it was before. An error of one process of a group, or
        its death, is an error of all.
    """
    started = time.perf_counter()
    how = Rounding(rounding, seed, keep_zeros)
    with Ranks(group) as ranks:
        alone = ranks.size == 1
        with ranks.stage():
            _check_options(model, out, in_place=in_place, dtype=dtype, tied=tied, resize=resize, how=how, alone=alone)
        patches = ranks.share(lambda: as_patches(patch, scale))
        path = ranks.share(lambda: resolve(model, what="model", allow=MODEL_FILES))
        survival: dict[str, float] = {}
        with ranks.stage():
            opened, made = plan_checkpoint(
                path, patches, strict=strict, tied=tied, expert_layout=expert_layout, resize=resize, part=part
            )
            if isinstance(opened, DistributedCheckpoint):
                _check_dcp(opened, in_place=in_place, dtype=dtype, tied=tied, resize=resize, how=how)
                made = how.settle(made, opened.target().weights, _no_rows)
                entries, (checkpoint, local) = opened.entries, opened.localise(made)
            else:
                _check_safetensors(opened, made, in_place=in_place, dtype=dtype, alone=alone)
                read, tensors = rows_of(opened, made), opened.target().weights
                made = how.settle(made, tensors, read, dtype)
                survival = survivals(made, tensors, read, dtype)
                made = replace(made, warnings=(*made.warnings, *lost(survival, rounding)))
                if keep_zeros:
                    whole = opened
                    made = with_losses(made, lambda name: whole.read(made.untie.get(name, name)))
                entries, checkpoint, local = len(opened.locations), opened, made
            if out is None:
                return apply_in_place(checkpoint, made, patches, expert_layout, backend, progress)
            job = Job(checkpoint, local, dtype, backend)
            destination, is_file = Path(out), path.is_file()
            if ranks.rank == 0:
                inputs = [checkpoint.path, *(Path(p.name) for p, _ in patches)]
                check_destination(destination, inputs, overwrite, sum(shard.size for shard in job.shards))
        with contextlib.ExitStack() as stack:
            temporary = ranks.share(
                lambda: stack.enter_context(whole_or_absent(destination, overwrite, is_file=is_file))
            )
            with ranks.stage():
                if not temporary.parent.is_dir() or not (is_file or temporary.is_dir()):
                    raise CheckpointError(f"{temporary}: not seen here; OUT must be on a file system that all share")
                mine = [job.shards[i] for i in ranks.mine([shard.size for shard in job.shards])]
                size = sum(t.size for shard in mine for t in shard.tensors)
                with Progress(size, enabled=progress and ranks.rank == 0) as bar:
                    job.write_shards(mine, temporary, bar, link)
            with ranks.stage():
                if ranks.rank == 0 and not is_file:
                    job.write_side_files(temporary)
                stack.close()
    return CheckpointReport(
        out=str(destination),
        shards=len(job.shards),
        tensors_updated=len(made.tensors),
        tensors_copied=entries - sum(name not in made.untie for name in made.stored),
        bytes_read=checkpoint.size,
        bytes_written=sum(shard.size for shard in job.shards),
        seconds=time.perf_counter() - started,
        warnings=(*made.warnings, *lost(job.survival, rounding)),
        survival={**survival, **job.survival},
    )


def rows_of(checkpoint: Checkpoint, plan: Plan) -> ReadRows:
    """Reads some rows of an update's region from disk; those that a resized vocabulary adds are as the last one."""

    def read(update: Update, rows: Sequence[int]) -> Tensor:
        shard, stored = checkpoint.locations[plan.untie.get(update.name, update.name)]
        assert stored.dtype is not None  # bind refuses kinds that torch does not know
        of_matrix = TensorPlan((update,), (), stored.shape)
        first = update.region.rows[0] + (update.region.expert or 0) * (of_matrix.rows // stored.shape[0])
        data = torch.empty(len(rows), of_matrix.columns, dtype=stored.dtype)
        with named_errors(shard.path), open(shard.path, "rb", buffering=0) as file:
            for i, row in enumerate(rows):
                at = min(first + row, of_matrix.rows - 1) * of_matrix.columns * stored.dtype.itemsize
                read_exactly(file.fileno(), memory(data[i]), stored.start + at)
        return data[:, slice(*update.region.columns)]

    return read


def _no_rows(update: Update, rows: Sequence[int]) -> Tensor:
    raise AssertionError("only rounding='auto' asks for rows, which is refused here")


def _check_options(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    in_place: bool,
    dtype: torch.dtype | None,
    tied: Tied,
    resize: bool,
    how: Rounding,
    alone: bool,
) -> None:
    """Refuse what cannot be had together, before anything is read."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype {dtype} must be float64, float32, float16 or bfloat16")
    if in_place:
        wrong = {
            "out": out is not None,
            "dtype": dtype is not None,
            "tied='untie'": tied == "untie",
            "resize": resize,
            "rounding": how.kind != "nearest",
            "keep_zeros": how.keep_zeros,
        }
        if any(wrong.values()):
            named = ", ".join(name for name, given in wrong.items() if given)
            raise CheckpointError(f"{model}: {named} cannot be had in place; write a patched copy (without in_place)")
        if not alone:
            raise CheckpointError(f"{model}: one process alone patches in place; run it without torchrun (or group)")
    elif out is None:
        raise CheckpointError(f"{model}: say where to write the patched copy (out), or in_place=True")


def _check_dcp(
    checkpoint: DistributedCheckpoint,
    *,
    in_place: bool,
    dtype: torch.dtype | None,
    tied: Tied,
    resize: bool,
    how: Rounding,
) -> None:
    """Refuse what would change the layout of a DCP checkpoint."""
    path = checkpoint.path
    if in_place:
        raise CheckpointError(
            f"{path}: a torch.distributed.checkpoint directory is not patched in place; write a patched copy (-o OUT), "
            "and put it in its place"
        )
    wrong = {"dtype": dtype is not None, "tied='untie' (--untie)": tied == "untie", "resize (--resize-vocab)": resize}
    if any(wrong.values()):
        named = ", ".join(name for name, given in wrong.items() if given)
        raise CheckpointError(
            f"{path}: {named} would change the layout of a torch.distributed.checkpoint directory, which is "
            "kept; change the model that is saved to it, or patch a safetensors checkpoint"
        )
    if how.kind == "auto":
        raise CheckpointError(
            f"{path}: rounding='auto' looks at whole rows; say 'nearest' or 'stochastic' (--rounding)"
        )


def _check_safetensors(
    checkpoint: Checkpoint, plan: Plan, *, in_place: bool, dtype: torch.dtype | None, alone: bool
) -> None:
    """Refuse what cannot be had of quantised weights."""
    path = checkpoint.path
    if checkpoint.quantised.weights and dtype is not None:
        raise CheckpointError(f"{path}: is quantised, so dtype={dtype} cannot be had: its scales must stay as they are")
    if plan.quantised and in_place:
        name = min(plan.quantised)
        raise CheckpointError(f"{path}: {name} is quantised and cannot be patched in place; write a patched copy")
    if plan.quantised and not alone:
        name = min(plan.quantised)
        raise CheckpointError(
            f"{path}: {name} is quantised, and its scales may lie in another file than its codes; one process alone "
            "patches it: run it without torchrun (or group)"
        )
