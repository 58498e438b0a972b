"""The journal of an operation in place: what was done, and the bytes that a crash may have left half written.

``log`` is a list of entries, appended and synced one by one. The first is there from the start and says what the
operation is. An entry, little-endian: u64 bytes of JSON, u64 bytes of payload, the SHA-256 of both; the JSON; the
payload. The first entry whose hash is not right ends the log: a crash cut it short, and what it was to announce had
not begun.

A step rewrites some ranges of the checkpoint's files (see ``Journal.step``):

1. the new bytes of those that ``portllm/mend.py`` cannot mend go into one of the files ``redo-0`` and ``redo-1``, in
   turn, which is synced;
2. the log tells the ranges, the digests of their new bytes and the sums to mend the others with, and is synced;
3. the new bytes go to their places.

A redo file is used again only when the step that it holds is on disk. So after a crash ``Journal.open`` writes again
what the redo files hold, with no assumption on what a torn write leaves behind; what is to be mended is for its caller,
who then syncs. A step that the log does not tell of has changed nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import copy_range, fsync, named_errors, read_exactly, write_at
from .sums import digest, sector_sums

_FRAME = struct.Struct("<QQ32s")
_HASH_BYTES = 1 << 20
LOG, REDO = "log", ("redo-0", "redo-1")


@dataclass(frozen=True)
class Entry:
    """One entry of the log: its JSON, and where in the log its payload lies."""

    value: dict[str, Any]
    payload: int


@dataclass(frozen=True)
class Write:
    """New bytes for a range of a file, and their digest (``portllm.sums``); ``redo``: they go by the journal."""

    file: str
    offset: int
    data: memoryview
    digest: str
    redo: bool


class Journal:
    """The journal in ``directory`` of an operation on ``files`` (name -> open descriptor)."""

    def __init__(self, directory: Path, files: Mapping[str, int], log: int, end: int) -> None:
        self._files, self._log, self._end = files, log, end
        self._open = [log]
        self._redo: list[int] = []
        for name in REDO:
            self._redo.append(os.open(directory / name, os.O_RDWR | os.O_CREAT, 0o666))
            self._open.append(self._redo[-1])
        self._steps = 0
        self._dirty: list[set[str]] = [set(), set()]
        # Bytes go to their places while the next step is logged, and to the disk while others are written.
        self._writer, self._syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._going: list[Future[None]] = []
        self._file = ""
        self._broken = False
        self.bytes_written = 0

    @classmethod
    def create(cls, directory: Path, files: Mapping[str, int], begin: dict[str, Any]) -> Journal:
        """Begin an operation; from here on a crash leaves it to be completed. Raises OSError."""
        temporary = directory / f"{LOG}.new"
        log = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        journal = cls(directory, files, log, 0)
        try:
            for redo in journal._redo:
                os.ftruncate(redo, 0)
            journal.append(begin)
            os.replace(temporary, directory / LOG)
            fsync(directory)
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def open(cls, directory: Path, files: Mapping[str, int]) -> tuple[Journal, list[Entry]]:
        """Take up an operation that was cut short; all entries of the log.

        The caller mends what is to be mended, and calls ``sync``, before the next step.

        Raises:
            CheckpointError: the journal cannot be read, or the files cannot be written.
        """
        entries = read_log(directory)
        with named_errors(directory):
            log = os.open(directory / LOG, os.O_RDWR)
            end = entries[-1].payload + entries[-1].value["payload"]
            journal = cls(directory, files, log, end)
            try:
                os.ftruncate(log, end)
                journal._replay([e.value for e in entries if any(w["redo"] for w in e.value.get("writes", ()))])
            except BaseException:
                journal.close()
                raise
        return journal, entries

    def _replay(self, steps: list[dict[str, Any]]) -> None:
        for step in steps[-2:]:
            redo, start = self._redo[step["redo"]], 0
            writes = [write for write in step["writes"] if write["redo"]]
            size = sum(write["size"] for write in writes)
            if os.fstat(redo).st_size < size:
                continue  # in use again, so this step is on disk
            data = memoryview(bytearray(size))
            read_exactly(redo, data, 0)
            parts: list[tuple[dict[str, Any], memoryview]] = []
            for write in writes:
                parts.append((write, data[start : start + write["size"]]))
                start += write["size"]
            if all(digest(sector_sums(part, write["offset"])) == write["digest"] for write, part in parts):
                for write, part in parts:
                    write_at(self._files[write["file"]], part, write["offset"])

    def step(
        self, writes: Sequence[Write], value: dict[str, Any], payload: Sequence[memoryview]
    ) -> tuple[Entry, Future[None]]:
        """Write ``writes`` such that a crash leaves all or nothing of them, and log ``value`` and ``payload``.

        Returns:
            The entry, and what is done when the bytes have been taken.

        Raises:
            OSError: what was written by then is as if the system had crashed.
        """
        if self._broken:
            raise OSError("an earlier step could not be written")
        try:
            return self._step(writes, value, payload)
        except BaseException:
            self._broken = True
            raise

    def _step(
        self, writes: Sequence[Write], value: dict[str, Any], payload: Sequence[memoryview]
    ) -> tuple[Entry, Future[None]]:
        turn, start = self._steps % 2, 0
        redo = [write for write in writes if write.redo]
        if redo:
            self._drain()
            for file in sorted(self._dirty[turn]):
                os.fdatasync(self._files[file])
            for write in redo:
                write_at(self._redo[turn], write.data, start)
                start += write.data.nbytes
            os.fdatasync(self._redo[turn])
        told = [
            {"file": w.file, "offset": w.offset, "size": w.data.nbytes, "digest": w.digest, "redo": w.redo}
            for w in writes
        ]
        entry = self.append({**value, "redo": turn, "writes": told}, payload)
        if redo:
            self._steps += 1
            self._dirty[turn] = {write.file for write in redo}
        self.bytes_written += start + sum(write.data.nbytes for write in writes)
        going = self._writer.submit(self._put, writes)
        self._going.append(going)
        return entry, going

    def _put(self, writes: Sequence[Write]) -> None:
        try:
            for write in writes:
                if write.file != self._file and self._file:
                    self._going.append(self._syncer.submit(os.fdatasync, self._files[self._file]))
                self._file = write.file
                write_at(self._files[write.file], write.data, write.offset)
        except BaseException:
            self._broken = True  # no later step may take the place of this one in the redo files
            raise

    def _drain(self) -> None:
        """All that was begun is written."""
        while self._going:
            self._going.pop(0).result()

    def append(self, value: dict[str, Any], payload: Sequence[memoryview] = ()) -> Entry:
        """Append an entry to the log, and sync it."""
        size = sum(part.nbytes for part in payload)
        text = json.dumps({**value, "payload": size}, separators=(",", ":")).encode()
        total = hashlib.sha256(text)
        for part in payload:
            total.update(part)
        frame = _FRAME.pack(len(text), size, total.digest()) + text
        offset = self._end
        for part in (memoryview(frame), *payload):
            write_at(self._log, part, offset)
            offset += part.nbytes
        os.fdatasync(self._log)
        entry = Entry({**value, "payload": size}, self._end + len(frame))
        self.bytes_written += offset - self._end
        self._end = offset
        return entry

    def read(self, offset: int, size: int) -> memoryview:
        """Bytes of the log."""
        data = memoryview(bytearray(size))
        read_exactly(self._log, data, offset)
        return data

    def copy(self, offset: int, size: int, out: int, to: int) -> None:
        """Copy bytes of the log to a file."""
        copy_range(self._log, out, offset, offset + size, to)

    def sync(self) -> None:
        """All steps are on disk, and the redo files are empty: they must not be read again after later steps."""
        self._drain()
        for file in sorted(self._files):
            os.fdatasync(self._files[file])
        self._dirty = [set(), set()]
        for redo in self._redo:
            os.ftruncate(redo, 0)
            os.fdatasync(redo)

    def close(self) -> None:
        self._writer.shutdown()
        self._syncer.shutdown()
        while self._open:
            os.close(self._open.pop())


def discard(directory: Path) -> None:
    """The operation is over, or never was: remove its journal."""
    for name in (LOG, f"{LOG}.new", *REDO):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory / name)
        if name == LOG:
            fsync(directory)  # before the redo files, without which a log would be taken for an older one


def read_log(directory: Path) -> list[Entry]:
    """The entries of a log that are whole; raises CheckpointError if not even the first is."""
    path = directory / LOG
    with named_errors(path), open(path, "rb") as file:
        entries = list(_entries(file))
    if not entries:
        raise CheckpointError(f"{path}: its first entry is broken; restore the checkpoint from another copy")
    return entries


def _entries(file: Any) -> Iterator[Entry]:
    while len(frame := file.read(_FRAME.size)) == _FRAME.size:
        length, size, expected = _FRAME.unpack(frame)
        left = os.fstat(file.fileno()).st_size - file.tell()
        if length + size > left:
            return
        text = file.read(length)
        total, payload = hashlib.sha256(text), file.tell()
        for start in range(0, size, _HASH_BYTES):
            total.update(file.read(min(_HASH_BYTES, size - start)))
        if total.digest() != expected:
            return
        yield Entry(json.loads(text), payload)
