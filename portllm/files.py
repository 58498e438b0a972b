"""Files on disk: exact reads, copies in the kernel, locks, errors that name the file, outputs whole or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .execute import hold_interrupts

COPY_BYTES = 32 << 20
_FICLONE = 0x40049409  # linux/fs.h


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> None:
    """Fill ``buffer`` from a file at ``offset``; raises OSError if the file ends before."""
    while buffer:
        count = os.preadv(descriptor, [buffer], offset)
        if count == 0:
            raise OSError("the file ends before the tensor does")
        buffer, offset = buffer[count:], offset + count


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data``; raises OSError."""
    while data:
        data = data[os.write(descriptor, data) :]


def undo_directory(model: Path) -> Path:
    """Where what takes patches off a checkpoint again lies beside it (``portllm.undostore``)."""
    return model / ".portllm" if model.is_dir() else model.with_name(f".{model.name}.portllm")


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``; raises OSError."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def write_json(path: Path, value: Any) -> None:
    """Replace a file by JSON, all of it or nothing, synced to disk; raises OSError."""
    temporary = path.with_name(f"{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_all(descriptor, memoryview(json.dumps(value, indent=1).encode()))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    fsync(path.parent)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file ``path`` locked against other processes, and other threads of this one.

    Raises:
        CheckpointError: somebody else holds it; names who.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise CheckpointError(
                f"{path.parent}: in use by {holder or 'another process'}; wait until it is done"
            ) from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            break
        os.close(descriptor)  # whoever held it before has removed it
    try:
        with contextlib.suppress(OSError):  # a full disk: then nobody can tell who it is
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(descriptor)


def clone(source: int, out: int) -> bool:
    """Let a new file share all blocks of another one, until one of both is changed; False where that cannot be."""
    try:
        fcntl.ioctl(out, _FICLONE, source)
    except OSError:
        return False
    return True


def copy_range(
    source: int, out: int, start: int, stop: int, to: int, progress: Callable[[int], None] = lambda count: None
) -> None:
    """Copy bytes to offset ``to``, in the kernel where it can (it may share extents), else through a buffer."""
    in_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        count = min(COPY_BYTES, stop - start)
        if in_kernel:
            try:
                count = os.copy_file_range(source, out, count, start, to)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF):
                    raise
                in_kernel = False
                continue
            if count == 0:
                raise OSError("the source file ends before the tensor does")
        else:
            data = memoryview(bytearray(count))
            read_exactly(source, data, start)
            write_at(out, data, to)
        start, to = start + count, to + count
        progress(count)


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the file and, where it is plain, the fix."""
    try:
        yield
    except OSError as error:
        fix = {
            errno.ENOSPC: "; free some space or write elsewhere",
            errno.EDQUOT: "; the quota is used up, write elsewhere",
            errno.EROFS: "; write elsewhere",
            errno.EACCES: "; choose an output that may be written",
        }.get(error.errno or 0, "")
        raise CheckpointError(f"{path}: {error.strerror or error}{fix}") from None


def check_destination(out: Path, inputs: list[Path], overwrite: bool, size: int) -> None:
    """Refuse an output that exists, that would replace or lies in one of ``inputs``, or that does not fit on the disk.

    Raises:
        CheckpointError: names the output and the reason.
    """
    with named_errors(out):
        place = _parent(out) / out.name
        for path in (p.resolve() for p in inputs if p.exists()):
            if path in (place, out.resolve()) or place in path.parents:
                raise CheckpointError(f"{out}: is, or holds, the input {path}, which it would replace; write elsewhere")
            if path in place.parents:
                raise CheckpointError(f"{out}: lies in the input {path}; write elsewhere")
        if os.path.lexists(place) and not overwrite:
            raise CheckpointError(f"{out}: exists already; choose another name, or overwrite=True (--overwrite)")
    check_space(out, size, "; write elsewhere")


def check_space(path: Path, size: int, fix: str = "; free some space") -> None:
    """Refuse to begin what does not fit on the disk; raises CheckpointError."""
    with named_errors(path):
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
    if free < size:
        raise CheckpointError(f"{path}: {size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free{fix}")


def _parent(out: Path) -> Path:
    """The directory that holds ``out``: where a link stands, not where it leads, since the link is replaced."""
    return Path(os.path.abspath(out)).parent.resolve()


@contextlib.contextmanager
def whole_or_absent(out: Path, overwrite: bool, *, is_file: bool) -> Iterator[Path]:
    """A temporary path beside ``out`` that takes its name at the end, or vanishes."""
    parent = _parent(out)
    temporary = parent / f".{out.name[:100]}.{os.getpid()}.partial"
    missing = [path for path in (parent, *parent.parents) if not path.exists()]
    try:
        with named_errors(out):
            parent.mkdir(parents=True, exist_ok=True)
            _delete(temporary)
            if not is_file:
                temporary.mkdir()
        yield temporary
        if not is_file:
            for directory in {p.parent for p in temporary.rglob("*")} | {temporary}:
                fsync(directory)
        with hold_interrupts(deliver=False):  # from the rename on it is done, and there is nothing to take back
            with named_errors(out):
                _rename(temporary, parent / out.name, overwrite)
            # All data is on disk; only a power failure just now could still lose the new name.
            with contextlib.suppress(CheckpointError):
                fsync(parent)
    except BaseException:
        _delete(temporary)
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _rename(temporary: Path, out: Path, overwrite: bool) -> None:
    if not (overwrite and os.path.lexists(out)):
        temporary.rename(out)
        return
    old = temporary.with_suffix(".old")
    out.rename(old)
    try:
        temporary.rename(out)
    except BaseException:
        old.rename(out)
        raise
    _delete(old)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Sync a file or directory to disk; raises CheckpointError."""
    with named_errors(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
