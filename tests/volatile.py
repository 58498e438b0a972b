"""A disk that can lose its power: what was not synced is lost, whole or in part, and in any order."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


class Crash(BaseException):
    """The power is gone; no call reaches the disk any more."""


@dataclass
class _File:
    """A file's bytes as of its last sync, and what was done to it since: (offset, bytes), or a new size."""

    synced: bytes
    pending: list[tuple[int, bytes] | int] = field(default_factory=list)


class VolatileDisk:
    """Everything below ``root``. Each change through ``os`` is counted; the ``crash_at``-th is the last one.

    Names (creating, renaming, deleting) last when their directory is synced, and are otherwise lost from the last one
    backwards, as a file system's journal has it. Bytes last when their file is synced; of the other writes any may be
    lost, any may be cut short, and of any only some sectors may be there. Bytes that were written past ``os`` (by
    compiled code) last only by a sync as well.
    """

    def __init__(self, root: Path, attic: Path, crash_at: int) -> None:
        self._root, self._attic, self._crash_at = root, attic, crash_at
        self.count, self.dead = 0, False
        self._lock = threading.RLock()
        self._files: dict[int, _File] = {}
        self._names: list[tuple[set[str], Callable[[], None]]] = []
        self._born: set[int] = set()
        attic.mkdir(exist_ok=True)
        self._known = {entry.stat().st_ino for entry in root.rglob("*")}

    def plug_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("write", "pwrite", "ftruncate", "truncate", "fsync", "fdatasync", "copy_file_range"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), getattr(self, f"_{name}")))
        for name in ("open", "mkdir", "replace", "rename", "unlink", "remove", "rmdir", "utime"):
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name), getattr(self, f"_{name}")))

    def _wrap(self, real: Any, handle: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                return handle(real, *arguments, **options)

        return call

    def _tick(self) -> bool:
        """Count one change; True if it is the last one."""
        if self.dead:
            raise Crash
        self.count += 1
        self.dead = self.count == self._crash_at
        return self.dead

    def _change(self, act: Callable[[], Any]) -> Any:
        last = self._tick()
        result = act()  # what is lost of it is settled later
        if last:
            raise Crash
        return result

    def _inside(self, path: Any) -> bool:
        return os.path.abspath(os.fspath(path)).startswith(str(self._root))

    def _file(self, descriptor: int) -> _File | None:
        path = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
        if not self._inside(path):
            return None
        inode = os.fstat(descriptor).st_ino
        if inode not in self._files:
            self._files[inode] = _File(_content(descriptor) if inode in self._known else b"")
        return self._files[inode]

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _write(self, real: Any, descriptor: int, data: Any) -> Any:
        file = self._file(descriptor)
        if file is None:
            return real(descriptor, data)
        change = os.lseek(descriptor, 0, os.SEEK_CUR), bytes(data)
        return self._change(lambda: (file.pending.append(change), real(descriptor, data))[1])

    def _pwrite(self, real: Any, descriptor: int, data: Any, offset: int) -> Any:
        file = self._file(descriptor)
        if file is None:
            return real(descriptor, data, offset)
        change = offset, bytes(data)
        return self._change(lambda: (file.pending.append(change), real(descriptor, data, offset))[1])

    def _copy_file_range(self, real: Any, source: int, out: int, count: int, start: int, *rest: Any) -> Any:
        data = os.pread(source, count, start)
        return os.write(out, data) if not rest else os.pwrite(out, data, rest[0])

    def _ftruncate(self, real: Any, descriptor: int, size: int) -> Any:
        file = self._file(descriptor)
        assert file is not None
        return self._change(lambda: (file.pending.append(size), real(descriptor, size))[1])

    def _truncate(self, real: Any, path: Any, size: int) -> Any:
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)

    def _fsync(self, real: Any, descriptor: int) -> Any:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not self._inside(path):
            return None
        self._tick()
        if self.dead:
            raise Crash
        if os.path.isdir(path):
            self._names = [(directories, undo) for directories, undo in self._names if path not in directories]
        else:
            self._files[os.fstat(descriptor).st_ino] = _File(_content(descriptor))
        return None

    _fdatasync = _fsync

    # -- names -------------------------------------------------------------------------------------------------------

    def _named(self, act: Callable[[], Any], undo: Callable[[], None], *paths: Any) -> Any:
        directories = {os.path.dirname(os.path.abspath(os.fspath(path))) for path in paths}

        def acted() -> Any:
            result = act()
            self._names.append((directories, undo))
            return result

        return self._change(acted)

    def _kept(self, path: str) -> str:
        """Another name for a file, outside, so that it can come back."""
        other = str(self._attic / f"{self.count}-{len(os.listdir(self._attic))}")
        os.link(path, other)
        return other

    def _open(self, real: Any, path: Any, flags: int, *rest: Any, **options: Any) -> Any:
        if not flags & os.O_CREAT or options.get("dir_fd") is not None or not self._inside(path):
            return real(path, flags, *rest, **options)
        if os.path.lexists(path):
            descriptor = real(path, flags & ~os.O_TRUNC, *rest, **options)
            if flags & os.O_TRUNC:
                os.ftruncate(descriptor, 0)
            return descriptor
        descriptor = self._named(lambda: real(path, flags, *rest), lambda: _really_unlink(path), path)
        self._files[os.fstat(descriptor).st_ino] = _File(b"")
        return descriptor

    def _mkdir(self, real: Any, path: Any, *rest: Any, **options: Any) -> Any:
        if not self._inside(path) or os.path.lexists(path):
            return real(path, *rest, **options)
        return self._named(lambda: real(path, *rest, **options), lambda: shutil.rmtree(path, ignore_errors=True), path)

    def _replace(self, real: Any, source: Any, target: Any, **options: Any) -> Any:
        if not self._inside(source):
            return real(source, target, **options)
        before = self._kept(target) if os.path.isfile(target) else None

        def undo() -> None:
            real(target, source)
            if before:
                real(before, target)

        return self._named(lambda: real(source, target), undo, source, target)

    _rename = _replace

    def _unlink(self, real: Any, path: Any, *, dir_fd: int | None = None) -> Any:
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        if not self._inside(path) or not os.path.lexists(path):
            return real(path)
        before = self._kept(path)
        return self._named(lambda: real(path), lambda: os.link(before, path), path)

    _remove = _unlink

    def _rmdir(self, real: Any, path: Any, *, dir_fd: int | None = None) -> Any:
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        if not self._inside(path):
            return real(path)
        if os.listdir(path):
            return real(path)
        return self._named(lambda: real(path), lambda: os.makedirs(path, exist_ok=True), path)

    def _utime(self, real: Any, path: Any, *rest: Any, **options: Any) -> Any:
        return self._change(lambda: real(path, *rest, **options))

    # -- after the crash ---------------------------------------------------------------------------------------------

    def settle(self, chance: random.Random) -> None:
        """Unplugged: leave of the disk what a crash leaves."""
        for _, undo in reversed(self._names[chance.randint(0, len(self._names)) :]):
            undo()
        for path in [entry for entry in self._root.rglob("*") if entry.is_file()]:
            inode = path.stat().st_ino
            file = self._files.get(inode)
            if file is not None:
                path.write_bytes(_partly(file, chance))
            elif inode not in self._known:  # compiled code wrote it, and nobody synced it
                content = path.read_bytes()
                path.write_bytes(content[: chance.randint(0, len(content))])
        shutil.rmtree(self._attic)


def _content(descriptor: int) -> bytes:
    return Path(f"/proc/self/fd/{descriptor}").read_bytes()  # whatever it was opened for


def _partly(file: _File, chance: random.Random) -> bytes:
    content = bytearray(file.synced)
    for change in file.pending:
        fate = chance.choice(("lost", "whole", "torn", "sectors"))
        if fate == "lost":
            continue
        if isinstance(change, int):
            del content[change:]
            content.extend(bytes(change - len(content)))
            continue
        offset, data = change
        if fate != "whole":
            data = data[: chance.randint(0, len(data))]
        content.extend(bytes(max(0, offset + len(data) - len(content))))
        start = offset
        while start < offset + len(data):
            stop = min((start // 512 + 1) * 512, offset + len(data))
            if fate != "sectors" or chance.random() < 0.5:
                content[start:stop] = data[start - offset : stop - offset]
            start = stop
    return bytes(content)


def _really_unlink(path: Any) -> None:
    Path(path).unlink(missing_ok=True)
