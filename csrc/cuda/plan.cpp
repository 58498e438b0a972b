#include "cuda/plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace portllm::cuda {
namespace {

// Tiles are counted in 32 bits, with room for a step over all blocks.
constexpr int64_t kMaxTiles = int64_t{1} << 30;
constexpr int64_t kMaxSize = (int64_t{1} << 31) - 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes(DType dtype) { return dtype == DType::fp64 ? 8 : dtype == DType::fp32 ? 4 : 2; }

bool at_multiple(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

int64_t tiles_n(const Update& u) { return ceil_div(u.n, kTileCols); }
int64_t tiles(const Update& u) { return ceil_div(u.m, kTileRows) * tiles_n(u); }

void check(const Update& u, size_t index) {
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument("weights[" + std::to_string(index) + "] " + why);
  };
  if (u.w.dtype == DType::fp64) refuse("is fp64, which this kernel does not have");
  if (std::max(u.m, u.n) >= kMaxSize || tiles(u) > kMaxTiles) refuse("is too large");
  if ((u.w.row_stride == 0 && u.m > 1) || (u.w.col_stride == 0 && u.n > 1)) {
    refuse("has elements that share memory");
  }
  if (u.terms.size() >= kSlots) {
    refuse("has " + std::to_string(u.terms.size()) + " terms; " + std::to_string(kSlots - 1) +
           " fit into a launch");
  }
  for (const Product& term : u.terms) {
    if (term.rank >= kMaxSize) refuse("has a term whose rank is too large");
  }
}

bool aligned(const Update& u) {
  const int64_t size = bytes(u.w.dtype);
  return (u.w.col_stride == 1 || u.n == 1) && (u.w.row_stride * size % 16 == 0 || u.m == 1) &&
         u.n * size % 16 == 0 && at_multiple(u.w.data, 16);
}

// Whether `count` neighbours can be loaded at once, on lines of so many elements.
bool vectors(const Matrix& x, int64_t stride, int64_t line_stride, int64_t length, int count) {
  return bytes(x.dtype) <= 4 && stride == 1 && line_stride % count == 0 && length % count == 0 &&
         at_multiple(x.data, count * bytes(x.dtype));
}

Access access_of_a(const Product& term, int64_t n) {
  const Matrix& a = term.a;
  if (vectors(a, a.col_stride, a.row_stride, n, 2)) return Access::along_columns;
  return vectors(a, a.row_stride, a.col_stride, term.rank, 4) ? Access::along_rank
                                                                 : Access::single;
}

Access access_of_b(const Product& term) {
  const Matrix& b = term.b;
  return vectors(b, b.col_stride, b.row_stride, term.rank, 2) ? Access::along_rank
                                                                 : Access::single;
}

Term row(const Product& term, int64_t n) {
  const Matrix &a = term.a, &b = term.b;
  const bool same = a.dtype == b.dtype;
  return {.a = a.data,
          .b = b.data,
          .a_stride_k = a.row_stride,
          .a_stride_n = a.col_stride,
          .b_stride_m = b.row_stride,
          .b_stride_k = b.col_stride,
          .rank = static_cast<int32_t>(term.rank),
          .scaling = static_cast<float>(term.scaling),
          .a_dtype = a.dtype,
          .b_dtype = b.dtype,
          .a_access = access_of_a(term, n),
          .b_access = access_of_b(term),
          .products = same && a.dtype == DType::bf16   ? Products::bf16
                      : same && a.dtype == DType::fp16 ? Products::fp16
                                                       : Products::split};
}

// The first slot behind so many weights.
int slots_of(int64_t weights) {
  return static_cast<int>(ceil_div(weights * int64_t{sizeof(Weight)}, sizeof(Term)));
}

// One launch for the chosen updates, whose terms lie behind the weights.
Launch fill(const std::vector<Update>& updates, const std::vector<size_t>& chosen,
            bool is_aligned) {
  Launch launch{.dtype = updates[chosen[0]].w.dtype, .aligned = is_aligned};
  Table& table = launch.table;
  int slot = slots_of(chosen.size());
  for (const size_t i : chosen) {
    const Update& u = updates[i];
    Weight& w = table.weights[table.n_weights++];
    w = {.data = u.w.data,
         .row_stride = u.w.row_stride,
         .col_stride = u.w.col_stride,
         .m = static_cast<int32_t>(u.m),
         .n = static_cast<int32_t>(u.n),
         .first_tile = table.n_tiles,
         .end_tile = table.n_tiles + static_cast<int32_t>(tiles(u)),
         .reciprocal =
             static_cast<uint32_t>(std::min((int64_t{1} << 32) / tiles_n(u), int64_t{UINT32_MAX})),
         .first_term = static_cast<uint16_t>(slot),
         .n_terms = static_cast<uint16_t>(u.terms.size())};
    table.n_tiles = w.end_tile;
    for (const Product& term : u.terms) table.terms[slot++] = row(term, u.n);
    launch.several_terms |= u.terms.size() > 1;
  }
  return launch;
}

}  // namespace

std::vector<Launch> plan(std::vector<Update> updates) {
  for (size_t i = 0; i < updates.size(); ++i) {
    Update& u = updates[i];
    check(u, i);
    std::erase_if(u.terms, [](const Product& term) { return term.rank == 0; });
    // A weight that lies transposed has contiguous rows as well.
    if (u.w.row_stride < u.w.col_stride) transpose(u.w, u.m, u.n, u.terms);
  }
  std::vector<Launch> launches;
  for (const DType dtype : {DType::bf16, DType::fp16, DType::fp32}) {
    for (const bool is_aligned : {true, false}) {
      std::vector<size_t> chosen;
      size_t n_terms = 0;
      int64_t n_tiles = 0;
      const auto flush = [&] {
        if (!chosen.empty()) launches.push_back(fill(updates, chosen, is_aligned));
        chosen.clear();
        n_terms = 0;
        n_tiles = 0;
      };
      for (size_t i = 0; i < updates.size(); ++i) {
        const Update& u = updates[i];
        if (u.w.dtype != dtype || aligned(u) != is_aligned) continue;
        if (u.m == 0 || u.n == 0 || u.terms.empty()) continue;
        const bool fits = slots_of(chosen.size() + 1) + n_terms + u.terms.size() <= kSlots &&
                          n_tiles + tiles(u) <= kMaxTiles;
        if (!fits) flush();
        chosen.push_back(i);
        n_terms += u.terms.size();
        n_tiles += tiles(u);
      }
      flush();
    }
  }
  return launches;
}

}  // namespace portllm::cuda
