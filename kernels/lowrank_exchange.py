"""Take terms off weights, to the last bit, and add others, for a list of weights, in one pass over their memory.

From top to bottom: the kernels, their variants, one launch, the public functions. ``portllm/record.py`` tells what a
record is. Here its chunks are the tiles of the kernel, in 32-bit words; none if every weight is ``round(w' - d)``:

    header       number of members, plus 2^16 x number of strays, plus 2^24 x mode
    each stray   2^16 x its place in the tile + its old bits; two words if the weight has 32 bits
    codes        of each member, row by row, the first in the lowest bits: 4 bits in mode 0, 8 bits in mode 1; the
                 least such number stands for an escape
    escapes      of each, in order, the code at the weight's size; zeros up to the end of a word

In mode 2 the old bits follow the header as they are: where there are many strays, or where the above would be longer.
For fp32 weights those are members as well where ``w' - d`` is midway between two weights, which w' and d tell.

A tile takes its place in a scratch buffer when it knows how much it needs. If there is no more room it writes nothing
else, the weight least of all, and the host launches again for such tiles. A second kernel puts the chunks in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from portllm.errors import BackendError, RecordError
from portllm.record import Record

from .lowrank_add import (
    BLOCK_M,
    COLUMNS,
    INTERPRET,
    NUM_WARPS,
    REGISTERS_PER_SM,
    LaunchTable,
    Variant,
    _check,
    _describe,
    _Entry,
    _Launch,
    _multiprocessors,
    _on,
    _upload,
    find_weight,
    locate,
    narrow,
    pointer,
    tile_sum,
)

# Of the kernels' arithmetic and of the format, together.
VERSION = 1
# The kernel looks for each stray in the whole tile.
MAX_STRAYS = tl.constexpr(63)
# Of the weights' bytes, what is set aside for their records at first: enough for a delta of 5 %.
SCRATCH_PART = 1 / 32
# And words for any list of weights, so that small ones do not need a second launch.
SCRATCH_LEAST = 1 << 14
# Sums, the weights' old bits and the codes' places live at once.
REGISTERS = 255
BLOCK_COPY = 1024
BITS = {2: tl.int16, 4: tl.int32}
EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}


@triton.jit
def as_float(b_bits, W_DTYPE: tl.constexpr, BITS: tl.constexpr):
    return b_bits.to(BITS).to(W_DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def as_unsigned(b_x, BITS: tl.constexpr):
    """The lowest bits, of as many as the weight has, as int32."""
    b_x = b_x.to(tl.int32)
    return b_x & 0xFFFF if BITS.primitive_bitwidth == 16 else b_x


@triton.jit
def compare(b_bits, b_sum, m_w, W_DTYPE: tl.constexpr, BITS: tl.constexpr, EXPONENT: tl.constexpr):
    """Bits of ``round(w' - d)``, and whether the element is a member."""
    b_after = as_float(b_bits, W_DTYPE, BITS)
    b_rest = b_after - b_sum
    # Which NaN a difference is depends on the machine; here there is one.
    if W_DTYPE.is_fp16():
        b_guess = as_unsigned(b_rest.to(tl.float16).to(tl.int16, bitcast=True), BITS)
        b_guess = tl.where((b_guess & 0x7FFF) > 0x7C00, 0x7E00, b_guess)
    else:
        b_guess = b_rest.to(tl.int32, bitcast=True)
        b_guess = tl.where((b_guess & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, b_guess)
        if W_DTYPE.is_bf16():  # half away from zero: this is only a guess
            b_guess = (b_guess + 0x8000) >> 16 & 0xFFFF
    b_member = (b_bits & EXPONENT) > (b_guess & EXPONENT)
    if W_DTYPE.is_fp32():
        # The exact w' - d is b_rest + b_lost (Knuth's sum of two), if that is finite.
        b_minus = b_rest - b_after
        b_lost = (b_after - (b_rest - b_minus)) + (-b_sum - b_minus)
        b_step = b_lost + b_lost
        b_member |= (b_lost != 0) & ((b_rest + b_step) - b_rest == b_step)
    return b_guess, b_member & m_w


@triton.jit
def places(b_count):
    """Of int32 [BM, BN], row by row: the sum of what comes before."""
    b_rows = tl.sum(b_count, 1)  # [BM]
    b_above = tl.cumsum(b_rows, 0) - b_rows
    return tl.cumsum(b_count, 1) - b_count + b_above[:, None]


@triton.jit
def words_of(n, BITS: tl.constexpr):
    """Words that n weights fill."""
    return n if BITS.primitive_bitwidth == 32 else (n + 1) // 2


@triton.jit
def count(m):
    return tl.sum(m.to(tl.int32), 0)


@triton.jit
def dense(address, m_n, BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers into a copy of what there is of a tile, row by row."""
    return pointer(address, BITS, False) + (tl.arange(0, BM)[:, None] * count(m_n) + tl.arange(0, BN)[None, :])


@triton.jit
def restore(
    b_bits,  # int32 [BM, BN]: of w', unsigned
    b_sum,
    m_m,
    m_n,
    address,
    n_words,
    W_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The old bits, and whether the chunk can be that of this tile; where it cannot, nothing is read beyond it."""
    STRAY_WORDS: tl.constexpr = BITS.primitive_bitwidth // 16
    m_w = m_m[:, None] & m_n[None, :]
    b_guess, b_member = compare(b_bits, b_sum, m_w, W_DTYPE, BITS, EXPONENT)
    n_members = tl.sum(tl.sum(b_member.to(tl.int32), 1), 0)
    p_chunk = pointer(address, tl.int32, False)
    b_old = b_guess
    fits = (n_words == 0) & (n_members == 0)
    if n_words > 0:
        header = tl.load(p_chunk)
        mode = header >> 24 & 3
        n_strays = header >> 16 & 0xFF
        if mode == 2:
            fits = n_words == 1 + words_of(count(m_m) * count(m_n), BITS)
            if fits:
                b_old = as_unsigned(tl.load(dense(address + 4, m_n, BITS, BM, BN), mask=m_w, other=0), BITS)
        else:
            in_word = 3 - mode  # 2^3 codes, or 2^2
            width = 4 << mode
            at_codes = 1 + n_strays * STRAY_WORDS
            at_escapes = at_codes + ((n_members + (1 << in_word) - 1) >> in_word)
            fits = (mode < 2) & (n_members == (header & 0xFFFF)) & (at_escapes <= n_words)
            if fits:
                b_place = places(b_member.to(tl.int32))
                b_word = tl.load(p_chunk + at_codes + (b_place >> in_word), mask=b_member, other=0)
                b_code = b_word >> ((b_place & ((1 << in_word) - 1)) * width)
                least = 1 << (width - 1)
                b_code = ((b_code & (2 * least - 1)) ^ least) - least
                b_escape = b_member & (b_code == -least)
                n_escapes = tl.sum(tl.sum(b_escape.to(tl.int32), 1), 0)
                fits = n_words == at_escapes + words_of(n_escapes, BITS)
                if fits:
                    if n_escapes > 0:
                        p_escape = pointer(address + 4 * at_escapes, BITS, False) + places(b_escape.to(tl.int32))
                        b_code = tl.where(b_escape, tl.load(p_escape, mask=b_escape, other=0).to(tl.int32), b_code)
                    b_old = as_unsigned(b_guess + tl.where(b_member, b_code, 0), BITS)
                    b_here = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
                    for i in range(n_strays):
                        p_stray = p_chunk + 1 + i * STRAY_WORDS
                        stray = tl.load(p_stray)
                        if STRAY_WORDS == 2:
                            b_old = tl.where(b_here == stray, tl.load(p_stray + 1), b_old)
                        else:
                            b_old = tl.where(b_here == (stray >> 16), stray & 0xFFFF, b_old)
    return b_old, fits


@triton.jit
def record(
    b_old,  # int32 [BM, BN], unsigned
    b_bits,
    b_sum,
    m_m,
    m_n,
    p_w,
    p_heap,
    p_start,
    p_length,
    W_DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Write the new bits and the chunk that brings the old ones back, if there is room for it."""
    STRAY_WORDS: tl.constexpr = BITS.primitive_bitwidth // 16
    SIGN: tl.constexpr = 1 << 15
    m_w = m_m[:, None] & m_n[None, :]
    b_guess, b_member = compare(b_bits, b_sum, m_w, W_DTYPE, BITS, EXPONENT)
    b_code = b_old - b_guess
    if STRAY_WORDS == 1:
        b_code = ((b_code & 0xFFFF) ^ SIGN) - SIGN
    b_stray = m_w & (b_code != 0) & (b_member == 0)
    b_long = b_member & ((b_code < -7) | (b_code > 7))
    b_longer = b_member & ((b_code < -127) | (b_code > 127))
    # Two counts in one sum, each up to 4096.
    counts = tl.sum(tl.sum(b_member.to(tl.int32) + (b_long.to(tl.int32) << 16), 1), 0)
    n_members = counts & 0xFFFF
    n_long = counts >> 16
    counts = tl.sum(tl.sum(b_stray.to(tl.int32) + (b_longer.to(tl.int32) << 16), 1), 0)
    n_strays = counts & 0xFFFF
    n_longer = counts >> 16

    in_4_bits = (n_members + 7) // 8 + words_of(n_long, BITS)
    in_8_bits = (n_members + 3) // 4 + words_of(n_longer, BITS)
    copied = 1 + words_of(count(m_m) * count(m_n), BITS)
    mode = (in_8_bits < in_4_bits).to(tl.int32)
    n_words = 1 + n_strays * STRAY_WORDS + tl.minimum(in_4_bits, in_8_bits)
    is_copy = (n_strays > MAX_STRAYS) | (n_words > copied)
    n_words = tl.where(is_copy, copied, n_words)
    n_words = tl.where(n_members + n_strays == 0, 0, n_words)

    taken = tl.atomic_add(p_heap, n_words.to(tl.int64), sem="relaxed")
    there_is_room = (n_words == 0) | (taken + n_words <= tl.load(p_heap + 2))
    tl.store(p_length, n_words)
    if there_is_room:
        tl.store(p_w, b_bits.to(BITS), mask=m_w, eviction_policy="evict_first")
        address = tl.load(p_heap + 1) + 4 * taken
        tl.store(p_start, address)
        p_chunk = pointer(address, tl.int32, False)
        if is_copy:
            tl.store(p_chunk, 2 << 24)
            tl.store(dense(address + 4, m_n, BITS, BM, BN), b_old.to(BITS), mask=m_w)
        elif n_words > 0:
            tl.store(p_chunk, n_members | n_strays << 16 | mode << 24)
            in_word = 3 - mode
            width = 4 << mode
            least = 1 << (width - 1)
            at_codes = 1 + n_strays * STRAY_WORDS
            at_escapes = at_codes + ((n_members + (1 << in_word) - 1) >> in_word)
            b_escape = b_member & ((b_code <= -least) | (b_code >= least))
            b_place = places(b_member.to(tl.int32))
            b_field = tl.where(b_escape, least, b_code & (2 * least - 1))
            b_field = b_field << ((b_place & ((1 << in_word) - 1)) * width)
            # The scratch is zeros. Each word is put together from several threads' codes.
            tl.atomic_or(
                p_chunk + (at_codes + (b_place >> in_word)).to(tl.int64), b_field, mask=b_member, sem="relaxed"
            )
            if at_escapes < n_words:
                p_escape = pointer(address + 4 * at_escapes, BITS, False) + places(b_escape.to(tl.int32)).to(tl.int64)
                tl.store(p_escape, b_code.to(BITS), mask=b_escape)
            # There are few: one after the other takes less than a scan, and here, at the end, few registers.
            b_here = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            if STRAY_WORDS == 2:
                b_key = (b_here.to(tl.int64) << 32) | (b_old.to(tl.int64) & 0xFFFFFFFF)
            else:
                b_key = b_here << 16 | b_old
            NO_KEY: tl.constexpr = 1 << 30 if STRAY_WORDS == 1 else 1 << 62
            key = tl.full((), -1, b_key.dtype)
            for i in range(n_strays):
                key = tl.min(tl.min(tl.where(b_stray & (b_key > key), b_key, NO_KEY), 1), 0)
                p_stray = p_chunk + 1 + i * STRAY_WORDS
                if STRAY_WORDS == 2:
                    tl.store(p_stray, (key >> 32).to(tl.int32))
                    tl.store(p_stray + 1, key.to(tl.int32))
                else:
                    tl.store(p_stray, key)


@triton.jit(do_not_specialize=["n_weights", "n_tiles"])
def lowrank_exchange_kernel(
    p_old_weights,  # the tables of lowrank_add_kernel; both sides have the same weights in the same order
    p_old_terms,
    p_old_scalings,
    p_new_weights,
    p_new_terms,
    p_new_scalings,
    p_old_starts,  # int64 [n_tiles]: the address of each tile's chunk; negative: the tile is not touched
    p_old_lengths,  # int32 [n_tiles]: its words; negative: there is no such chunk
    p_starts,  # int64 [n_tiles]: the same of the new chunks; tiles that have one already are not touched
    p_lengths,  # int32 [n_tiles]
    p_heap,  # int64 [4]: words taken, address, words that there are, a weight + 1 with a chunk that is not its
    n_weights,
    n_tiles,
    W_DTYPE: tl.constexpr,
    W_VECTOR: tl.constexpr,
    OLD_DTYPE: tl.constexpr,  # F_DTYPE, F_VECTOR and the terms of each side: none, one or more (2)
    OLD_VECTOR: tl.constexpr,
    OLD_TERMS: tl.constexpr,
    NEW_DTYPE: tl.constexpr,
    NEW_VECTOR: tl.constexpr,
    NEW_TERMS: tl.constexpr,
    RECORD: tl.constexpr,
    BITS: tl.constexpr,  # the integer of the weight's size
    EXPONENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        is_due = i_tile >= 0
        if OLD_TERMS:
            is_due &= tl.load(p_old_starts + i_tile) >= 0
        if RECORD:
            is_due &= tl.load(p_starts + i_tile) < 0
        if is_due:
            i_weight = find_weight(p_old_weights, n_weights, i_tile)
            p_old_weight = p_old_weights + i_weight * COLUMNS
            p_new_weight = p_new_weights + i_weight * COLUMNS
            p_w, o_m, o_n, m_m, m_n = locate(p_old_weight, i_tile, BITS, W_VECTOR, BM, BN)
            m_w = m_m[:, None] & m_n[None, :]
            b_bits = as_unsigned(tl.load(p_w, mask=m_w, other=0, eviction_policy="evict_first"), BITS)
            is_good = i_tile >= 0
            if OLD_TERMS:
                b_sum = tile_sum(
                    p_old_terms,
                    p_old_scalings,
                    tl.load(p_old_weight + 6),
                    tl.load(p_old_weight + 7),
                    o_m,
                    o_n,
                    m_m,
                    m_n,
                    OLD_DTYPE,
                    OLD_VECTOR,
                    OLD_TERMS == 1,
                    BM,
                    BN,
                    BK,
                    INTERPRET,
                )
                address = tl.load(p_old_starts + i_tile)
                n_words = tl.load(p_old_lengths + i_tile)
                b_bits, is_good = restore(b_bits, b_sum, m_m, m_n, address, n_words, W_DTYPE, BITS, EXPONENT, BM, BN)
                if is_good == 0:
                    tl.store(p_heap + 3, (i_weight + 1).to(tl.int64))
            if is_good:
                if NEW_TERMS:
                    b_old = b_bits
                    b_sum = tile_sum(
                        p_new_terms,
                        p_new_scalings,
                        tl.load(p_new_weight + 6),
                        tl.load(p_new_weight + 7),
                        o_m,
                        o_n,
                        m_m,
                        m_n,
                        NEW_DTYPE,
                        NEW_VECTOR,
                        NEW_TERMS == 1,
                        BM,
                        BN,
                        BK,
                        INTERPRET,
                    )
                    b_w = narrow(as_float(b_old, W_DTYPE, BITS) + b_sum, W_DTYPE, INTERPRET)
                    b_bits = as_unsigned(b_w.to(BITS, bitcast=True), BITS)
                    if RECORD:
                        record(
                            b_old,
                            b_bits,
                            b_sum,
                            m_m,
                            m_n,
                            p_w,
                            p_heap,
                            p_starts + i_tile,
                            p_lengths + i_tile,
                            W_DTYPE,
                            BITS,
                            EXPONENT,
                            BM,
                            BN,
                        )
                if not RECORD:
                    tl.store(p_w, b_bits.to(BITS), mask=m_w, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_tiles"])
def gather_kernel(
    p_starts,  # int64 [n_tiles]: addresses
    p_lengths,  # int32 [n_tiles]
    p_ends,  # int64 [n_tiles]: sums of the lengths up to each, and with it
    p_data,  # int32
    n_tiles,
    BLOCK: tl.constexpr,
):
    """Put the chunks one after the other."""
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        n_words = tl.load(p_lengths + i_tile)
        p_from = pointer(tl.load(p_starts + i_tile), tl.int32, False)
        p_to = p_data + (tl.load(p_ends + i_tile) - n_words)
        for i in range(0, n_words, BLOCK):
            o_word = i + tl.arange(0, BLOCK)
            m_word = o_word < n_words
            tl.store(p_to + o_word, tl.load(p_from + o_word, mask=m_word), mask=m_word)


def constants(old: Variant | None, new: Variant | None, recording: bool) -> dict[str, Any]:
    """The compile-time arguments of ``lowrank_exchange_kernel``, for a list with these variants on its two sides."""
    some = old or new
    assert some is not None
    shared = some.constants()
    chosen = {name: shared[name] for name in ("W_DTYPE", "W_VECTOR", "BM", "BN", "BK", "INTERPRET")}
    for side, variant in (("OLD", old), ("NEW", new)):
        own = (variant or some).constants()
        chosen |= {f"{side}_DTYPE": own["F_DTYPE"], f"{side}_VECTOR": own["F_VECTOR"]}
        chosen[f"{side}_TERMS"] = 0 if variant is None else 1 if variant.one_term else 2
    bits, exponent = BITS[some.w_dtype.itemsize], EXPONENTS[some.w_dtype]
    return chosen | {"RECORD": recording, "BITS": bits, "EXPONENT": exponent}


def options(old: Variant | None, new: Variant | None) -> dict[str, Any]:
    some = old or new
    assert some is not None
    return some.options() | {"maxnreg": REGISTERS}


class _Terms(NamedTuple):
    variant: Variant
    entry: _Entry
    by: str
    lora_A: Sequence[Tensor]
    lora_B: Sequence[Tensor]
    scalings: Sequence[float]


class _Job(NamedTuple):
    """One weight of a pass."""

    index: int
    weight: Tensor
    old: _Terms | None
    new: _Terms | None
    record: Record | None  # of the old terms


class _Chunks(NamedTuple):
    starts: Tensor  # int64 [tiles]: addresses, or -1
    lengths: Tensor  # int32 [tiles]: words


class _Pass:
    """The weights of one device that one variant of the kernel takes."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        self.jobs = jobs
        self._device = jobs[0].weight.device
        self._counts = [_tiles(job.weight, (job.old or job.new).variant) for job in jobs]  # type: ignore[union-attr]
        self._n_tiles = sum(self._counts)
        self._old = _side(self._device, [job.old for job in jobs])
        self._new = _side(self._device, [job.new for job in jobs])
        self._kept: list[Tensor] = []  # what the kernels know by its address
        self._chunks = self._read([job.record for job in jobs]) if self._old else None
        self._made = _Chunks(
            torch.full((self._n_tiles,), -1, dtype=torch.int64, device=self._device),
            torch.zeros(self._n_tiles, dtype=torch.int32, device=self._device),
        )
        weight_bytes = sum(job.weight.nbytes for job in jobs)
        self._set_heap(SCRATCH_LEAST + int(weight_bytes * SCRATCH_PART) // 4 if self._new else 0)

    def _read(self, records: Sequence[Record | None]) -> _Chunks:
        """Where the chunks lie, with a length of -1 where the lengths do not add up to what there is."""
        data, lengths = [], []
        for job, record, count in zip(self.jobs, records, self._counts, strict=True):
            if record is None or len(record.lengths) != count or record.data.nbytes % 4:
                raise _mismatch(job.index)
            part = record.data.to(self._device)
            data.append(part if part.data_ptr() % 4 == 0 else part.clone())
            lengths.append(record.lengths.to(self._device))
        self._kept += data
        length = torch.cat(lengths).to(torch.int32) & 0xFFFF
        end = length.cumsum(0)
        # By weight: its last tile, where it lies and how many words it has.
        stops = accumulate(self._counts)
        table = [[stop - 1, part.data_ptr(), part.nbytes // 4] for stop, part in zip(stops, data, strict=True)]
        last, address, words = torch.tensor(table, dtype=torch.int64).to(self._device).unbind(1)
        stop = end[last]
        before = torch.cat([stop.new_zeros(1), stop[:-1]])
        count = torch.tensor(self._counts).to(self._device)

        def by_tile(value: Tensor) -> Tensor:
            return value.repeat_interleave(count, output_size=self._n_tiles)

        start = by_tile(address - 4 * before) + 4 * (end - length)
        return _Chunks(start, torch.where(by_tile(stop - before == words), length, -1))

    def _set_heap(self, words: int) -> None:
        scratch = torch.zeros(words, dtype=torch.int32, device=self._device)
        self._kept.append(scratch)
        self._heap = torch.tensor([0, scratch.data_ptr(), words, 0], dtype=torch.int64).to(self._device)

    def _launch(self, old: _Launch | None, new: _Launch | None, chunks: _Chunks | None, recording: bool) -> None:
        variants = [side and side.variant for side in (old, new)]
        tables = [(side.weights, side.terms, side.scalings) for side in (old or new, new or old) if side]
        with _on(self._device):
            lowrank_exchange_kernel[(self._blocks(REGISTERS),)](
                *tables[0],
                *tables[1],
                *(chunks or self._made),
                *self._made,
                self._heap,
                len(self.jobs),
                self._n_tiles,
                **constants(*variants, recording),
                **options(*variants),
            )

    def _blocks(self, registers: int) -> int:
        resident = REGISTERS_PER_SM // (32 * NUM_WARPS * registers)
        return min(self._n_tiles, _multiprocessors(self._device) * resident)

    def start(self) -> None:
        self._launch(self._old, self._new, self._chunks, recording=self._new is not None)

    def finish(self) -> list[Record | None]:
        """Wait for the launch, repeat it for the tiles without room, and return the new records."""
        while True:
            without_room = (self._made.lengths * (self._made.starts < 0)).sum()
            needed, broken = torch.stack([without_room, self._heap[3]]).tolist()
            if broken:
                raise _mismatch(self.jobs[broken - 1].index)
            if needed == 0:
                break
            self._set_heap(needed)
            self.start()
        if self._new is None:
            return [None] * len(self.jobs)
        end = self._made.lengths.cumsum(0)
        stops = end[torch.tensor([*accumulate(self._counts)], device=self._device) - 1].tolist()
        data = torch.empty(stops[-1], dtype=torch.int32, device=self._device)
        with _on(self._device):
            gather_kernel[(self._blocks(32),)](*self._made, end, data, self._n_tiles, BLOCK=BLOCK_COPY)
        lengths = self._made.lengths.to(torch.int16).split(self._counts)
        parts = zip(lengths, [0, *stops[:-1]], stops, self.jobs, strict=True)
        return [Record(own, data[start:stop].view(torch.uint8), job.new.by) for own, start, stop, job in parts]

    def undo(self) -> None:
        """Bring the tiles that were done back to the old terms, of which the records still hold."""
        self._launch(self._new, self._old, self._made, recording=False)


def _side(device: torch.device, terms: Sequence[_Terms | None]) -> _Launch | None:
    groups: dict[Variant, list[_Entry]] = {}
    for own in terms:
        if own is not None:
            groups.setdefault(own.variant, []).append(own.entry)
    return next(iter(_upload(device, groups)), None)


def _tiles(weight: Tensor, variant: Variant) -> int:
    # As _describe turns it.
    m, n = weight.shape if weight.stride(0) >= weight.stride(1) else weight.shape[::-1]
    return -(-m // BLOCK_M) * -(-n // variant.block_n)


def _mismatch(index: int) -> RecordError:
    return RecordError(
        f"the record of weights[{index}] is not that of what was added to it, or the weight is no longer what it was"
    )


def summed_by(weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> str:
    """Whose sums, and in what tiles, a record of these terms on the weight is of."""
    variant, _ = _describe(weight, list(lora_A), list(lora_B), [])
    return _by(weight, variant)


def _by(weight: Tensor, variant: Variant) -> str:
    if INTERPRET:
        where = "interpreted"
    else:
        major, minor = torch.cuda.get_device_capability(weight.device)
        where = f"sm_{major}{minor}"
    return f"triton {triton.__version__}, {where}, {BLOCK_M} x {variant.block_n}, {VERSION}"


def lowrank_exchange_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_old: Sequence[int],
    n_new: Sequence[int],
    records: Sequence[Record | None],
) -> list[Record | None]:
    """In place, for each weight: take off its old terms, to the last bit, and add its new ones.

    Args:
        weights, lora_A, lora_B, scalings: as for ``lowrank_add_``; of each weight the old terms come first.
        n_old, n_new: how many terms are taken off each weight, and how many are added.
        records: of the old terms, from an earlier call; None where there are none.

    What the new terms leave is, bit for bit, ``lowrank_add_`` of them on the weights without the old ones. Weights
    whose variants agree share a launch. The host waits for the device: it must know whether there was room.

    Returns:
        The record of the new terms of each weight, on its device; None where there are none.

    Raises:
        TypeError, ValueError: as ``lowrank_add_``.
        BackendError: the terms were summed elsewhere, or in other tiles. Nothing has been written.
        RecordError: a record is not that of what was added to the weight. What was to be exchanged for new terms is
            as it was; what was to be taken off may be off.
        torch.OutOfMemoryError: every weight is as it was.
    """
    made: list[Record | None] = [None] * len(weights)
    jobs = []
    start = 0
    for i, weight in enumerate(weights):
        middle, stop = start + n_old[i], start + n_old[i] + n_new[i]
        _check(i, weight, range(start, stop), lora_A, lora_B)
        old, new = (
            _terms(weight, lora_A[part], lora_B[part], scalings[part])
            for part in (slice(start, middle), slice(middle, stop))
        )
        start = stop
        record = records[i]
        if record is not None and old is not None and record.by != old.by:
            raise BackendError(f"the terms of weights[{i}] were added by {record.by}, but this is {old.by}")
        if weight.numel():
            jobs.append(_Job(i, weight, old, new, record))
        elif new is not None:
            made[i] = Record(torch.empty(0, dtype=torch.int16), torch.empty(0, dtype=torch.uint8), new.by)

    # Each side's sums are made in its own tiles: where they differ the old terms come off first.
    apart = [job for job in jobs if job.old and job.new and job.old.by != job.new.by]
    first = _passes([job._replace(new=None) for job in apart])
    bare = {job.index for job in apart}
    recorded = _passes([job._replace(old=None, record=None) if job.index in bare else job for job in jobs if job.new])
    last = _passes([job for job in jobs if not job.new])
    back = LaunchTable(*_arguments(apart))
    _run(first)
    try:
        for job, record in _run(recorded):
            made[job.index] = record
    except BaseException:
        for one in recorded:
            one.undo()
        back.launch()
        raise
    _run(last)
    return made


def _terms(
    weight: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], scalings: Sequence[float]
) -> _Terms | None:
    if not lora_A:
        return None
    variant, entry = _describe(weight, list(lora_A), list(lora_B), list(scalings))
    return _Terms(variant, entry, _by(weight, variant), lora_A, lora_B, scalings)


def _passes(jobs: Sequence[_Job]) -> list[_Pass]:
    groups: dict[tuple[Any, ...], list[_Job]] = {}
    for job in jobs:
        key = job.weight.device, job.old and job.old.variant, job.new and job.new.variant
        groups.setdefault(key, []).append(job)
    return [_Pass(group) for group in groups.values()]


def _run(passes: Sequence[_Pass]) -> list[tuple[_Job, Record | None]]:
    for one in passes:  # all devices at once
        one.start()
    return [(job, record) for one in passes for job, record in zip(one.jobs, one.finish(), strict=True)]


def _arguments(jobs: Sequence[_Job]) -> tuple[list[Any], ...]:
    """Of ``lowrank_add_``, for the old terms."""
    olds = [job.old for job in jobs if job.old]
    lora_A = [factor for old in olds for factor in old.lora_A]
    lora_B = [factor for old in olds for factor in old.lora_B]
    scalings = [scaling for old in olds for scaling in old.scalings]
    return [job.weight for job in jobs], lora_A, lora_B, scalings, [len(old.scalings) for old in olds]
