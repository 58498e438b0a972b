"""Bytes whose writing was cut short: which sectors are new, which are old, and from both, all of them again.

Where a range goes from pristine weights to patched ones, or back, its old and its new bytes need not be journalled:
from a pristine element its patched one is computed, each on its own. So it is enough to know the sums of each patched
sector (``portllm/sums.py``, 3 % of the bytes). A sector of 512 bytes that was found is

- patched, if it has that sum;
- pristine, if what is computed from it has that sum;
- or else the front of it is new, and the rest old: a write that stopped in it. Of the 511 places where that can be,
  the right one gives the sum, once the bytes of the element that it cuts in two, which cannot be computed, are taken
  from the XOR.

This rests on disks writing sectors whole, and on writes that are cut short by the end of a process having written
their front. Whatever was found otherwise is an error, never taken for good.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .sums import SECTOR, sectors, sums_of

_Sector = NDArray[np.uint8]


def mended(
    found: memoryview, computed: memoryview, sums: NDArray[np.uint64], offset: int, itemsize: int, *, adding: bool
) -> bytes | None:
    """The patched bytes of a range, or None if they are not to be had.

    Args:
        found: what is there.
        computed: the same, patched as if it were pristine.
        sums: of the patched bytes.
        offset: where in its file the range begins; a multiple of ``itemsize``.
        itemsize: bytes of an element; 1, 2, 4 or 8.
        adding: whether the write that was cut short was to put patched bytes in the place of pristine ones.
    """
    ours, theirs = sectors(found, offset), sectors(computed, offset)
    is_patched = (sums_of(ours) == sums).all(axis=1)
    is_pristine = (sums_of(theirs) == sums).all(axis=1) & ~is_patched
    ours[is_pristine] = theirs[is_pristine]
    for index in np.flatnonzero(~(is_patched | is_pristine)):
        torn = _torn(ours[index], theirs[index], sums[index], itemsize, adding)
        if torn is None:
            return None
        ours[index] = torn
    first = min(SECTOR - offset % SECTOR, found.nbytes)
    return ours[0, :first].tobytes() + ours[1:].tobytes()[: found.nbytes - first] if found.nbytes else b""


def _torn(found: _Sector, computed: _Sector, sums: NDArray[np.uint64], itemsize: int, adding: bool) -> _Sector | None:
    """A sector of which the first bytes were written."""
    front, back = (found, computed) if adding else (computed, found)
    trials = np.stack([np.concatenate([front[:cut], back[cut:]]) for cut in range(1, SECTOR)])
    for trial, cut in zip(trials, range(1, SECTOR), strict=True):
        start = cut - cut % itemsize
        unknown = range(cut, start + itemsize) if adding else range(start, cut)
        if cut == start:
            continue
        trial[unknown.start : unknown.stop] = 0
        left = np.bitwise_xor.reduce(trial.view("<u8")) ^ sums[1]
        for position in unknown:
            trial[position] = int(left) >> 8 * (position % 8) & 0xFF
    right = np.flatnonzero((sums_of(trials) == sums).all(axis=1))
    return trials[right[0]] if len(right) else None
