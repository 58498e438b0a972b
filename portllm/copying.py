"""The copy of a checkpoint: shards laid out, then written as one stream of pieces that are read, patched and cast."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dcp import DCP_METADATA
from .execute import execute
from .files import clone, copy_range, fsync, named_errors, read_exactly, write_at
from .noise import bits, rounded
from .pieces import TensorPlan, memory, tensor_plans
from .planning import Plan
from .progress import Progress
from .quantised import QuantisedPlan, Unit, grouped, survival
from .reference import FLOAT_DTYPES
from .shards import DTYPE_NAMES, Checkpoint, Shard, Stored
from .stream import stream

# Rows of a tensor are read, patched and written in pieces of about this many bytes, of which so many are in memory.
CHUNK_BYTES = 32 << 20
_IN_FLIGHT = 3
# Weights in other formats, and what belongs to training: stale beside the patched weights, so left behind.
_NOT_COPIED = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".h5", ".msgpack",
    ".gguf", ".onnx", ".onnx_data", ".tflite", ".distcp",
)  # fmt: skip


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
    def data_size(self) -> int:
        return sum(t.size for t in self.tensors)

    @property
    def size(self) -> int:
        return len(self.header) + self.data_size


class _File:
    """A shard's new file, and the old one."""

    def __init__(self, shard: _OutShard, path: Path) -> None:
        self._shard, self.source, self.path = shard, shard.source.path, path
        self.descriptors: tuple[int, ...] = ()
        self._checksum = 0
        self._checksums: dict[int, int] = {}  # where in the file -> CRC-32

    def link(self) -> bool:
        """One file with two names; False where that cannot be, as between file systems."""
        try:
            os.link(os.path.realpath(self.source), self.path)
        except OSError:
            return False
        return True

    def create(self, *, share: bool) -> bool:
        """Make the file with its header; returns whether it shares all that the old one holds, if that was asked."""
        with named_errors(self.source):
            self.descriptors = (os.open(self.source, os.O_RDONLY),)
        with named_errors(self.path):
            self.descriptors += (os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666),)
            if share and clone(*self.descriptors):
                return True
            write_at(self.descriptors[1], memoryview(self._shard.header), 0)
        return False

    def count(self, piece: _Piece, data: memoryview) -> None:
        """Keep the checksum of a tensor, if the file has one of it; its pieces come in order."""
        if places := self._shard.source.checksums.get(piece.tensor.name):
            self._checksum = zlib.crc32(data, self._checksum if piece.start else 0)
            if piece.stop == piece.change.rows:
                self._checksums.update(dict.fromkeys(places, self._checksum))

    def finish(self) -> None:
        if self.descriptors:
            with named_errors(self.path):
                for at, checksum in self._checksums.items():
                    write_at(self.descriptors[1], memoryview(struct.pack("<I", checksum)), at)
                os.fsync(self.descriptors[1])
        self.close()

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()


@dataclass(frozen=True)
class _Piece:
    """Rows [start, stop) of a tensor that changes."""

    tensor: _Out
    change: TensorPlan
    start: int
    stop: int


@dataclass(frozen=True)
class _QuantisedPiece:
    """Rows [start, stop) of a quantised weight: codes, and what lies in other places beside them."""

    change: QuantisedPlan
    start: int
    stop: int


# Of a piece: its rows, or, of a quantised one, the elements of each of its tensors.
_Data = Tensor | dict[str, Tensor] | None


@dataclass(frozen=True)
class _Part:
    """``size`` bytes at ``at`` of a new file: those at ``origin`` of the old one, or ``piece``, or done already."""

    file: _File
    at: int
    size: int
    origin: int | None
    piece: _Piece | _QuantisedPiece | None = None
    is_shared: bool = False
    is_last: bool = False

    def joins(self, tensor: _Out, at: int) -> bool:
        """Whether a tensor that stays, to be written at ``at``, follows on this part in both files."""
        return (
            self.origin is not None
            and self.origin + self.size == tensor.stored.start
            and self.at + self.size == at
        )  # fmt: skip

    def write(self, data: Tensor | None, bar: Progress) -> None:
        with named_errors(self.file.path):
            if data is not None and isinstance(self.piece, _Piece):
                write_at(self.file.descriptors[1], memory(data), self.at)
                self.file.count(self.piece, memory(data))
            elif self.origin is not None and not self.is_shared:
                old, new = self.file.descriptors
                copy_range(old, new, self.origin, self.origin + self.size, self.at, bar.update)
                return
        bar.update(self.size)


class Job:
    """One run over one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype | None, backend: str) -> None:
        self._checkpoint, self._dtype, self._backend = checkpoint, dtype, backend
        self._quantised = _QuantisedJob(checkpoint, plan, backend)
        updates = tuple(update for update in plan.updates if update.name not in plan.quantised)
        plan = self._plan = replace(plan, updates=updates, quantised={})
        self._memory = [torch.empty(0, dtype=torch.uint8) for _ in range(_IN_FLIGHT)]
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

    @property
    def survival(self) -> dict[str, float]:
        return self._quantised.survival

    def write_shards(self, shards: Sequence[_OutShard], out: Path, bar: Progress, link: bool) -> None:
        """Write some shards, as one stream of pieces; each shard is synced while the next one is being written."""
        single = self._checkpoint.path.is_file()
        with contextlib.ExitStack() as stack:
            parts: list[_Part] = []
            for shard in shards:
                file = _File(shard, out if single else out / shard.name)
                stack.callback(file.close)
                parts += self._parts(shard, file, link)
            syncer = stack.enter_context(ThreadPoolExecutor(1))  # last, so that it ends before files are closed
            synced: list[Future[None]] = []

            late = self._quantised.late_files()

            def write(made: tuple[_Part, _Data]) -> None:
                part, data = made
                if isinstance(part.piece, _QuantisedPiece) and isinstance(data, dict):
                    self._quantised.write(part.piece, data)
                    bar.update(part.size)
                else:
                    assert not isinstance(data, dict)
                    part.write(data, bar)
                if part.is_last and part.file not in late:
                    synced.append(syncer.submit(part.file.finish))

            stream(parts, self._read, self._compute, write, _IN_FLIGHT)
            synced += (syncer.submit(file.finish) for file in late)
            for future in synced:
                future.result()

    def _parts(self, shard: _OutShard, file: _File, link: bool) -> list[_Part]:
        """What is to be written to a shard's file, which is made: runs of tensors that stay, pieces of the others."""
        quantised = self._quantised
        changing = [t for t in shard.tensors if t.name in self._changes or t.name in quantised.parts or t.is_cast]
        same = shard.header == _old_header(shard.source)
        if same and link and not changing and file.link():
            return [_Part(file, 0, shard.data_size, None)]
        is_shared = file.create(share=same and len(changing) < len(shard.tensors))
        parts: list[_Part] = []
        at = len(shard.header)
        for tensor in shard.tensors:
            if tensor.name in quantised.parts:
                parts += quantised.pieces(tensor, file, at)
            elif tensor in changing:
                parts += self._pieces(tensor, file, at)
            elif parts and parts[-1].joins(tensor, at):
                parts[-1] = replace(parts[-1], size=parts[-1].size + tensor.size)
            else:
                parts.append(_Part(file, at, tensor.size, tensor.stored.start, is_shared=is_shared))
            at += tensor.size
        return [*parts[:-1], replace(parts[-1], is_last=True)] if parts else [_Part(file, at, 0, None, is_last=True)]

    def _pieces(self, tensor: _Out, file: _File, at: int) -> Iterator[_Part]:
        """A tensor that changes, a few rows at a time."""
        if 0 in tensor.shape:
            return
        assert tensor.stored.dtype is not None  # bind refuses kinds that torch does not know
        assert tensor.dtype is not None
        change = self._changes.get(tensor.name) or TensorPlan((), (), tensor.shape)
        row = change.columns * tensor.dtype.itemsize
        for start, stop in change.pieces(max(1, CHUNK_BYTES // max(1, change.columns * tensor.stored.dtype.itemsize))):
            yield _Part(file, at + start * row, (stop - start) * row, None, piece=_Piece(tensor, change, start, stop))

    def _read(self, part: _Part, turn: int) -> tuple[_Part, _Data]:
        if part.piece is None:
            return part, None
        if isinstance(part.piece, _QuantisedPiece):
            return part, self._quantised.read(part.piece)
        stored, change, start, stop = part.piece.tensor.stored, part.piece.change, part.piece.start, part.piece.stop
        assert stored.dtype is not None
        rows = self._scratch(turn, stop - start, change.columns, stored.dtype)
        held = max(0, min(stop, change.matrix(stored.shape)[0]) - start)
        with named_errors(part.file.source):
            read_exactly(
                part.file.descriptors[0],
                memory(rows[:held]),
                stored.start + start * change.columns * stored.dtype.itemsize,
            )
        return part, rows

    def _compute(self, read: tuple[_Part, _Data]) -> tuple[_Part, _Data]:
        part, rows = read
        if isinstance(rows, dict):
            assert isinstance(part.piece, _QuantisedPiece)
            self._quantised.compute(part.piece, rows)
            return read
        if part.piece is None or rows is None:
            return read
        assert isinstance(part.piece, _Piece)
        tensor = part.piece.tensor
        assert tensor.dtype is not None
        # Sum in the wider of the two dtypes, so that a cast rounds once.
        rows = rows.to(torch.promote_types(rows.dtype, tensor.dtype))
        plan = part.piece.change.part(part.piece.start, part.piece.stop)
        execute(plan, {tensor.name: rows}, backend=self._backend)
        return part, _cast(rows, tensor.dtype, plan)

    def _scratch(self, turn: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory for a piece, used again: fresh pages cost more than the read that fills them."""
        size = rows * columns * dtype.itemsize
        if self._memory[turn].numel() < size:
            self._memory[turn] = torch.empty(size, dtype=torch.uint8)
        return self._memory[turn][:size].view(dtype).view(rows, columns)

    def _new_shape(self, name: str) -> tuple[int, ...]:
        resized = next((a for a in self._plan.assigns if a.name == name and a.resize), None)
        return self._shape(name) if resized is None else tuple(resized.value.shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.locations[self._plan.untie.get(name, name)][1].shape

    def write_side_files(self, out: Path) -> None:
        """Index, configuration, tokenizer and all else that is not weights."""
        directory = self._checkpoint.path
        shards = {shard.name for shard in self.shards}
        for path in sorted(directory.rglob("*")):
            relative = path.relative_to(directory)
            is_hidden = any(p.startswith(".") for p in relative.parts) and str(relative) != DCP_METADATA
            if is_hidden or not path.is_file() or path.name.endswith(_NOT_COPIED) or str(relative) in shards:
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


class _QuantisedJob:
    """The quantised weights of a run: their codes are the pieces, and scales are read and written along with them.

    Attributes:
        parts: names of all tensors that change.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, backend: str) -> None:
        self._checkpoint, self._backend = checkpoint, backend
        own: dict[str, list[Unit]] = {name: [] for name in plan.quantised}
        for unit in grouped(plan.updates, plan.quantised):
            own[unit.weight.name].append(unit)
        self._changes = {weight.codes: QuantisedPlan(weight, own[name]) for name, weight in plan.quantised.items()}
        self.parts = {part for weight in plan.quantised.values() for part in weight.parts}
        self._global_scales = {
            name: weight.global_scales(checkpoint.read_stored) for name, weight in plan.quantised.items()
        }
        self._tables = {
            weight.nested.table: checkpoint.read_stored(weight.nested.table)
            for weight in plan.quantised.values()
            if weight.nested is not None
        }
        self._places: dict[str, tuple[_File, int]] = {}
        self._sums: dict[str, Tensor] = {}

    @property
    def survival(self) -> dict[str, float]:
        return {name: survival(sums) for name, sums in self._sums.items()}

    def pieces(self, tensor: _Out, file: _File, at: int) -> Iterator[_Part]:
        """Of codes their pieces; other tensors are written with the codes that they belong to."""
        self._places[tensor.name] = file, at
        change = self._changes.get(tensor.name)
        if change is None or tensor.size == 0:
            yield _Part(file, at, tensor.size, None)
            return
        rows = change.weight.rows
        for start, stop in change.pieces(max(1, CHUNK_BYTES * rows // tensor.size)):
            low, high = change.weight.spans(start, stop)[tensor.name]  # codes are bytes
            yield _Part(file, at + low, high - low, None, piece=_QuantisedPiece(change, start, stop))

    def late_files(self) -> set[_File]:
        """Files that are written to while another one is being walked through."""
        late: set[_File] = set()
        for change in self._changes.values():
            files = {self._places[part][0] for part in change.weight.parts}
            late |= files if len(files) > 1 else set()
        return late

    def read(self, piece: _QuantisedPiece) -> dict[str, Tensor]:
        found = {}
        for name, file, dtype, (low, high), _ in self._spans(piece):
            data = torch.empty((high - low) * dtype.itemsize, dtype=torch.uint8)
            start = self._checkpoint.locations[name][1].start
            with named_errors(file.source):
                read_exactly(file.descriptors[0], memory(data), start + low * dtype.itemsize)
            found[name] = data.view(dtype)
        return found

    def compute(self, piece: _QuantisedPiece, data: dict[str, Tensor]) -> None:
        name = piece.change.weight.name
        parts = {**self._tables, **data}
        sums = piece.change.run(parts, piece.start, piece.stop, self._global_scales[name], self._backend)
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def write(self, piece: _QuantisedPiece, data: dict[str, Tensor]) -> None:
        for name, file, dtype, (low, _), at in self._spans(piece):
            with named_errors(file.path):
                write_at(file.descriptors[1], memory(data[name]), at + low * dtype.itemsize)

    def _spans(self, piece: _QuantisedPiece) -> Iterator[tuple[str, _File, torch.dtype, tuple[int, int], int]]:
        """Each tensor of the piece, its file and dtype, the elements that are the piece's, and its place."""
        for name, span in piece.change.weight.spans(piece.start, piece.stop).items():
            dtype = self._checkpoint.locations[name][1].dtype
            assert dtype is not None  # a kind that torch does not know is no part of a weight
            yield name, self._places[name][0], dtype, span, self._places[name][1]


def _old_header(shard: Shard) -> bytes:
    with open(shard.path, "rb") as file:
        return file.read(shard.data_start)


def _cast(rows: Tensor, dtype: torch.dtype, plan: Plan) -> Tensor:
    """To another dtype; by chance where a sum, until then in a wider one, is to be rounded so."""
    if rows.dtype == dtype:
        return rows
    made = rows.to(dtype)
    for update in plan.updates:
        if update.noise is not None:
            view = update.region.view(rows)
            random = bits(update.mode, slice(0, len(view)), view.shape[1])
            update.region.view(made).copy_(rounded(view.float(), dtype, random))
    return made


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
