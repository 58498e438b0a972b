"""Checkpoints on disk: stream the shards through the plan, into a copy that is whole or absent."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bind import ExpertLayout, Options, Tied, bind
from .errors import CheckpointError, PlanError
from .execute import execute
from .files import check_destination, copy_range, fsync, named_errors, read_exactly, whole_or_absent, write_all
from .inplace import InPlaceReport, apply_in_place
from .live import Patches, as_patches
from .pieces import TensorPlan, tensor_plans
from .planning import Plan
from .progress import Progress
from .reference import FLOAT_DTYPES
from .shards import DTYPE_NAMES, Checkpoint, Shard, Stored

# Rows of a tensor are read, patched and written in pieces of about this many bytes.
CHUNK_BYTES = 32 << 20
# Weights in other formats, and what belongs to training: stale beside the patched weights, so left behind.
_NOT_COPIED = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".onnx", ".onnx_data", ".tflite",
)  # fmt: skip


@dataclass(frozen=True)
class CheckpointReport:
    """What ``apply_checkpoint`` did; sizes in bytes, time in seconds."""

    out: str
    shards: int
    tensors_updated: int
    tensors_copied: int
    bytes_read: int
    bytes_written: int
    seconds: float
    warnings: tuple[str, ...]

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
) -> tuple[Checkpoint, Plan]:
    """Open a checkpoint and bind the patch to it, reading headers only. Args and errors as ``apply_checkpoint``."""
    patches = as_patches(patch, scale)
    checkpoint = Checkpoint.find(model)
    made = bind(checkpoint.target(), patches, Options(tied, expert_layout, resize))
    try:
        made.check_complete(strict=strict)
    except PlanError as error:
        if "quantization_config" in checkpoint.config:
            raise PlanError(f"{error} ({checkpoint.path} is quantised; patch the 16-bit model instead)") from None
        raise
    return checkpoint, made


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
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    overwrite: bool = False,
    progress: bool = False,
) -> CheckpointReport | InPlaceReport:
    """Write a patched copy of a safetensors checkpoint, or patch it in place; the model is never in memory.

    Peak extra memory is the patch and a few pieces of ``CHUNK_BYTES`` (DoRA over columns: one tensor). Shards,
    their layout and metadata stay as they are; untouched tensors are copied byte for byte; configuration,
    tokenizer and generation files come along. ``out`` appears under its name only when all of it is on disk.

    In place, only the bytes that change are written, on top of patches that were applied so before; the model is then
    what one merge of all of them into the pristine one gives. What takes them off again, to the last bit
    (``portllm.remove_from_checkpoint``), lies beside the checkpoint, in ``.portllm``. After a crash, the next use of
    the checkpoint through portllm completes what was begun, or takes it back.

    Args:
        model: a directory, a single safetensors file, or a hub id.
        out: a directory (a file, if ``model`` is a file) that does not exist yet; None in place.
        in_place: change the checkpoint itself; what would give a tensor another size, or a name of its own, is refused.
        resize: a vocabulary saved larger in the patch makes the checkpoint's larger.
        dtype: also cast every floating-point tensor; the sum is rounded once, into this dtype.
        overwrite: replace ``out`` if it exists.
        progress: show a bar on stderr.
        Others: as ``portllm.apply``.

    Raises:
        PatchError, PlanError, BackendError: as ``portllm.apply``.
        CheckpointError: the checkpoint is broken, ``out`` exists, or the disk is full or read-only.
        After any error, and after an interrupt, ``out`` is as it was before.
    """
    started = time.perf_counter()
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"dtype {dtype} must be float64, float32, float16 or bfloat16")
    patches = as_patches(patch, scale)
    if in_place:
        wrong = {"out": out is not None, "dtype": dtype is not None, "tied='untie'": tied == "untie", "resize": resize}
        if any(wrong.values()):
            named = ", ".join(name for name, given in wrong.items() if given)
            raise CheckpointError(f"{model}: {named} cannot be had in place; write a patched copy (without in_place)")
    elif out is None:
        raise CheckpointError(f"{model}: say where to write the patched copy (out), or in_place=True")
    checkpoint, made = plan_checkpoint(
        model, patches, strict=strict, tied=tied, expert_layout=expert_layout, resize=resize
    )
    if out is None:
        return apply_in_place(checkpoint, made, patches, expert_layout, backend, progress)
    job = _Job(checkpoint, made, dtype, backend)
    destination = Path(out)
    inputs = [checkpoint.path, *(Path(p.name) for p, _ in patches)]
    check_destination(destination, inputs, overwrite, sum(shard.size for shard in job.shards))
    with whole_or_absent(destination, overwrite, is_file=checkpoint.path.is_file()) as temporary:
        with Progress(sum(t.size for shard in job.shards for t in shard.tensors), enabled=progress) as bar:
            job.write_shards(temporary, bar)
        if not checkpoint.path.is_file():
            job.write_side_files(temporary)
    return CheckpointReport(
        out=str(destination),
        shards=len(job.shards),
        tensors_updated=len(made.tensors),
        tensors_copied=len(checkpoint.locations) - len(set(made.tensors) & set(checkpoint.locations)),
        bytes_read=checkpoint.size,
        bytes_written=sum(shard.size for shard in job.shards),
        seconds=time.perf_counter() - started,
        warnings=made.warnings,
    )


@dataclass(frozen=True)
class _Out:
    """One tensor to write: as ``stored`` in the source, but with a kind, shape and name of its own."""

    name: str
    stored: Stored
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def is_cast(self) -> bool:
        return self.dtype != self.stored.dtype

    @property
    def size(self) -> int:
        if not self.is_cast and self.shape == self.stored.shape:
            return self.stored.stop - self.stored.start
        assert self.dtype is not None  # only kinds that torch knows are cast or resized
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class _OutShard:
    name: str
    source: Shard
    header: bytes
    tensors: tuple[_Out, ...]

    @property
    def size(self) -> int:
        return len(self.header) + sum(t.size for t in self.tensors)


class _Job:
    """One run over one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, backend: str) -> None:
        self._checkpoint, self._plan, self._dtype, self._backend = checkpoint, plan, dtype, backend
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._changes = tensor_plans(plan, {name: self._new_shape(name) for name in plan.tensors})
        self.shards = tuple(self._lay_out(shard) for shard in checkpoint.shards)

    def _lay_out(self, shard: Shard) -> _OutShard:
        """The new shard's tensors and header; where nothing changes its form the old header's own bytes."""
        untied: dict[str, list[str]] = {}
        for alias, stored_name in self._plan.untie.items():
            untied.setdefault(stored_name, []).append(alias)
        tensors = [
            self._lay_out_tensor(name, stored)
            for stored in shard.tensors
            for name in (stored.name, *untied.get(stored.name, ()))
        ]
        same = len(tensors) == len(shard.tensors) and all(not t.is_cast and t.shape == t.stored.shape for t in tensors)
        header = _old_header(shard) if same else _new_header(shard, tensors)
        return _OutShard(shard.path.name, shard, header, tuple(tensors))

    def _lay_out_tensor(self, name: str, stored: Stored) -> _Out:
        cast = self._dtype is not None and stored.dtype in FLOAT_DTYPES
        shape = self._changes[name].shape if name in self._changes else stored.shape
        return _Out(name, stored, self._dtype if cast else stored.dtype, shape)

    def write_shards(self, out: Path, bar: Progress) -> None:
        """Write all shards; each is synced to disk while the next one is being written."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            synced = []
            for shard in self.shards:
                path = out if self._checkpoint.path.is_file() else out / shard.name
                self._write_shard(shard, path, bar)
                synced.append(pool.submit(fsync, path))
            for future in synced:
                future.result()

    def _write_shard(self, shard: _OutShard, path: Path, bar: Progress) -> None:
        origin = shard.source.path
        with named_errors(path), open(origin, "rb", buffering=0) as source, open(path, "xb", buffering=0) as out:
            write_all(out.fileno(), memoryview(shard.header))
            for tensor in shard.tensors:
                if tensor.name in self._changes or tensor.is_cast:
                    for piece in self._patched(tensor, source.fileno(), origin):
                        write_all(out.fileno(), piece)
                        bar.update(piece.nbytes)
                else:
                    copy_range(source.fileno(), out.fileno(), tensor.stored.start, tensor.stored.stop, bar.update)

    def _patched(self, tensor: _Out, source: int, path: Path) -> Iterator[memoryview]:
        """The bytes of a tensor that changes, a few rows at a time."""
        stored, dtype = tensor.stored, tensor.stored.dtype
        assert dtype is not None  # bind refuses kinds that torch does not know
        assert tensor.dtype is not None
        if 0 in tensor.shape:
            return
        # Sum in the wider of the two dtypes, so that a cast rounds once.
        work = torch.promote_types(dtype, tensor.dtype)
        change = self._changes.get(tensor.name) or TensorPlan((), (), tensor.shape)
        columns, old_rows = change.columns, change.matrix(stored.shape)[0]
        for start, stop in change.pieces(max(1, CHUNK_BYTES // max(1, columns * dtype.itemsize))):
            piece = self._scratch(stop - start, columns, dtype)
            held = max(0, min(stop, old_rows) - start)
            with named_errors(path):
                read_exactly(source, _bytes(piece[:held]), stored.start + start * columns * dtype.itemsize)
            piece = piece.to(work)
            execute(change.part(start, stop), {tensor.name: piece}, backend=self._backend)
            yield _bytes(piece.to(tensor.dtype))

    def _scratch(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory for a piece, the same for each: fresh pages cost more than the read that fills them."""
        size = rows * columns * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(rows, columns)

    def _new_shape(self, name: str) -> tuple[int, ...]:
        resized = next((a for a in self._plan.assigns if a.name == name and a.resize), None)
        return self._shape(name) if resized is None else tuple(resized.value.shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.locations[self._plan.untie.get(name, name)][1].shape

    def write_side_files(self, out: Path) -> None:
        """Index, configuration, tokenizer and all else that is not weights."""
        directory = self._checkpoint.path
        for path in sorted(directory.rglob("*")):
            relative = path.relative_to(directory)
            if any(p.startswith(".") for p in relative.parts) or not path.is_file() or path.name.endswith(_NOT_COPIED):
                continue
            with named_errors(out / relative):
                (out / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, out / relative)
        if self._checkpoint.index is not None:
            self._write_json(out / self._checkpoint.index.name, self._new_index())
        config = self._new_config()
        if config is not None:
            self._write_json(out / "config.json", config)
        for path in (p for p in out.rglob("*") if p.is_file() and p.suffix != ".safetensors"):
            fsync(path)

    def _write_json(self, path: Path, value: Any) -> None:
        with named_errors(path):
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def _new_index(self) -> Any:
        assert self._checkpoint.index is not None
        index = json.loads(self._checkpoint.index.read_text(encoding="utf-8"))
        for shard in self.shards:
            index["weight_map"].update({tensor.name: shard.name for tensor in shard.tensors})
        if "total_size" in (index.get("metadata") or {}):
            old = sum(s.stop - s.start for _, s in self._checkpoint.locations.values())
            new = sum(tensor.size for shard in self.shards for tensor in shard.tensors)
            if old != new:
                index["metadata"]["total_size"] = new
        return index

    def _new_config(self) -> dict[str, Any] | None:
        """config.json with what changed, or None if it can stay as it is."""
        config: dict[str, Any] = json.loads(json.dumps(dict(self._checkpoint.config)))
        parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        for part in parts:
            if self._dtype is not None:
                for key in {"dtype", "torch_dtype"} & set(part):
                    part[key] = str(self._dtype).removeprefix("torch.")
            if self._plan.untie and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
            for assign in self._plan.assigns:
                if assign.resize and part.get("vocab_size") == self._shape(assign.name)[0]:
                    part["vocab_size"] = len(assign.value)
        return config if config and config != self._checkpoint.config else None


def _old_header(shard: Shard) -> bytes:
    with open(shard.path, "rb") as file:
        return file.read(shard.data_start)


def _new_header(shard: Shard, tensors: list[_Out]) -> bytes:
    header: dict[str, Any] = {} if shard.metadata is None else {"__metadata__": dict(shard.metadata)}
    offset = 0
    for tensor in tensors:
        kind = tensor.stored.kind if not tensor.is_cast else DTYPE_NAMES[tensor.dtype]  # type: ignore[index]
        header[tensor.name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes with spaces
    return struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy's stubs do not say that it is a buffer
    return memoryview(data)
