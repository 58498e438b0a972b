// AMX-BF16: the matrix unit multiplies bf16 numbers, 16 x 32 by 32 x 16 at a time, into fp32 sums.
//
// A number of fp32 is the sum of three of bf16 (of 8 bits each), so a product of two is the sum of
// six products of bf16, each exact in fp32; the three that are left out are below 2^-26 of it. So
// the sums are as good as fp32's, though not the same to the last bit as those of the other variants.
// The unit takes subnormal numbers for zeros and writes none: parts and products below 2^-126 vanish.
#include "cpu/isa.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) || __GNUC__ >= 11)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/half.h"
#include "cpu/target.h"

PORTLLM_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi2,fma,f16c,amx-tile,amx-bf16")

#include "cpu/avx512_bf16.h"

namespace portllm {
namespace {

using S = Avx512Bf16Single;
constexpr int kRows = 16;     // of a tile of sums, which is as many as a tile register has
constexpr int kDepth = 16;    // words a row of a tile register, each of two k: a step
constexpr int kWords = kRows * kDepth;
constexpr int kColumns = kCols<S>;
constexpr int kAcross = kColumns / 16;  // tile registers side by side
constexpr int kMostParts = 3;
constexpr int64_t kPanelBytes = 1 << 20;  // of 2 MiB of L2
static_assert(kAcross == 4);

// Products of the i-th part of one number and the j-th of another that count.
constexpr bool counts(int i, int j) { return i + j < kMostParts; }

int products(const Term& term) {
  int count = 0;
  for (int i = 0; i < term.parts_a; ++i) {
    for (int j = 0; j < term.parts_b; ++j) count += counts(i, j);
  }
  return count;
}

// How the steps of k fill tile registers ("chunks"). Whole chunks of a term hold one part each, and
// serve all products with it. The steps that are left over of each term and product lie one after
// the other, in chunks that A and B share, so that small ranks leave no gaps.
struct Chunks {
  int64_t whole_a = 0, whole_b = 0, shared = 0;

  explicit Chunks(const Weight& weight) {
    int64_t steps = 0;
    for (const Term& term : weight.terms) {
      const int64_t all = (term.rank + 1) / 2;
      whole_a += all / kDepth * term.parts_a;
      whole_b += all / kDepth * term.parts_b;
      steps += all % kDepth * products(term);
    }
    shared = (steps + kDepth - 1) / kDepth;
  }

  int64_t a() const { return whole_a + shared; }
  int64_t b() const { return whole_b + shared; }
};

// Calls f(term, part, first step, steps, chunk, row of the chunk) for everything that one of the
// factors' chunks hold; f must cut what goes on in the next chunk.
template <bool kIsA, class F>
void for_each_piece(const Weight& weight, const Chunks& chunks, F&& f) {
  int64_t whole = 0, row = (kIsA ? chunks.whole_a : chunks.whole_b) * kDepth;
  for (const Term& term : weight.terms) {
    const int64_t steps = (term.rank + 1) / 2, rest = steps % kDepth;
    const int parts = kIsA ? term.parts_a : term.parts_b;
    for (int64_t k = 0; k + kDepth <= steps; k += kDepth) {
      for (int part = 0; part < parts; ++part) f(term, part, k, int64_t{kDepth}, kDepth * whole++);
    }
    if (rest == 0) continue;
    for (int i = 0; i < term.parts_a; ++i) {
      for (int j = 0; j < term.parts_b; ++j) {
        if (!counts(i, j)) continue;
        f(term, kIsA ? i : j, steps - rest, rest, row);
        row += rest;
      }
    }
  }
}

// The scratch of one panel.
struct Panel {
  Chunks chunks;
  float* exact;     // A in fp32, as kernel.h packs it
  uint32_t* a;      // [column tile][chunk][16 columns across][step][column]
  uint32_t* b;      // [chunk][row][step]
  uint16_t* parts;  // [part][k] of one row of one term of B, times the scaling
  int64_t width;    // of such a part: an even number of k
  void* end;

  Panel(const Weight& weight, int64_t cols, void* scratch) : chunks(weight) {
    cols = round_up(cols, kColumns);
    int64_t rank = 0, widest = 0;
    for (const Term& term : weight.terms) {
      rank += term.rank;
      widest = std::max(widest, term.rank);
    }
    width = round_up(widest, 2 * kDepth);
    exact = static_cast<float*>(scratch);
    a = reinterpret_cast<uint32_t*>(exact + rank * cols);
    b = a + chunks.a() * kDepth * cols;
    parts = reinterpret_cast<uint16_t*>(b + chunks.b() * kWords);
    end = parts + kMostParts * width;
  }
};

int64_t panel_size(const Weight& weight, int64_t cols) {
  alignas(64) static char origin;
  return static_cast<char*>(Panel(weight, cols, &origin).end) - &origin;
}

int64_t amx_scratch(const Weight& weight, int64_t cols) {
  return panel_size(weight, cols) + log_bytes(weight, kRows);
}

// The part of x of the given number in bf16; parts are rounded to nearest, so that each leaves 2^-9 of
// what was there, or less.
template <int kPart>
uint16_t part_of(float x) {
  for (int i = 0; i < kPart; ++i) x -= widen(narrow<bf16>(x));
  return narrow<bf16>(x).bits;
}

// Calls f with the number of a part as a constant.
template <class F>
void with_part(int part, F&& f) {
  switch (part) {
    case 0: return f(std::integral_constant<int, 0>{});
    case 1: return f(std::integral_constant<int, 1>{});
    default: return f(std::integral_constant<int, 2>{});
  }
}

void amx_pack(const Weight& weight, int64_t col, int64_t cols, void* scratch) {
  const Panel panel(weight, cols, scratch);
  pack<S>(weight, col, cols, panel.exact);
  cols = round_up(cols, kColumns);
  const int64_t tile_words = panel.chunks.a() * kWords * kAcross;
  std::fill_n(panel.a, cols / kColumns * tile_words, 0u);
  for (int64_t tile = 0; tile < cols / kColumns; ++tile) {
    const auto place = [&](const Term& term, int part, int64_t first, int64_t steps, int64_t row) {
      const float* in = panel.exact;
      for (const Term* t = weight.terms.data(); t != &term; ++t) in += t->rank * cols;
      in += tile * term.rank * kColumns + 2 * first * kColumns;
      with_part(part, [&](auto constant) {
        constexpr int kPart = constant;
        for (int64_t k = 2 * first; steps--; k += 2, ++row, in += 2 * kColumns) {
          uint32_t* out = panel.a + tile * tile_words + row / kDepth * kWords * kAcross +
                          row % kDepth * kDepth;
          float second[kColumns] = {};
          if (k + 1 < term.rank) std::memcpy(second, in + kColumns, sizeof second);
          for (int v = 0; v < kAcross; ++v, out += kWords) {
            for (int c = 0; c < kDepth; ++c) {
              out[c] = uint32_t{part_of<kPart>(second[v * kDepth + c])} << 16 |
                       part_of<kPart>(in[v * kDepth + c]);
            }
          }
        }
      });
    };
    for_each_piece<true>(weight, panel.chunks, place);
  }
}

// Splits a row of one term of B, times the scaling.
void split_row(const Term& term, int64_t row, const Panel& panel) {
  const float scaling = static_cast<float>(term.scaling);
  uint16_t *first = panel.parts, *second = first + panel.width, *third = second + panel.width;
  const auto split = [&](int64_t k, float x) {
    first[k] = part_of<0>(x);
    second[k] = part_of<1>(x);
    third[k] = part_of<2>(x);
  };
  with_type(term.b.dtype, [&](auto e) {
    const auto* in = at<decltype(e)>(term.b, row, 0);
    const int64_t stride = term.b.col_stride;
    const auto value = [&](int64_t k) { return scaling * static_cast<float>(widen(in[k])); };
    if (stride == 1) {
      for (int64_t k = 0; k < term.rank; ++k) split(k, value(k));
    } else {
      for (int64_t k = 0; k < term.rank; ++k) split(k, value(k * stride));
    }
  });
  if (term.rank % 2) split(term.rank, 0.0f);
}

void pack_b(const Weight& weight, const Panel& panel, int64_t row, int rows) {
  std::fill_n(panel.b, panel.chunks.b() * kWords, 0u);
  for (int i = 0; i < rows; ++i) {
    const Term* ready = nullptr;  // whose row panel.parts holds
    const auto place = [&](const Term& term, int part, int64_t first, int64_t steps, int64_t at_row) {
      if (ready != &term) split_row(term, row + i, panel);
      ready = &term;
      // Neighbours in memory are the two numbers of a word.
      const uint16_t* in = panel.parts + part * panel.width + 2 * first;
      while (steps > 0) {
        const int64_t count = std::min(steps, kDepth - at_row % kDepth);
        uint32_t* out = panel.b + at_row / kDepth * kWords + i * kDepth + at_row % kDepth;
        std::memcpy(out, in, count * sizeof *out);
        in += 2 * count;
        at_row += count;
        steps -= count;
      }
    };
    for_each_piece<false>(weight, panel.chunks, place);
  }
}

// gcc's intrinsics do not tell it what they read.
inline void memory_is_read() { asm volatile("" ::: "memory"); }

// Tile registers: 0 to 3 hold sums, 4 a chunk of A, 5 to 7 chunks of B.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    std::fill_n(bytes_per_row, 8, uint16_t{4 * kDepth});
    std::fill_n(rows, 8, uint8_t{kRows});
  }
};

constexpr int kTileBytes = 4 * kDepth;  // a row of a tile register

// Sums += the parts of B that registers 5 to 7 hold, by one part of A. A macro, since the number of a
// register must be a literal.
#define PORTLLM_MULTIPLY(sums)                           \
  _tile_loadd(4, a + (sums) * kWords, kTileBytes);       \
  _tile_dpbf16ps(sums, 5, 4);                            \
  if (parts_b > 1) _tile_dpbf16ps(sums, 6, 4);           \
  if (parts_b > 2) _tile_dpbf16ps(sums, 7, 4)

[[gnu::always_inline]] inline void multiply_across(const uint32_t* a, int parts_b) {
  PORTLLM_MULTIPLY(0);
  PORTLLM_MULTIPLY(1);
  PORTLLM_MULTIPLY(2);
  PORTLLM_MULTIPLY(3);
}
#undef PORTLLM_MULTIPLY

// The sums of one tile, into registers 0 to 3.
void multiply_tile(const Weight& weight, const Chunks& chunks, const uint32_t* a, const uint32_t* b) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (const Term& term : weight.terms) {
    for (int64_t k = kDepth; k <= (term.rank + 1) / 2; k += kDepth) {
      _tile_loadd(5, b, kTileBytes);
      if (term.parts_b > 1) _tile_loadd(6, b + kWords, kTileBytes);
      if (term.parts_b > 2) _tile_loadd(7, b + 2 * kWords, kTileBytes);
      b += term.parts_b * kWords;
      for (int i = 0; i < term.parts_a; ++i, a += kAcross * kWords) {
        multiply_across(a, std::min(term.parts_b, kMostParts - i));
      }
    }
  }
  for (int64_t chunk = 0; chunk < chunks.shared; ++chunk) {
    _tile_loadd(5, b, kTileBytes);
    multiply_across(a, 1);
    b += kWords;
    a += kAcross * kWords;
  }
}

// All terms are either added or taken off: Job sees to that where there is a matrix unit.
template <class E, bool kModes>
bool amx_update_block(const Weight& weight, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                      void* scratch, Recorded& recorded) {
  std::optional<Exchange<S, E>> exchange;
  if (weight.undoes()) exchange.emplace(weight, kRows, scratch, panel_size(weight, cols), recorded);
  const Panel panel(weight, cols, scratch);
  const int64_t tiles = round_up(cols, kColumns) / kColumns;
  const int64_t tile_words = panel.chunks.a() * kWords * kAcross;
  const int64_t row_stride = weight.w.row_stride, col_stride = weight.w.col_stride;
  const TileConfig config;
  memory_is_read();
  _tile_loadconfig(&config);
  alignas(64) float sums[2][kRows * kColumns];
  RowModes<kModes, kRows> modes;
  for (; row < row_end; row += kRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kRows, row_end - row));
    pack_b(weight, panel, row, rows);
    modes.begin(weight, row);
    memory_is_read();
    Target<E> done{};
    const auto finish = [&](const float* finished, int64_t tile) {
      if (exchange) {
        exchange->begin(row, rows, col + tile * kColumns);
        if (done.cols < kColumns || col_stride != 1) {
          exchange->rows(done.w, done.cols, finished, finished);
        } else {
          for (int j = 0; j < rows * Exchange<S, E>::kPairs; ++j) {
            exchange->pair(j, done.w, finished, finished);
          }
        }
        return exchange->end(done.cols);
      }
      if (done.cols < kColumns || col_stride != 1) return update_edge<S>(done, finished, modes);
      for (int i = 0; i < done.rows; ++i) {
        update_row<S>(done.w + i * row_stride, finished + i * kColumns, modes, i, done.col);
      }
    };
    for (int64_t tile = 0; tile < tiles; ++tile) {
      fetch_ahead<kRows, kColumns>(at<E>(weight.w, row, col), row_stride, tile, tiles);
      multiply_tile(weight, panel.chunks, panel.a + tile * tile_words, panel.b);
      // The matrix unit works on its own: meanwhile W takes the sums of the tile before.
      if (tile > 0) finish(sums[1 - tile % 2], tile - 1);
      float* mine = sums[tile % 2];
      _tile_stored(0, mine, kColumns * sizeof *mine);
      _tile_stored(1, mine + 16, kColumns * sizeof *mine);
      _tile_stored(2, mine + 32, kColumns * sizeof *mine);
      _tile_stored(3, mine + 48, kColumns * sizeof *mine);
      const int64_t first = col + tile * kColumns;
      done = {at<E>(weight.w, row, first), row_stride, col_stride, rows,
              static_cast<int>(std::min<int64_t>(kColumns, cols - tile * kColumns)), first};
    }
    finish(sums[(tiles - 1) % 2], tiles - 1);
    if (exchange) exchange->end_rows();
  }
  _tile_release();
  return !exchange || exchange->fits();
}

bool amx_update(const Weight& weight, int64_t row, int64_t row_end, int64_t col, int64_t cols,
                void* scratch, Recorded& recorded) {
  bool fits = true;
  with_type(weight.w.dtype, [&](auto e) {
    using E = decltype(e);
    if constexpr (!std::is_same_v<E, double>) {
      const auto update = weight.mode.any() ? amx_update_block<E, true> : amx_update_block<E, false>;
      fits = update(weight, row, row_end, col, cols, scratch, recorded);
    }
  });
  return fits;
}

const Isa* table() {
  static const Isa isa{"amx_bf16",
                       exact_kernel<S>(),
                       exact_kernel<Avx512Double>(),
                       skinny_kernel<S>(),
                       requantise_kernel<S>(),
                       true,
                       {kRows, kColumns, kPanelBytes, amx_scratch, amx_pack, amx_update},
                       8};
  return &isa;
}

}  // namespace
}  // namespace portllm

PORTLLM_TARGET_END

namespace {

// A process must ask the kernel before its first use of the registers, which are 8 KiB of state.
bool permitted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool cpu_has_amx() {
#ifdef PORTLLM_ASSUME_AMX  // tests that emulate the instructions
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile);
#endif
}

}  // namespace

const portllm::Isa* portllm::amx_bf16() {
  return avx512_bf16() && cpu_has_amx() && permitted() ? table() : nullptr;
}

#else

const portllm::Isa* portllm::amx_bf16() { return nullptr; }

#endif
