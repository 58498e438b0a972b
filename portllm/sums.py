"""Checksums of a file's sectors, and of all of a range: fast enough to be taken of every byte that is read or written.

A range of a file is cut where the file's own sectors of 512 bytes are. Of each part, with zeros up to 512 bytes, seen
as 64 little-endian words of 64 bits, there are two numbers: ``sum_i (low32(w_i) + k_2i)(high32(w_i) + k_2i+1)``, the
brackets modulo 2^32 and the sum modulo 2^64 (the NH hash of UMAC, RFC 4418, with fixed keys), and the XOR of the words.
They tell whether a sector is what it was, and the XOR gives back up to 8 bytes that are not known (``portllm.mend``).

The digest of a range is the SHA-256 of these numbers. It tells every change that happens by accident or by another
tool. It is no proof against somebody who makes a change that it does not tell; nor could it be, since the digests lie
beside the files.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from typing import TYPE_CHECKING, Any

from . import _native

if TYPE_CHECKING:  # numpy takes a while to load, and only what is done in place needs it
    import numpy as np
    from numpy.typing import NDArray

    Sums = NDArray[np.uint64]

SECTOR = 512
_GOLDEN = 0x9E3779B97F4A7C15


def sector_sums(data: memoryview, offset: int) -> Sums:
    """[sectors, 2] uint64: the sum and the XOR of each sector of ``data``, which lie at ``offset`` in their file."""
    import numpy as np

    first = SECTOR - offset % SECTOR
    native = _native_sums()
    if native is not None:
        out = np.empty((count(data.nbytes, offset), 2), dtype=np.uint64)
        source = np.frombuffer(data, dtype=np.uint8)
        native(source.ctypes.data, data.nbytes, first, out.ctypes.data)
        return out
    return sums_of(sectors(data, offset))


def count(size: int, offset: int) -> int:
    """Sectors that ``size`` bytes at ``offset`` touch."""
    return -(-(offset % SECTOR + size) // SECTOR) if size else 0


def sectors(data: memoryview, offset: int) -> NDArray[np.uint8]:
    """[sectors, 512] uint8: a copy, the first and the last one with zeros behind what they hold."""
    import numpy as np

    first = min(SECTOR - offset % SECTOR, data.nbytes)
    out = np.zeros((count(data.nbytes, offset), SECTOR), dtype=np.uint8)
    if data.nbytes:
        flat = np.frombuffer(data, dtype=np.uint8)
        out[0, :first] = flat[:first]
        out[1:].reshape(-1)[: len(flat) - first] = flat[first:]
    return out


def sums_of(parts: NDArray[np.uint8]) -> Sums:
    """The sums of sectors [n, 512]."""
    import numpy as np

    words, mask = parts.view("<u8").astype(np.uint64, copy=False), np.uint64(0xFFFFFFFF)
    keys = np.array([(i + 1) * _GOLDEN % 2**64 >> 32 for i in range(2 * SECTOR // 8)], dtype=np.uint64)
    low, high = ((words & mask) + keys[0::2]) & mask, ((words >> np.uint64(32)) + keys[1::2]) & mask
    total = np.multiply(low, high).sum(axis=1, dtype=np.uint64)
    return np.stack([total, np.bitwise_xor.reduce(words, axis=1)], axis=1)


def to_bytes(sums: Sums) -> bytes:
    """Sums as little-endian bytes."""
    return sums.astype("<u8", copy=False).tobytes()


def from_bytes(data: memoryview) -> Sums:
    """The inverse of ``to_bytes``."""
    import numpy as np

    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)


def digest(sums: Sums) -> str:
    """The digest of a range with these sums, in hexadecimal."""
    return hashlib.sha256(to_bytes(sums)).hexdigest()


@cache
def _native_sums() -> Any:
    if _native.load() is not None:
        return None
    function = ctypes.CDLL(str(_native.LIBRARY)).portllm_sector_sums
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = None
    return function
