"""The update of ``lowrank_add`` for weights that are rounded by chance, or whose zeros stay.

The random bits, and what is made of them, are those of ``portllm/noise.py``, to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lowrank_add import COLUMNS, find_weight, locate, narrow, tile_sum


@triton.jit
def mix(b_x):
    """A permutation of 32 bits, uint32."""
    b_x = b_x ^ (b_x >> 16)
    b_x = b_x * 0x21F0AAAD
    b_x = b_x ^ (b_x >> 15)
    b_x = b_x * 0xD35A2D97
    return b_x ^ (b_x >> 15)


@triton.jit
def noise(p_mode, o_m, o_n, TURNED: tl.constexpr):
    """The random bits of a tile: uint32 [BM, BN]. TURNED: its rows are columns of the whole tensor."""
    b_key = tl.full([1, 1], tl.load(p_mode + 1), tl.int64)
    b_low = b_key.to(tl.uint32)
    b_high = (b_key >> 32).to(tl.uint32)
    b_row = o_m[:, None].to(tl.int64)
    b_column = o_n[None, :].to(tl.int64)
    if TURNED:
        b_row = o_n[None, :].to(tl.int64)
        b_column = o_m[:, None].to(tl.int64)
    b_row = (b_row + tl.load(p_mode + 2)).to(tl.uint32)
    b_column = (b_column + tl.load(p_mode + 3)).to(tl.uint32)
    b_a = mix(b_row ^ b_low)
    b_b = mix(b_a ^ b_high)
    b_bits = mix((b_column ^ b_a) * 0x9E3779B9 + b_b)
    b_flags = tl.full([1, 1], tl.load(p_mode), tl.int64)
    return tl.where((b_flags & 4) != 0, b_bits ^ 0xFFFFFFFF, b_bits)


@triton.jit
def by_chance(b_x, b_bits, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 to one of its neighbours, away from zero where the bits that are dropped and the random ones carry."""
    b_pattern = b_x.to(tl.uint32, bitcast=True)
    b_size = b_pattern & 0x7FFFFFFF
    b_sign = (b_pattern >> 16) & 0x8000
    if DTYPE.is_bf16():
        b_found = (b_size + (b_bits >> 16)) >> 16
        b_within = b_found < 0x7F80
    else:
        b_small = b_size < 0x38800000  # subnormal
        b_steps = tl.where(b_small, tl.abs(b_x), 0.0) * 16777216.0
        b_whole = b_steps.to(tl.int32)
        b_chance = (b_bits >> 8).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)
        b_up = ((b_steps - b_whole.to(tl.float32)) + b_chance) >= 1.0
        b_least = (b_whole + b_up.to(tl.int32)).to(tl.uint32)
        b_found = tl.where(b_small, b_least, (b_size - 0x38000000 + (b_bits >> 19)) >> 13)
        b_within = b_found < 0x7C00
    b_y = (b_found | b_sign).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.where(b_within, b_y, narrow(b_x, DTYPE, INTERPRET))


# A variant for n_weights == 1 or a multiple of 16 would be compiled again for nothing.
@triton.jit(do_not_specialize=["n_weights", "n_tiles"])
def lowrank_round_kernel(
    p_weights,  # the tables of lowrank_add_kernel
    p_terms,
    p_scalings,
    p_modes,  # int64 [n_weights, 4]: flags, key, row and column, as portllm/noise.py has them
    n_weights,
    n_tiles,
    TURNED: tl.constexpr,
    W_DTYPE: tl.constexpr,
    F_DTYPE: tl.constexpr,
    W_VECTOR: tl.constexpr,
    F_VECTOR: tl.constexpr,
    ONE_TERM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        i_weight = find_weight(p_weights, n_weights, i_tile)
        p_weight = p_weights + i_weight * COLUMNS
        p_mode = p_modes + i_weight * 4
        i_term = tl.load(p_weight + 6)
        i_term_end = tl.load(p_weight + 7)
        p_w, o_m, o_n, m_m, m_n = locate(p_weight, i_tile, W_DTYPE, W_VECTOR, BM, BN)
        m_w = m_m[:, None] & m_n[None, :]
        b_old = tl.load(p_w, mask=m_w, other=0.0, eviction_policy="evict_first")  # [BM, BN]
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
        b_wide = b_old.to(tl.float32)
        b_sum += b_wide
        b_new = narrow(b_sum, W_DTYPE, INTERPRET)
        b_flags = tl.full([1, 1], tl.load(p_mode), tl.int64)
        if W_DTYPE.primitive_bitwidth == 16:
            b_bits = noise(p_mode, o_m, o_n, TURNED)
            b_new = tl.where((b_flags & 1) != 0, by_chance(b_sum, b_bits, W_DTYPE, INTERPRET), b_new)
        b_new = tl.where(((b_flags & 2) != 0) & (b_wide == 0.0), b_old, b_new)
        tl.store(p_w, b_new, mask=m_w, eviction_policy="evict_first")
