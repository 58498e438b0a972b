"""torch.distributed.checkpoint (DCP) directories: which box of which tensor lies where in which file.

A DCP directory has a file or more for each rank that wrote it (``__0_0.distcp``), each with serialised objects one
after the other, and ``.metadata``, a pickle that says where each one lies: the chunks of tensors, boxes that together
make the whole, and all else as bytes. A chunk is what ``torch.save`` writes (a zip archive that holds the numbers as
they are), or the objects of a file end with one safetensors archive of its chunks. HuggingFaceStorageWriter with
``save_distributed`` writes safetensors files alone, whose headers say where in the whole their tensors begin.

Nothing is loaded: the numbers' places in the files are found, and what does not change stays as it is, byte for byte.
"""

from __future__ import annotations

import enum
import io
import json
import math
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor

from .bind import Target
from .errors import CheckpointError, PlanError
from .files import named_errors, read_exactly
from .naming import VOCABULARY_LAYERS, tied_names
from .planning import Plan, Update
from .sharding import Piece, localise
from .shards import DTYPE_NAMES, DTYPES, Checkpoint, Shard, Stored, read_config, read_shard

DCP_METADATA = ".metadata"
_SHARDING = "DCP_SHARDING_INFO"  # torch's key in a safetensors header: where each tensor begins in the whole one
# What a sound .metadata is made of; anything else in a pickle may be code that runs when it is read.
_PICKLED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in vars(torch).values()
                        if isinstance(dtype, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip


def is_dcp(path: Path) -> bool:
    """Whether a directory holds what torch.distributed.checkpoint writes, sound or not."""
    if not path.is_dir():
        return False
    if (path / DCP_METADATA).is_file() or next(path.glob("*.distcp"), None) is not None:
        return True
    return next(path.glob("shard-*-model-*-of-*.safetensors"), None) is not None and not any(
        path.glob("*.safetensors.index.json")
    )


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the bytes of a file that hold it.

    Attributes:
        start, shape: the box's first index in the whole tensor, and its size, for each dimension.
        file: where it lies.
        offset, length: bytes of the file: the serialised chunk.
        form: "zip" or "safetensors", or "unknown".
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int
    form: str


@dataclass(frozen=True)
class Whole:
    """A tensor of the checkpoint: ``name`` as saved, nested names joined with dots."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    """Those that hold anything."""

    def chunk_name(self, chunk: Chunk) -> str:
        """A name for one chunk: ``weight[0:4, 0:8]``."""
        box = ", ".join(f"{first}:{first + size}" for first, size in zip(chunk.start, chunk.shape, strict=True))
        return f"{self.name}[{box}]"


@dataclass(frozen=True)
class DistributedCheckpoint:
    """A DCP directory, of which one part holds the weights.

    Attributes:
        path: the directory.
        files: the data files, and their sizes.
        parts: the dicts of the saved state dict that could be a model's: their dotted path ("" for the state dict
            itself) -> the names in it -> the tensors. An optimizer's are none: the tensors of its state have no dotted
            names there, or such that no patch has (``state.layers.0.weight.exp_avg``).
        entries: how many objects it holds.
        config: config.json ({} if there is none).
        part: that which is to be patched.
    """

    path: Path
    files: Mapping[str, int]
    parts: Mapping[str, Mapping[str, Whole]]
    entries: int
    config: Mapping[str, Any]
    part: str = ""

    @classmethod
    def open(cls, path: Path) -> DistributedCheckpoint:
        """Read what describes the checkpoint, and check that all of its files are there.

        Raises:
            CheckpointError: no ``.metadata``, or one that is not sound; a file that is missing or too short; chunks
                that do not make their tensor.
        """
        config = read_config(path / "config.json") if (path / "config.json").is_file() else {}
        entries, paths = _from_metadata(path) if _is_pickled(path) else _from_headers(path)
        files = {file: os.path.getsize(path / file) for file in sorted({e.file for e in entries})}
        parts: dict[str, dict[str, Whole]] = {}
        for tensor in _wholes(path, entries):
            *parents, name = paths.get(tensor.name, (tensor.name,))
            parts.setdefault(".".join(map(str, parents)), {})[str(name)] = tensor
        models = {part: tensors for part, tensors in parts.items() if any("." in name for name in tensors)}
        return cls(path, files, models, len({e.name for e in entries}), config)

    def choose(self, part: str) -> DistributedCheckpoint:
        """The same, of which another part is to be patched; raises CheckpointError if there is no such part."""
        if part not in self.parts:
            raise CheckpointError(f"{self.path}: no part {part!r} with tensors in it; it has {quoted(self.parts)}")
        return replace(self, part=part)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(self.files.values())

    @property
    def tensors(self) -> Mapping[str, Whole]:
        """Those of the part that is to be patched, by their names in it."""
        return self.parts[self.part]

    def target(self) -> Target:
        """The part as a target to bind to: whole meta tensors."""
        tensors = {
            name: torch.empty(t.shape, dtype=t.dtype, device="meta")
            for name, t in self.tensors.items()
            if name not in self._tied
        }
        return Target(tensors, self._tied, Checkpoint(self.path, (), None, self.config).transposed)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """Names of tied vocabulary weights -> the name that they are known by.

        A state dict holds a tied weight under each of its names, and so does the checkpoint: names that may be tied,
        and that hold the same numbers in the same boxes, are.
        """
        found = {}
        for name in filter(lambda n: VOCABULARY_LAYERS.match(n.removesuffix(".weight")), self.tensors):
            source = tied_names(self.tensors.keys() - {name}).get(name)
            if source is not None and self._is_same(self.tensors[source], self.tensors[name]):
                found[name] = source
        return found

    def _is_same(self, a: Whole, b: Whole) -> bool:
        boxes = [{(c.start, c.shape): c for c in tensor.chunks} for tensor in (a, b)]
        return (a.shape, a.dtype) == (b.shape, b.dtype) and boxes[0].keys() == boxes[1].keys() and all(
            torch.equal(self._read(a, chunk).view(torch.uint8), self._read(b, boxes[1][box]).view(torch.uint8))
            for box, chunk in boxes[0].items()
        )  # fmt: skip

    def read(self, name: str) -> Tensor:
        """One whole tensor, read from disk."""
        tensor = self.tensors[name]
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            box = tuple(slice(first, first + size) for first, size in zip(chunk.start, chunk.shape, strict=True))
            whole[box] = self._read(tensor, chunk)
        return whole

    def _read(self, tensor: Whole, chunk: Chunk) -> Tensor:
        place = _locate(self.path, tensor, chunk)
        data = bytearray(place.stop - place.start)
        with _opened(self.path / chunk.file) as file, named_errors(self.path / chunk.file):
            read_exactly(file.fileno(), memoryview(data), place.start)
        return torch.frombuffer(data, dtype=tensor.dtype).view(chunk.shape)

    def localise(self, plan: Plan) -> tuple[Checkpoint, Plan]:
        """The files as shards in which each chunk that changes is a tensor, and the plan for these tensors.

        Raises:
            CheckpointError: a chunk that changes is compressed, not stored row by row, or broken.
            PlanError: DoRA needs the norms of vectors that are cut between chunks.
        """
        stored_as = {name: [name, *(n for n, source in self._tied.items() if source == name)] for name in plan.tensors}
        pieces: dict[str, list[Piece]] = {}
        chunks: dict[str, tuple[Whole, Chunk]] = {}
        for name, names in stored_as.items():
            for tensor, chunk in ((self.tensors[n], chunk) for n in names for chunk in self.tensors[n].chunks):
                own = tensor.chunk_name(chunk)
                pieces.setdefault(name, []).append(Piece(own, (0,) * len(chunk.start), chunk.start, chunk.shape))
                chunks[own] = tensor, chunk
        for update in plan.updates:
            self._check_box(update)
        local = localise(plan, pieces)
        stored: dict[str, list[tuple[Stored, tuple[int, ...]]]] = {file: [] for file in self.files}
        for own in local.tensors:
            tensor, chunk = chunks[own]
            place = _locate(self.path, tensor, chunk)
            moved = Stored(own, DTYPE_NAMES[tensor.dtype], chunk.shape, place.start, place.stop)
            stored[chunk.file].append((moved, place.checksums))
        shards = tuple(_as_shard(self.path / file, size, stored[file]) for file, size in self.files.items())
        return Checkpoint(self.path, shards, None, self.config), local

    def _check_box(self, update: Update) -> None:
        """Refuse an update whose chunks cut through what must be whole."""
        tensor = self.tensors[update.name]
        first = 0 if update.region.expert is None else 1  # the dimension that rows are
        over_rows = any(t.magnitude is not None and t.magnitude_axis == 0 for t in update.terms)
        over_columns = any(t.magnitude is not None and t.magnitude_axis == 1 for t in update.terms)
        for chunk in tensor.chunks:
            is_whole = [size == whole for size, whole in zip(chunk.shape, tensor.shape, strict=True)]
            if not all(is_whole[first + 2 :]):
                raise CheckpointError(
                    f"{tensor.chunk_name(chunk)}: cut along a convolution's kernel; save the model with shards of rows"
                )
            if (over_rows and not all(is_whole[first + 1 :])) or (over_columns and not is_whole[first]):
                raise PlanError(
                    f"{update.sources[0]}: DoRA needs the norms of whole vectors of {update.name}, but the chunk "
                    f"{tensor.chunk_name(chunk)} cuts through them; save it with shards of "
                    f"{'rows' if over_rows else 'columns'}, or patch a safetensors checkpoint"
                )


@dataclass(frozen=True)
class _Entry:
    """One object in a file: of a tensor a chunk; ``dtype`` is None for all else."""

    name: str
    file: str
    offset: int
    length: int
    dtype: torch.dtype | None = None
    whole: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    form: str = "unknown"


@dataclass(frozen=True)
class _Place:
    """Where the numbers of a chunk lie in its file, [start, stop), and where their CRC-32 stands."""

    start: int
    stop: int
    checksums: tuple[int, ...] = ()


def quoted(parts: Mapping[str, Any]) -> str:
    """Names of parts, for messages; that of the state dict itself is empty."""
    return ", ".join(repr(part) for part in parts) or "none"


def _is_pickled(path: Path) -> bool:
    return next(path.glob("*.distcp"), None) is not None or (path / DCP_METADATA).is_file()


# -- .metadata -------------------------------------------------------------------------------------------------------


class _Checker(pickle.Unpickler):
    """Reads a pickle that is made of nothing but DCP's own classes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # some versions of Python pickle an enum's member so
        if name not in _PICKLED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a DCP checkpoint")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Any:
    if not (isinstance(of, type) and issubclass(of, enum.Enum)):
        raise pickle.UnpicklingError(f"it asks for {name} of {of}, which is no part of a DCP checkpoint")
    return of[name]


def _read_metadata(path: Path) -> Any:
    """torch's Metadata; its pickle is first read by one that takes DCP's classes only, so that nothing else can run."""
    file = path / DCP_METADATA
    if not file.is_file():
        each = next(path.glob(f"__*{DCP_METADATA}"), None)
        why = "the save was cut short, or some of its files were left behind; save or copy it again"
        if each is not None:
            why = f"only {each.name} and such, one for each rank; save it with use_collectives=True"
        raise CheckpointError(f"{path}: holds .distcp files, but no {DCP_METADATA}: {why}")
    try:
        from torch.distributed.checkpoint.filesystem import FileSystemReader
    except ImportError as error:
        raise CheckpointError(f"{path}: this torch cannot read DCP checkpoints: {error}") from None
    try:
        with open(file, "rb") as stream:
            _Checker(stream).load()
        return FileSystemReader(path).read_metadata()
    except Exception as error:  # a broken pickle can raise anything
        raise CheckpointError(f"{file}: not sound metadata of a DCP checkpoint: {error}") from None


def _from_metadata(path: Path) -> tuple[list[_Entry], Mapping[str, tuple[Any, ...]]]:
    """All objects that the metadata speak of, and the path of each in the state dict that was saved."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

    metadata = _read_metadata(path)
    file = path / DCP_METADATA
    described, stored, paths = metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise CheckpointError(f"{file}: does not say what is stored and where; was it written by another storage?")
    if not _is_paths(paths):
        raise CheckpointError(
            f"{file}: planner data of an unknown kind ({type(paths).__name__}), so its names mean nothing here; "
            "save the model with torch's DefaultSavePlanner"
        )
    entries = []
    for name, about in described.items():
        if isinstance(about, BytesStorageMetadata):
            entries.append(_entry(path, name, stored.get(MetadataIndex(name))))
        elif isinstance(about, TensorStorageMetadata):
            for chunk in about.chunks:
                start, shape = tuple(chunk.offsets), tuple(chunk.sizes)
                entry = _entry(path, name, stored.get(MetadataIndex(name, start)))
                whole = tuple(about.size)
                entries.append(replace(entry, dtype=about.properties.dtype, whole=whole, start=start, shape=shape))
        else:
            raise CheckpointError(f"{file}: {name} is of an unknown kind ({type(about).__name__})")
    return entries, paths or {}


def _is_paths(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(
            isinstance(name, str) and isinstance(path, tuple) and path and all(isinstance(p, str | int) for p in path)
            for name, path in value.items()
        )
    )


def _entry(path: Path, name: str, place: Any) -> _Entry:
    """The place of an object, checked against the file that it is said to be in."""
    metadata = path / DCP_METADATA
    place_of: Any = [getattr(place, key, None) for key in ("relative_path", "offset", "length")]
    file, offset, length = place_of
    is_place = isinstance(file, str) and isinstance(offset, int) and isinstance(length, int)
    if not is_place or min(offset, length) < 0:
        raise CheckpointError(f"{metadata}: does not say where {name} is stored; was it written by another storage?")
    if PurePosixPath(file).name != file or file in (".", "..", DCP_METADATA):
        raise CheckpointError(f"{metadata}: {name} is in {file!r}, which is not a file in the checkpoint's directory")
    if not os.path.isfile(path / file):
        raise CheckpointError(f"{path / file}: missing, but holds {name}; copy it again")
    size = os.path.getsize(path / file)
    if size < offset + length:
        raise CheckpointError(
            f"{path / file}: ends at byte {size}, but {name} ends at {offset + length}; copy it again"
        )  # fmt: skip
    form = "packed" if getattr(place, "transform_descriptors", None) else "unknown"
    return _Entry(name, file, offset, length, form=form)


# -- safetensors files alone -----------------------------------------------------------------------------------------


def _from_headers(path: Path) -> tuple[list[_Entry], Mapping[str, tuple[Any, ...]]]:
    """As ``_from_metadata``, where each tensor is as large as its farthest chunk, as torch reads it."""
    entries = []
    for file in sorted(path.glob("*.safetensors")):
        shard = read_shard(file)
        starts = _starts(file, shard.metadata)
        for stored in shard.tensors:
            if stored.dtype is None:
                raise CheckpointError(f"{file}: {stored.name} is of kind {stored.kind}, which torch does not have")
            start, length = starts.get(stored.name, (0,) * len(stored.shape)), stored.stop - stored.start
            entry = _Entry(stored.name, file.name, stored.start, length, stored.dtype, form="safetensors")
            entries.append(replace(entry, start=start, shape=stored.shape))
    sizes: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        end = tuple(map(sum, zip(entry.start, entry.shape, strict=True)))
        sizes[entry.name] = tuple(map(max, zip(end, sizes.get(entry.name, end), strict=True)))
    return [replace(entry, whole=sizes[entry.name]) for entry in entries], {}


def _starts(file: Path, metadata: Mapping[str, str] | None) -> dict[str, tuple[int, ...]]:
    """Where each tensor of a safetensors file begins in the whole one, from torch's note in the header."""
    try:
        noted = json.loads((metadata or {})[_SHARDING])
        return {name: tuple(int(first) for first in about["saved_offsets"]) for name, about in noted.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{file}: one of several shards of a DCP checkpoint, but its header does not say of what ({_SHARDING}); "
            "save it again, or consolidate it"
        ) from None


# -- tensors and their chunks ----------------------------------------------------------------------------------------


def _wholes(path: Path, entries: Sequence[_Entry]) -> Iterator[Whole]:
    """The tensors, each checked to be made whole by its chunks."""
    groups: dict[str, list[_Entry]] = {}
    for entry in entries:
        if entry.dtype is not None:
            groups.setdefault(entry.name, []).append(entry)
    for name, group in groups.items():
        dtype, whole = cast(torch.dtype, group[0].dtype), group[0].whole
        for e in group:
            fits = len(e.start) == len(e.shape) == len(whole) and all(
                min(first, size) >= 0 and first + size <= full
                for first, size, full in zip(e.start, e.shape, whole, strict=True)
            )
            if not fits or e.dtype != dtype:
                raise CheckpointError(
                    f"{path / e.file}: {name} {list(whole)} {dtype} has a chunk of {list(e.shape)} {e.dtype} at "
                    f"{list(e.start)}, which is no part of it; save it again"
                )
        filled = [e for e in group if 0 not in e.shape]
        if sum(math.prod(e.shape) for e in filled) != math.prod(whole) or len({e.start for e in filled}) != len(filled):
            raise CheckpointError(f"{path}: the chunks of {name} do not make up its {list(whole)}; copy it again")
        chunks = tuple(Chunk(e.start, e.shape, e.file, e.offset, e.length, e.form) for e in filled)
        yield Whole(name, dtype, whole, chunks)


def _as_shard(path: Path, size: int, places: Sequence[tuple[Stored, tuple[int, ...]]]) -> Shard:
    """A file as a shard without a header: the chunks that change, and all between them as bytes."""
    tensors: list[Stored] = []
    at = 0
    for stored, _ in sorted(places, key=lambda p: p[0].start):
        tensors += [_bytes_between(path, at, stored.start), stored]
        at = stored.stop
    tensors.append(_bytes_between(path, at, size))
    checksums = {stored.name: found for stored, found in places if found}
    return Shard(path, None, tuple(t for t in tensors if t.start < t.stop), 0, size, checksums)


def _bytes_between(path: Path, start: int, stop: int) -> Stored:
    return Stored(f"{path.name}, bytes {start} to {stop}", "bytes", (stop - start,), start, stop)


def _locate(path: Path, tensor: Whole, chunk: Chunk) -> _Place:
    """Find a chunk's numbers in its file; raises CheckpointError if they do not lie there as they are, row by row."""
    file, name = path / chunk.file, tensor.chunk_name(chunk)
    size = math.prod(chunk.shape) * tensor.dtype.itemsize
    if chunk.form == "packed":
        raise CheckpointError(f"{file}: {name} is compressed or encrypted by an extension; save it without")
    if chunk.form == "safetensors":
        return _Place(chunk.offset, chunk.offset + size)
    with _opened(file) as stream:
        stream.seek(chunk.offset)
        if stream.read(4) == b"PK\x03\x04":
            return _in_zip(file, name, tensor, chunk, _Window(stream, chunk.offset, chunk.length))
        return _in_safetensors(file, name, tensor, chunk, stream)


def _in_zip(file: Path, name: str, tensor: Whole, chunk: Chunk, window: _Window) -> _Place:
    """A chunk as ``torch.save`` writes it."""
    try:
        loaded = torch.load(cast(IO[bytes], window), map_location="meta", weights_only=True)
        archive = zipfile.ZipFile(window)
        records = [(i, info) for i, info in enumerate(archive.infolist()) if "/data/" in f"/{info.filename}"]
        order = next((archive.read(i) for i in archive.infolist() if i.filename.endswith("/byteorder")), b"little")
        directory = archive.start_dir
        sizes = struct.Struct("<HHH")
        for _ in range(records[0][0] if records else 0):
            directory += 46 + sum(sizes.unpack(window.at(directory + 28, 6)))
        info = records[0][1]
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", window.at(info.header_offset + 26, 4)))
    except Exception as error:  # a broken archive can raise anything
        raise CheckpointError(f"{file}: {name} is not a sound object of torch.save: {error}; copy it again") from None
    if not isinstance(loaded, Tensor) or loaded.layout != torch.strided or loaded.dtype != tensor.dtype:
        raise CheckpointError(f"{file}: {name} is a {_kind(loaded)}, not the {tensor.dtype} tensor that was announced")
    if tuple(loaded.shape) != chunk.shape or len(records) != 1 or info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{file}: {name} is {list(loaded.shape)} in the file; save the checkpoint again")
    if not loaded.is_contiguous() or order.decode() != sys.byteorder:
        raise CheckpointError(
            f"{file}: {name} is stored with strides {list(loaded.stride())}, {order.decode()}-endian; save it from a "
            "contiguous tensor, on a machine such as this"
        )
    start = begin + loaded.storage_offset() * tensor.dtype.itemsize
    stop = start + loaded.nbytes
    if stop > begin + info.file_size:
        raise CheckpointError(f"{file}: {name} ends after its own storage; copy it again")
    # The CRC-32 of the storage stands in the archive's directory, and behind the data or in the header before them.
    checksums = [directory + 16]
    if info.flag_bits & 8:
        end = begin + info.file_size
        checksums.append(end + 4 if window.at(end, 4) == b"PK\x07\x08" else end)
    else:
        checksums.append(info.header_offset + 14)
    if loaded.nbytes != info.file_size:
        raise CheckpointError(f"{file}: {name} is a view of a larger storage; save a clone of it")
    return _Place(chunk.offset + start, chunk.offset + stop, tuple(chunk.offset + place for place in checksums))


def _in_safetensors(file: Path, name: str, tensor: Whole, chunk: Chunk, stream: io.BufferedReader) -> _Place:
    """A chunk in the safetensors archive that a file ends with; the metadata says only where that archive begins."""
    try:
        stream.seek(chunk.offset)
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(length, os.path.getsize(file))))
        about = header[tensor.name]
        kind, shape, (start, stop) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        begins = _starts(file, header.get("__metadata__"))[tensor.name]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: {name} is neither a zip archive of torch.save nor in a safetensors archive ({error}); save the "
            "checkpoint with torch's FileSystemWriter"
        ) from None
    start, stop = (chunk.offset + 8 + length + edge for edge in (start, stop))
    size = math.prod(chunk.shape) * tensor.dtype.itemsize
    found = (DTYPES.get(kind), shape, begins, stop - start)
    if found != (tensor.dtype, chunk.shape, chunk.start, size) or stop > os.path.getsize(file):
        raise CheckpointError(
            f"{file}: the archive holds {tensor.name} {list(shape)} {kind} at {list(begins)}, where {name} should be "
            "(a rank that saves two chunks of a tensor so loses one); save the checkpoint again"
        )
    return _Place(start, stop)


def _kind(value: Any) -> str:
    return f"{value.dtype} tensor, {value.layout}" if isinstance(value, Tensor) else type(value).__name__


def _opened(file: Path) -> io.BufferedReader:
    try:
        return open(file, "rb")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        view = memoryview(buffer).cast("B")
        data = self._file.read(max(0, min(len(view), self._size - self._at)))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on."""
        self.seek(offset)
        return self.read(size) or b""
