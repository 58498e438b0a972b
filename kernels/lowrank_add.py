"""``W <- round(W + sum_t s_t * B_t A_t)`` in place, for a list of weights, in one pass over their memory.

From top to bottom: the kernel, its variants, the launch table, the public function.

Arithmetic: factors of one half type are multiplied as they are (the products are exact in fp32). Others
are cut into three bf16 parts for the tensor cores: by count 6 x 2r operations for the 4 bytes that move for
each bf16 of W, 16 % of an H100's peak at rank 16 when W moves at the speed of memory. Multiply-adds on the
CUDA cores would take 40 % of theirs at rank 16, and longer than the memory from rank 40 on. Sums are fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles have 64 rows, the height of a warp group's wgmma, and are one cache line wide.
BLOCK_M = 64
ROW_BYTES = 128
# Where W is not aligned each element needs an address of its own: narrower, or the registers spill.
SLOW_BLOCK_N = 32
# One step of a bf16 tensor core over the rank: most patches have rank 16 or less, and more costs registers.
BLOCK_K = 16
NUM_WARPS = 4
# Divided by a block's registers it gives the blocks that stay resident; more would run alone at the end.
REGISTERS_PER_SM = 65536

# The table: one row for each weight, one for each term, of this many int64.
COLUMNS = tl.constexpr(8)
FACTOR_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = "this kernel takes bfloat16, float16 and float32"
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def find_weight(p_weights, n_weights, i_tile):
    """The weight that a tile belongs to: the first that ends behind it."""
    # log2(n_weights) cached loads a tile; a table over the tiles would cost an upload of 4 bytes for each.
    i_low = 0
    i_high = n_weights - 1
    while i_low < i_high:
        i_mid = (i_low + i_high) // 2
        if i_tile < tl.load(p_weights + i_mid * COLUMNS + 5):
            i_high = i_mid
        else:
            i_low = i_mid + 1
    return i_low


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    p = address.to(tl.pointer_type(DTYPE))
    # The hint belongs on the pointer: one on the integer is lost in the cast.
    return tl.multiple_of(p, 16) if ALIGNED else p


@triton.jit
def load_factor(address, o_f, m_f, code, F_DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A block of a factor in its own dtype; in fp32 where only the table knows the dtype."""
    if F_DTYPE is None:
        # Two of the three are masked off and move nothing; a branch here does not compile on Triton 3.6.
        b_code = tl.full([1, 1], code, tl.int64)  # the interpreter makes no mask from a scalar
        b_f = load_factor(address, o_f, m_f & (b_code == 0), code, tl.float32, ALIGNED)
        b_f += load_factor(address, o_f, m_f & (b_code == 1), code, tl.bfloat16, ALIGNED).to(tl.float32)
        b_f += load_factor(address, o_f, m_f & (b_code == 2), code, tl.float16, ALIGNED).to(tl.float32)
    else:
        p_f = pointer(address, F_DTYPE, ALIGNED) + o_f
        b_f = tl.load(p_f, mask=m_f, other=0.0, eviction_policy="evict_last")
    return b_f


@triton.jit
def split(b_x):
    """fp32 -> three bf16 that add up to it exactly: 3 x 8 bits hold all 24."""
    b_hi = b_x.to(tl.bfloat16)
    b_rest = b_x - b_hi.to(tl.float32)
    b_mid = b_rest.to(tl.bfloat16)
    b_lo = (b_rest - b_mid.to(tl.float32)).to(tl.bfloat16)
    return b_hi, b_mid, b_lo


@triton.jit
def dot(b_x, b_y, b_acc, INTERPRET: tl.constexpr):
    if INTERPRET:  # its dot would multiply the bit patterns of bf16
        b_acc = tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), b_acc, input_precision="ieee")
    else:
        b_acc = tl.dot(b_x, b_y, b_acc)
    return b_acc


@triton.jit
def scaled_term(
    p_term,
    p_scaling,
    o_m,
    o_n,
    m_m,
    m_n,
    F_DTYPE: tl.constexpr,
    F_VECTOR: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """s * (B @ A) for the tile at rows ``o_m`` and columns ``o_n``: fp32 [BM, BN]."""
    address_a = tl.load(p_term)
    stride_ar = tl.load(p_term + 1)
    stride_an = tl.load(p_term + 2)
    address_b = tl.load(p_term + 3)
    stride_bm = tl.load(p_term + 4)
    stride_br = tl.load(p_term + 5)
    r = tl.load(p_term + 6).to(tl.int32)
    code = tl.load(p_term + 7)
    scaling = tl.load(p_scaling)
    if F_VECTOR > 1:
        stride_ar = tl.multiple_of(stride_ar, F_VECTOR)
        stride_bm = tl.multiple_of(stride_bm, F_VECTOR)
        r = tl.multiple_of(r, F_VECTOR)
        stride_an = 1
        stride_br = 1
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, r, BK):
        o_k = i_k + tl.arange(0, BK)  # [BK]
        m_k = o_k < r
        o_a = o_k[:, None] * stride_ar + o_n[None, :] * stride_an  # int64, as the strides
        o_b = o_m[:, None] * stride_bm + o_k[None, :] * stride_br
        m_a = m_k[:, None] & m_n[None, :]
        m_b = m_m[:, None] & m_k[None, :]
        # A before B: B goes to shared memory as soon as it is there, and a later load would wait for that.
        b_a = load_factor(address_a, o_a, m_a, code % 4, F_DTYPE, F_VECTOR > 1)  # [BK, BN]
        b_b = load_factor(address_b, o_b, m_b, code // 4, F_DTYPE, F_VECTOR > 1)  # [BM, BK]
        if F_DTYPE is None or F_DTYPE.primitive_bitwidth == 32:
            b_ahi, b_amid, b_alo = split(b_a)
            b_bhi, b_bmid, b_blo = split(b_b)
            # Small products first, or they are rounded off; the three left out are 2^-24 of the whole.
            b_acc = dot(b_blo, b_ahi, b_acc, INTERPRET)
            b_acc = dot(b_bmid, b_amid, b_acc, INTERPRET)
            b_acc = dot(b_bhi, b_alo, b_acc, INTERPRET)
            b_acc = dot(b_bmid, b_ahi, b_acc, INTERPRET)
            b_acc = dot(b_bhi, b_amid, b_acc, INTERPRET)
            b_acc = dot(b_bhi, b_ahi, b_acc, INTERPRET)
        else:
            b_acc = dot(b_b, b_a, b_acc, INTERPRET)
    return scaling * b_acc


@triton.jit
def tile_sum(
    p_terms,
    p_scalings,
    i_term,
    i_term_end,
    o_m,
    o_n,
    m_m,
    m_n,
    F_DTYPE: tl.constexpr,
    F_VECTOR: tl.constexpr,
    ONE_TERM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """The sum of a weight's terms for the tile at rows ``o_m`` and columns ``o_n``: fp32 [BM, BN]."""
    p_term = p_terms + i_term * COLUMNS
    p_scaling = p_scalings + i_term
    if ONE_TERM:  # no second tile of sums beside the one that the term is summed in
        b_sum = scaled_term(p_term, p_scaling, o_m, o_n, m_m, m_n, F_DTYPE, F_VECTOR, BM, BN, BK, INTERPRET)
    else:
        b_sum = tl.zeros([BM, BN], dtype=tl.float32)
        for _ in range(i_term, i_term_end):
            b_sum += scaled_term(p_term, p_scaling, o_m, o_n, m_m, m_n, F_DTYPE, F_VECTOR, BM, BN, BK, INTERPRET)
            p_term += COLUMNS
            p_scaling += 1
    return b_sum


@triton.jit
def locate(p_weight, i_tile, DTYPE: tl.constexpr, W_VECTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A tile of a weight: pointers [BM, BN], rows [BM] and columns [BN], and which of them there are."""
    address_w = tl.load(p_weight)
    stride_wm = tl.load(p_weight + 1)
    stride_wn = tl.load(p_weight + 2)
    m = tl.load(p_weight + 3).to(tl.int32)
    n = tl.load(p_weight + 4).to(tl.int32)
    i_tile_end = tl.load(p_weight + 5).to(tl.int32)
    if W_VECTOR > 1:
        stride_wm = tl.multiple_of(stride_wm, W_VECTOR)
        n = tl.multiple_of(n, W_VECTOR)
        stride_wn = 1

    tiles_n = tl.cdiv(n, BN)
    i_local = i_tile - (i_tile_end - tl.cdiv(m, BM) * tiles_n)
    o_m = (i_local // tiles_n) * BM + tl.arange(0, BM)  # [BM]
    o_n = (i_local % tiles_n) * BN + tl.arange(0, BN)  # [BN]
    o_w = o_m[:, None] * stride_wm + o_n[None, :] * stride_wn  # int64, as the strides
    p_w = pointer(address_w, DTYPE, W_VECTOR > 1) + o_w
    return p_w, o_m, o_n, o_m < m, o_n < n


@triton.jit
def narrow(b_x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 to the nearest, ties to even."""
    if INTERPRET and DTYPE.is_bf16():  # its conversion would cut the last 16 bits off
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits = (b_bits + (0x7FFF + (b_bits >> 16 & 1))) >> 16
        b_y = tl.where(b_x == b_x, b_bits, 0x7FFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_y = b_x.to(DTYPE)
    return b_y


# A variant for n_weights == 1 or a multiple of 16 would be compiled again for nothing.
@triton.jit(do_not_specialize=["n_weights", "n_tiles"])
def lowrank_add_kernel(
    p_weights,  # int64 [n_weights, 8]: address, strides m and n, m, n, tiles up to its end, terms from, to
    p_terms,  # int64 [n_terms, 8]: address of A, strides r and n, address of B, strides m and r, r, dtypes
    p_scalings,  # fp32 [n_terms]
    n_weights,
    n_tiles,
    W_DTYPE: tl.constexpr,
    F_DTYPE: tl.constexpr,  # of all factors; None: the table says which
    W_VECTOR: tl.constexpr,  # > 1: rows of W are contiguous, and 16-byte vectors of so many elements fit
    F_VECTOR: tl.constexpr,  # > 1: the same for rows of A and B
    ONE_TERM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    # The blocks walk side by side along the rows, so that what is in flight shares few A and B, in L2.
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        p_weight = p_weights + find_weight(p_weights, n_weights, i_tile) * COLUMNS
        i_term = tl.load(p_weight + 6)
        i_term_end = tl.load(p_weight + 7)
        p_w, o_m, o_n, m_m, m_n = locate(p_weight, i_tile, W_DTYPE, W_VECTOR, BM, BN)
        m_w = m_m[:, None] & m_n[None, :]
        # W first: the factors come while it is under way. Used once, it must not push them out of the caches.
        b_w = tl.load(p_w, mask=m_w, other=0.0, eviction_policy="evict_first")  # [BM, BN]

        b_sum = tile_sum(
            p_terms,
            p_scalings,
            i_term,
            i_term_end,
            o_m,
            o_n,
            m_m,
            m_n,
            F_DTYPE,
            F_VECTOR,
            ONE_TERM,
            BM,
            BN,
            BK,
            INTERPRET,
        )  # [BM, BN]
        b_w = narrow(b_w.to(tl.float32) + b_sum, W_DTYPE, INTERPRET)
        tl.store(p_w, b_w, mask=m_w, eviction_policy="evict_first")


# Triton decides when it is imported; the answer is what it made of the kernel.
INTERPRET = not isinstance(lowrank_add_kernel, triton.JITFunction)


class Variant(NamedTuple):
    """What one launch is specialised on."""

    w_dtype: torch.dtype
    f_dtype: torch.dtype | None  # None: factors of several dtypes
    w_aligned: bool
    f_aligned: bool
    one_term: bool
    has_modes: bool = False
    turned: bool = False  # the weight lies transposed; told only where it has a mode

    @property
    def fast(self) -> bool:
        return self.w_aligned and self.f_dtype is not None

    @property
    def block_n(self) -> int:
        return ROW_BYTES // self.w_dtype.itemsize if self.fast else SLOW_BLOCK_N

    @property
    def registers(self) -> int:
        """For each thread; as few as spill next to nothing, so that many blocks wait for memory at once."""
        if self.f_dtype is None:
            return 255
        return 128 if self.fast and self.f_aligned and self.one_term else 168

    @property
    def blocks_per_sm(self) -> int:
        return REGISTERS_PER_SM // (32 * NUM_WARPS * self.registers)

    def constants(self) -> dict[str, Any]:
        """The kernel's compile-time arguments."""
        return {
            "W_DTYPE": TL_DTYPES[self.w_dtype],
            "F_DTYPE": None if self.f_dtype is None else TL_DTYPES[self.f_dtype],
            "W_VECTOR": _vector(self.w_dtype) if self.w_aligned else 1,
            "F_VECTOR": _vector(self.f_dtype) if self.f_aligned and self.f_dtype is not None else 1,
            "ONE_TERM": self.one_term,
            "BM": BLOCK_M,
            "BN": self.block_n,
            "BK": BLOCK_K,
            "INTERPRET": INTERPRET,
        }

    def options(self) -> dict[str, Any]:
        """The compiler's options; fused multiply-add is among them because its default differs by release."""
        return {
            "num_warps": NUM_WARPS,
            "num_stages": 1,
            "maxnreg": self.registers,
            "enable_fp_fusion": False,
        }


class _Launch(NamedTuple):
    device: torch.device
    variant: Variant
    weights: Tensor  # int64 [weights of this launch, 8]
    terms: Tensor  # int64 [terms of this device, 8]
    scalings: Tensor  # fp32 [terms of this device]
    modes: Tensor  # int64 [weights of this launch, 4], or of no weight
    n_tiles: int


class _Entry(NamedTuple):
    """A weight's row without the counts that depend on its place in the table, and its terms."""

    row: list[int]  # address, strides m and n, m, n
    term_rows: list[list[int]]
    scalings: list[float]
    mode: list[int]  # empty if the weight has none


class LaunchTable:
    """The update of a list of weights, prepared on the device: built once, launched as often as wanted.

    Arguments, arithmetic and errors are those of :func:`lowrank_add_`. The table holds addresses and keeps
    the tensors alive; after ``tensor.data = other`` it still means the old storage. The upload is enqueued on
    the current stream of each device: launch on the same one, or on one that waits for it.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        n_terms: Sequence[int],
        modes: Sequence[int] = (),
    ) -> None:
        total = sum(n_terms)
        if len(weights) != len(n_terms) or not len(lora_A) == len(lora_B) == len(scalings) == total:
            raise ValueError(
                f"{len(weights)} weights and {len(n_terms)} counts of terms, which sum to {total}, but "
                f"{len(lora_A)} lora_A, {len(lora_B)} lora_B and {len(scalings)} scalings"
            )
        self._tensors = (tuple(weights), tuple(lora_A), tuple(lora_B))
        devices: dict[torch.device, dict[Variant, list[_Entry]]] = {}
        first = 0
        for i, weight in enumerate(weights):
            terms = range(first, first + n_terms[i])
            first = terms.stop
            _check(i, weight, terms, lora_A, lora_B)
            terms = [t for t in terms if lora_A[t].shape[0] > 0]
            if not terms or weight.numel() == 0:
                continue
            factors = [lora_A[t] for t in terms], [lora_B[t] for t in terms]
            variant, entry = _describe(weight, *factors, [scalings[t] for t in terms], modes[4 * i : 4 * i + 4])
            devices.setdefault(weight.device, {}).setdefault(variant, []).append(entry)
        self._launches = [launch for device, groups in devices.items() for launch in _upload(device, groups)]

    def launch(self) -> None:
        """Add all terms to all weights: one launch for each device and variant, without waiting for any."""
        for launch in self._launches:
            variant = launch.variant
            blocks = min(launch.n_tiles, _multiprocessors(launch.device) * variant.blocks_per_sm)
            tables: list[Tensor] = [launch.weights, launch.terms, launch.scalings]
            counts = launch.weights.shape[0], launch.n_tiles
            options = variant.constants() | variant.options()
            with _on(launch.device):
                if variant.has_modes:
                    from .rounding import lowrank_round_kernel

                    lowrank_round_kernel[(blocks,)](*tables, launch.modes, *counts, TURNED=variant.turned, **options)
                else:
                    lowrank_add_kernel[(blocks,)](*tables, *counts, **options)


def _check(i: int, weight: Tensor, terms: range, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor]) -> None:
    if weight.dtype not in TL_DTYPES:
        raise TypeError(f"weights[{i}] is {weight.dtype}; {KINDS}")
    if weight.dim() != 2 or max(weight.shape) >= 2**31 - 256:
        raise ValueError(f"weights[{i}] is of shape {tuple(weight.shape)}; 2-D and below 2^31 is needed")
    if weight.device.type != ("cpu" if INTERPRET else "cuda"):
        place = "the CPU (TRITON_INTERPRET is set)" if INTERPRET else "a GPU"
        raise ValueError(f"weights[{i}] is on {weight.device}; this kernel runs on {place}")
    m, n = weight.shape
    stride_m, stride_n = weight.stride()
    if (stride_m == 0 and m > 1) or (stride_n == 0 and n > 1):
        raise ValueError(f"weights[{i}] has strides {weight.stride()}: its elements share memory")
    for t in terms:
        a, b = lora_A[t], lora_B[t]
        if a.dtype not in FACTOR_CODES or b.dtype not in FACTOR_CODES:
            raise TypeError(f"lora_A[{t}] and lora_B[{t}] are {a.dtype} and {b.dtype}; {KINDS}")
        if a.device != weight.device or b.device != weight.device:
            raise ValueError(f"term {t} is on {a.device} and {b.device}, but weights[{i}] on {weight.device}")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or (b.shape[0], a.shape[1]) != (m, n):
            shapes = f"lora_B[{t}] {tuple(b.shape)} @ lora_A[{t}] {tuple(a.shape)}"
            raise ValueError(f"{shapes} does not fit weights[{i}] {(m, n)}")


def _describe(
    weight: Tensor, lora_A: list[Tensor], lora_B: list[Tensor], scalings: list[float], mode: Sequence[int] = ()
) -> tuple[Variant, _Entry]:
    """The variant for one weight, and its rows of the table."""
    # W' += (B A)' = A' B': seen so, a weight that lies transposed has contiguous rows as well.
    turned = weight.stride(0) < weight.stride(1)
    if turned:
        weight = weight.T
        lora_A, lora_B = [b.T for b in lora_B], [a.T for a in lora_A]
    dtypes = {factor.dtype for factor in (*lora_A, *lora_B)}
    f_dtype = dtypes.pop() if len(dtypes) == 1 else None
    variant = Variant(
        w_dtype=weight.dtype,
        f_dtype=f_dtype,
        w_aligned=_aligned(weight),
        f_aligned=f_dtype is not None and all(map(_aligned, (*lora_A, *lora_B))),
        one_term=len(lora_A) == 1,
        has_modes=any(mode[:1]),
        turned=turned and any(mode[:1]),
    )
    term_rows = [
        [
            a.data_ptr(),
            *a.stride(),
            b.data_ptr(),
            *b.stride(),
            a.shape[0],
            FACTOR_CODES[a.dtype] + 4 * FACTOR_CODES[b.dtype],
        ]
        for a, b in zip(lora_A, lora_B, strict=True)
    ]
    return variant, _Entry([weight.data_ptr(), *weight.stride(), *weight.shape], term_rows, scalings, list(mode))


def _aligned(matrix: Tensor) -> bool:
    """Whether 16-byte vectors cover the rows exactly."""
    vector = _vector(matrix.dtype)
    row_stride, column_stride = matrix.stride()
    return (
        column_stride == 1
        and row_stride % vector == 0
        and matrix.shape[1] % vector == 0
        and matrix.data_ptr() % 16 == 0
    )


def _vector(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _upload(device: torch.device, groups: dict[Variant, list[_Entry]]) -> list[_Launch]:
    """Bring the rows of all groups of a device there, in one copy that the host does not wait for."""
    weight_rows: list[int] = []
    term_rows: list[int] = []
    scalings: list[float] = []
    modes: list[int] = []
    tiles: list[int] = []
    for variant, entries in groups.items():
        n_tiles = 0
        for entry in entries:
            m, n = entry.row[3:]
            n_tiles += -(-m // BLOCK_M) * -(-n // variant.block_n)
            weight_rows += [*entry.row, n_tiles, len(scalings), len(scalings) + len(entry.scalings)]
            term_rows += [value for row in entry.term_rows for value in row]
            scalings += entry.scalings
            modes += entry.mode if variant.has_modes else []
        tiles.append(n_tiles)
    # Two fp32 fill one int64, so that the scalings travel in the same copy.
    packed = torch.zeros(len(scalings) + len(scalings) % 2, dtype=torch.float32)
    packed[: len(scalings)] = torch.tensor(scalings, dtype=torch.float32)
    table = torch.cat([torch.tensor(weight_rows + term_rows + modes, dtype=torch.int64), packed.view(torch.int64)])
    if device.type == "cuda":
        with _on(device):
            table = table.pin_memory().to(device, non_blocking=True)
    sizes = [len(weight_rows), len(term_rows), len(modes), len(packed) // 2]
    on_weights, on_terms, on_modes, on_scalings = table.split(sizes)
    counts = [len(entries) for entries in groups.values()]
    weights = on_weights.view(-1, COLUMNS.value).split(counts)
    shared = on_terms.view(-1, COLUMNS.value), on_scalings.view(torch.float32)
    of_launch = on_modes.view(-1, 4).split(
        [count if variant.has_modes else 0 for variant, count in zip(groups, counts, strict=True)]
    )
    return [
        _Launch(device, variant, rows, *shared, mode_rows, n_tiles)
        for variant, rows, mode_rows, n_tiles in zip(groups, weights, of_launch, tiles, strict=True)
    ]


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def lowrank_add_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    modes: Sequence[int] = (),
) -> None:
    """In place, for each weight: ``W <- round(W + sum_t scaling_t * (lora_B_t @ lora_A_t))``.

    Args:
        weights: [m, n] each; bf16, fp16 or fp32; any strides, but no two elements may share memory, within a
            weight or between weights; on any GPUs (on the CPU under TRITON_INTERPRET=1).
        lora_A: [r, n] each, the terms of all weights one after the other; bf16, fp16 or fp32 in any mix, any
            strides, any rank; on the device of their weight.
        lora_B: [m, r] each, as ``lora_A``.
        scalings: one for each term.
        n_terms: how many terms belong to each weight.
        modes: empty, or a ``portllm.noise.Mode`` for each weight, one after the other.

    Factors are used as stored, products and sums are fp32, each term is scaled when its sum is complete, and
    the weight is rounded once, to nearest even or as its mode says. A factor that is not finite, or above
    3.38e38, can give NaN where plain arithmetic gives an infinity. Deterministic. The host does not wait for
    the device.

    Raises:
        TypeError: a weight or a factor of another dtype; the message names it.
        ValueError: lengths, shapes, strides or devices that do not fit. Nothing has been written then.
    """
    LaunchTable(weights, lora_A, lora_B, scalings, n_terms, modes).launch()
