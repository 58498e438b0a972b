"""What lies beside a checkpoint that was patched in place: all that takes the patches off again, to the last bit.

``MODEL/.portllm`` (``.FILE.portllm`` beside a checkpoint of a single FILE) holds

- ``state.json``: the patches in the order in which they were added, each with its strength and its directory; the
  options they were bound with; of each changed file its size, its times before and after, and its records' file.
- ``patches/*``: the patches, as PEFT adapter directories.
- ``records/*.safetensors``: one for each changed file. ``__metadata__["portllm.pieces"]`` is a JSON list of ``Piece``;
  the tensors ``<piece>.<part>`` are the parts of ``portllm.record.Record`` (``<region>.lengths``, ``<region>.data``) of
  each of the piece's regions, and ``kept``: the rows that no record is for (values that were replaced, DoRA), as they
  were. All are bytes (U8); lengths that are smaller so are compressed by zlib.
- ``lock``: locked by whoever changes the checkpoint; ``log`` and ``redo-*``: its journal (``portllm/journal.py``).

A new ``state.json`` takes the place of the old one when all that it speaks of is on disk: that ends an operation.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bind import ExpertLayout
from .config import CONFIG_NAME
from .errors import CheckpointError
from .files import copy_range, fsync, locked, named_errors, read_exactly, undo_directory, write_all, write_json
from .journal import LOG, discard
from .patch import Patch
from .record import Record
from .shards import read_shard

_STATE, _PIECES = "state.json", "portllm.pieces"
_VERSION = 1


@dataclass(frozen=True)
class Active:
    """A patch that is applied: ``directory`` is below the store; ``applied`` is a time (ISO 8601, UTC)."""

    name: str
    directory: str
    strength: float
    ranks: tuple[int, ...]
    applied: str
    source: str


@dataclass(frozen=True)
class Changed:
    """A file that was changed: times (ns) before the first patch and after the last; its records' file, if any."""

    size: int
    mtime_before: int
    mtime: int
    records: str | None


@dataclass(frozen=True)
class State:
    """What is applied; ``generation`` counts the operations."""

    generation: int = 0
    patches: tuple[Active, ...] = ()
    expert_layout: ExpertLayout | None = None
    files: dict[str, Changed] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Some rows of a tensor that were changed, and what their undo information is.

    Attributes:
        tensor: its name.
        begin, end: bytes within the tensor.
        columns: the piece is a matrix of so many.
        before, after: digests (``portllm.sums``) of its bytes without any patch, and as they are now.
        regions: [row, row end, column, column end] of each record, within the piece.
        by: who summed each (``Record.by``).
        kept: [row, row end] of the rows that are kept as they were.
        parts: (name, bytes as stored, bytes when unpacked), one after the other.
    """

    tensor: str
    begin: int
    end: int
    columns: int
    before: str
    after: str
    regions: tuple[tuple[int, int, int, int], ...]
    by: tuple[str, ...]
    kept: tuple[tuple[int, int], ...]
    parts: tuple[tuple[str, int, int], ...]

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Piece:
        lists = {key: tuple(tuple(item) for item in raw[key]) for key in ("regions", "kept", "parts")}
        return cls(**{**raw, **lists, "by": tuple(raw["by"])})

    @property
    def stored_bytes(self) -> int:
        return sum(stored for _, stored, _ in self.parts)


@dataclass(frozen=True)
class Undo:
    """A piece, and where its parts are to be read."""

    piece: Piece
    read: Callable[[int, int], memoryview]  # offset within the piece's parts, size
    copy: Callable[[int, int], None]  # copies all parts to a file, at an offset

    def load(self) -> tuple[list[Record], memoryview]:
        """The records of its regions, and the rows that were kept; raises CheckpointError."""
        parts: dict[str, memoryview] = {}
        offset = 0
        for name, stored, size in self.piece.parts:
            data = self.read(offset, stored)
            try:
                parts[name] = data if stored == size else memoryview(zlib.decompress(data))
            except zlib.error as error:
                raise CheckpointError(f"{self.piece.tensor}: its undo record is broken: {error}") from None
            offset += stored
        records = [
            Record(_tensor(parts[f"{i}.lengths"], torch.int16), _tensor(parts[f"{i}.data"], torch.uint8), by)
            for i, by in enumerate(self.piece.by)
        ]
        return records, parts.get("kept", memoryview(b""))


def pack(records: Sequence[Record], kept: memoryview) -> tuple[tuple[tuple[str, int, int], ...], list[memoryview]]:
    """``Piece.parts`` of records and kept rows, and the bytes of each."""
    raw = [(f"{i}.{k}", _buffer(getattr(r, k))) for i, r in enumerate(records) for k in ("lengths", "data")]
    if kept:
        raw.append(("kept", kept))
    parts, buffers = [], []
    for name, data in raw:
        # Lengths shrink to 40 % of a seventh of a record. The rest shrinks by 15 %, at 50 MB/s: that does not pay.
        packed = memoryview(zlib.compress(data, 1)) if name.endswith(".lengths") else data
        chosen = packed if packed.nbytes < data.nbytes else data
        parts.append((name, chosen.nbytes, data.nbytes))
        buffers.append(chosen)
    return tuple(parts), buffers


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    # torch.frombuffer warns of memory that cannot be written, and does not take empty buffers.
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _buffer(tensor: Tensor) -> memoryview:
    data: Any = tensor.contiguous().view(torch.uint8).numpy()
    return memoryview(data)


class Store:
    """The directory beside one checkpoint."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.path = undo_directory(model)

    @property
    def pending(self) -> bool:
        """Whether an operation was cut short (or is going on)."""
        return (self.path / LOG).exists()

    def file(self, name: str) -> Path:
        """One of the checkpoint's files."""
        return self.model / name if self.model.is_dir() else self.model

    def state(self) -> State:
        """What is applied; raises CheckpointError if that cannot be read."""
        path = self.path / _STATE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw.pop("version") != _VERSION:
                raise ValueError("it is of another version of portllm")
            patches = [Active(**{**p, "ranks": tuple(p["ranks"])}) for p in raw.pop("patches")]
            files = {name: Changed(**changed) for name, changed in raw.pop("files").items()}
            return State(patches=tuple(patches), files=files, **raw)
        except FileNotFoundError:
            return State()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the checkpoint meanwhile; the directory goes again if it is not needed."""
        with named_errors(self.path):
            self.path.mkdir(exist_ok=True)
            with locked(self.path / "lock"):
                try:
                    yield
                finally:
                    with contextlib.suppress(CheckpointError):
                        self.collect()

    def commit(self, state: State) -> None:
        """The operation is done: ``state`` is what holds from here on. Raises OSError."""
        write_json(self.path / _STATE, {"version": _VERSION, **asdict(state)})
        discard(self.path)

    def collect(self) -> None:
        """Delete what nothing speaks of (not while an operation is pending)."""
        if self.pending:
            return
        state = self.state()
        discard(self.path)
        needed = {p.directory for p in state.patches} | {c.records for c in state.files.values() if c.records}
        for path in [*self.path.glob("patches/*"), *self.path.glob("records/*")]:
            if str(path.relative_to(self.path)) not in needed:
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        if not state.patches:
            for name in ("patches", "records"):
                with contextlib.suppress(OSError):
                    (self.path / name).rmdir()
            for name in (f"{_STATE}.new", _STATE, "lock"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    # -- patches -----------------------------------------------------------------------------------------------------

    def load(self, active: Active) -> Patch:
        """Read an active patch; raises PatchError."""
        path = self.path / active.directory
        with named_errors(path):
            settings = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        return Patch.load(path, ignore_settings=tuple(settings))  # what was refused was refused when it was applied

    def save(self, patch: Patch, directory: str) -> None:
        """Keep a patch, synced to disk; raises OSError."""
        path = self.path / directory
        shutil.rmtree(path, ignore_errors=True)
        patch.save(path)
        for part in (*path.iterdir(), path, path.parent, self.path):
            fsync(part)

    # -- records -----------------------------------------------------------------------------------------------------

    def undo(self, changed: Changed) -> list[Undo]:
        """The pieces of a changed file; raises CheckpointError."""
        if changed.records is None:
            return []
        path = self.path / changed.records
        shard = read_shard(path)
        places = {stored.name: stored for stored in shard.tensors}
        try:
            pieces = [Piece.from_dict(raw) for raw in json.loads((shard.metadata or {})[_PIECES])]
            starts = [places[f"{i}.{p.parts[0][0]}"].start if p.parts else 0 for i, p in enumerate(pieces)]
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: not a file of undo records: {error!r}") from None
        return [
            Undo(piece, partial(_read, path, start), partial(_copy, path, start, piece.stored_bytes))
            for piece, start in zip(pieces, starts, strict=True)
        ]

    def write_records(self, name: str, undos: Sequence[Undo]) -> int:
        """Write the pieces of one file, synced to disk; returns the bytes. Raises OSError."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        pieces = json.dumps([asdict(undo.piece) for undo in undos], separators=(",", ":"))
        header: dict[str, Any] = {"__metadata__": {_PIECES: pieces}}
        offset = 0
        for i, undo in enumerate(undos):
            for part, stored, _ in undo.piece.parts:
                header[f"{i}.{part}"] = {"dtype": "U8", "shape": [stored], "data_offsets": [offset, offset + stored]}
                offset += stored
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write_all(descriptor, memoryview(struct.pack("<Q", len(text)) + text))
            at = 8 + len(text)
            for undo in undos:
                undo.copy(descriptor, at)
                at += undo.piece.stored_bytes
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        for directory in (path.parent, self.path):
            fsync(directory)
        return 8 + len(text) + offset


def _read(path: Path, start: int, offset: int, size: int) -> memoryview:
    data = memoryview(bytearray(size))
    with named_errors(path), open(path, "rb", buffering=0) as file:
        read_exactly(file.fileno(), data, start + offset)
    return data


def _copy(path: Path, start: int, size: int, out: int, to: int) -> None:
    with named_errors(path), open(path, "rb", buffering=0) as file:
        copy_range(file.fileno(), out, start, start + size, to)
