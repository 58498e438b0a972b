"""Records: what takes an update off again to the last bit; and the exchange of updates, in plain torch.

From an updated weight ``w'`` and the sum ``d`` that was added, ``round(w' - d)`` gives the old weight back, except
where rounding to ``w'`` lost bits of it: where ``w'`` has the larger exponent. For these elements, the members, which
whoever has ``w'`` and ``d`` knows, a record holds ``code = old - round(w' - d)``, as integers of the weight's size;
the few others that ``round(w' - d)`` does not give back, the strays, it holds as they were. ``csrc/cpu/undo.h`` has
the bytes. For bf16 weights this is 0.11 bits a weight for a delta of 1 % of the weight, 0.27 for one of 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import RecordError
from .reference import Delta, ieee_matmul, row_blocks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXPONENTS = {
    torch.bfloat16: 0x7F80,
    torch.float16: 0x7C00,
    torch.float32: 0x7F800000,
    torch.float64: 0x7FF0000000000000,
}


@dataclass(frozen=True)
class Record:
    """What takes the terms off one weight again.

    Attributes:
        lengths: [chunks] int16 (as unsigned): the bytes of each chunk (Triton's: the words of 32 bits).
        data: [bytes] uint8: the chunks (Triton's: as ``kernels/lowrank_exchange.py`` has them).
        by: who summed the terms; only the same sums can be taken off (see ``portllm.ops.summed_by``).
    """

    lengths: Tensor
    data: Tensor
    by: str

    @property
    def nbytes(self) -> int:
        return self.lengths.nbytes + self.data.nbytes


def exchange_(
    weight: Tensor,
    old: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]],
    new: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[float]],
    record: Record | None,
    by: str,
) -> Record | None:
    """In place: take off the ``old`` terms with their record, then add the ``new`` ones; returns their record.

    Args:
        weight: [m, n]; bf16, fp16, fp32 or fp64.
        old, new: (lora_A [r, n] each, lora_B [m, r] each, scalings), or empty lists.
        record: of the old terms; None if there are none.
        by: for the new record.

    Raises:
        RecordError: the record is not that of these terms on this weight, some rows of which are changed by then.
    """
    before, after = Delta(weight, *old), Delta(weight, *new)
    chunks = _chunks(record) if record else None
    made: list[Tensor] = []
    with ieee_matmul():
        for rows in row_blocks(*weight.shape):
            block = weight[rows]
            if chunks is not None:
                _restore(block, before.rows(rows), next(chunks, None))
            if new[0]:
                made.append(_record(block, after.rows(rows)))
    if not new[0]:
        return None
    data = torch.cat(made) if made else torch.empty(0, dtype=torch.uint8, device=weight.device)
    # Chunks of whole blocks of rows are longer than 16 bits can tell: here an entry is 64 bits of four.
    lengths = torch.tensor([len(chunk) for chunk in made], dtype=torch.int64).view(torch.int16)
    return Record(lengths, data, by)


def _chunks(record: Record) -> Iterator[Tensor]:
    start = 0
    for length in record.lengths.view(torch.int64).tolist():
        yield record.data[start : start + length]
        start += length


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _guess(after: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(bits of round(after - delta), whether the element is a member), both flat."""
    rounded = (after.to(delta.dtype) - delta).to(after.dtype)
    exponent = _EXPONENTS[after.dtype]
    # Which NaN comes of a sum depends on how torch cuts it into vectors.
    guess = _bits(rounded).masked_fill(rounded.isnan(), exponent | exponent >> 1).flatten()
    return guess, (_bits(after).flatten() & exponent) > (guess & exponent)


def _record(block: Tensor, delta: Tensor) -> Tensor:
    """Add, and return the chunk of this block of rows."""
    before = _bits(block).flatten().clone()
    block.copy_(delta + block)
    guess, member = _guess(block, delta)
    difference = before - guess
    codes = difference[member]
    strays = ((difference != 0) & ~member).nonzero().flatten()
    is_short, fits = codes.abs() <= 1, codes.abs() <= 127
    # Of the least integer the magnitude is itself, negative.
    least = codes == torch.iinfo(codes.dtype).min
    is_short, fits = is_short & ~least, fits & ~least
    two = torch.where(is_short, codes & 3, 2).to(torch.uint8)
    two = torch.nn.functional.pad(two, (0, -len(two) % 4)).view(-1, 4)
    packed = two[:, 0] | two[:, 1] << 2 | two[:, 2] << 4 | two[:, 3] << 6
    follow = torch.where(fits, codes, -128)[~is_short].to(torch.int8)
    count = torch.tensor([len(codes)], device=block.device)
    parts = [count, packed, follow, codes[~fits], strays, before[strays]]
    # The strays' columns are counted through the whole block here.
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts])


def _restore(block: Tensor, delta: Tensor, chunk: Tensor | None) -> None:
    guess, member = _guess(block, delta)
    read = _Reader(torch.empty(0, dtype=torch.uint8) if chunk is None else chunk)
    count = int(read(1, torch.int64))
    if count != int(member.sum()):
        raise _mismatch()
    packed = read(-(-count // 4), torch.uint8)
    two = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], 1).flatten()[:count]
    codes = (two ^ 2).to(guess.dtype) - 2
    escaped = codes == -2
    codes[escaped] = read(int(escaped.sum()), torch.int8).to(codes.dtype)
    wide = escaped & (codes == -128)
    codes[wide] = read(int(wide.sum()), codes.dtype)
    strays = read.left // (8 + codes.element_size())
    index, values = read(strays, torch.int64), read(strays, codes.dtype)
    if read.left or (strays and (int(index.min()) < 0 or int(index.max()) >= len(guess))):
        raise _mismatch()
    guess[member] += codes
    guess[index] = values
    block.copy_(guess.view(block.dtype).view(block.shape))


class _Reader:
    """Takes numbers from bytes, one after the other; RecordError where there are too few."""

    def __init__(self, data: Tensor) -> None:
        self._data = data

    @property
    def left(self) -> int:
        return len(self._data)

    def __call__(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        if size > self.left:
            raise _mismatch()
        part, self._data = self._data[:size], self._data[size:]
        return part.clone().view(dtype)


def _mismatch() -> RecordError:
    return RecordError("the record is not that of what was added to this weight, which is no longer what it was")
