"""Checksums of sectors: the compiled ones are those of numpy; and torn bytes come back from them."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from portllm import _native, sums
from portllm.mend import mended

SIZES = [0, 1, 7, 511, 512, 513, 1024, 5000, 100_001]


@pytest.mark.skipif(_native.load() is not None, reason=str(_native.load()))
@pytest.mark.parametrize("size", SIZES)
def test_the_compiled_sums_are_those_of_numpy(size: int) -> None:
    for offset in (0, 1, 511, 512, random.randrange(1 << 40)):
        data = memoryview(bytearray(os.urandom(size)))
        expected = sums.sums_of(sums.sectors(data, offset))
        assert len(expected) == sums.count(size, offset)
        assert np.array_equal(sums.sector_sums(data, offset), expected)


def test_a_digest_tells_each_change() -> None:
    """One bit; two bits of opposite effect; two sectors exchanged."""
    data = bytearray(os.urandom(4096))
    digest = sums.digest(sums.sector_sums(memoryview(data), 0))
    for change in ([(0, 1)], [(4095, 128)], [(7, 128), (15, 128)], [(8, 1), (16, 1), (24, 1)]):
        other = bytearray(data)
        for position, bit in change:
            other[position] ^= bit
        assert sums.digest(sums.sector_sums(memoryview(other), 0)) != digest
    other = data[512:1024] + data[:512] + data[1024:]
    assert sums.digest(sums.sector_sums(memoryview(other), 0)) != digest


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
@pytest.mark.parametrize("adding", [True, False])
def test_any_mixture_of_sectors_with_torn_ones_is_mended(itemsize: int, adding: bool) -> None:
    """Patched numbers are computed from pristine ones, one by one, here by a map that scrambles all their bytes."""
    kind = f"<u{itemsize}"
    key = random.getrandbits(8 * itemsize - 1) | 1

    def patch(data: bytes) -> bytes:
        numbers = np.frombuffer(data, dtype=kind)
        return (numbers * np.array(key, dtype=kind) + np.array(key, dtype=kind)).astype(kind).tobytes()

    for size in (itemsize, 40, 512, 4096, 10_000):
        offset = random.randrange(1000) * itemsize
        pristine = os.urandom(size)
        patched = patch(pristine)
        old, new = (pristine, patched) if adding else (patched, pristine)
        found, start = bytearray(old), 0
        while start < size:  # each sector is old, new, or new up to somewhere
            stop = min(size, start + 512 - (offset + start) % 512)
            cut = start + random.choice([0, stop - start, random.randint(0, stop - start)])
            found[start:cut] = new[start:cut]
            start = stop
        known = sums.sector_sums(memoryview(patched), offset)
        computed = memoryview(patch(bytes(found)))
        assert mended(memoryview(found), computed, known, offset, itemsize, adding=adding) == patched


def test_what_is_neither_old_nor_new_is_not_mended() -> None:
    data = memoryview(bytearray(os.urandom(2048)))
    known = sums.sector_sums(memoryview(os.urandom(2048)), 0)
    for adding in (True, False):
        assert mended(data, data, known, 0, 2, adding=adding) is None
