// Runs the CUDA kernel of csrc/cuda on a CPU, for tests; test_cuda_emulated.py builds it and calls
// it.
//
// The threads of a block are fibers, and the next one to run is drawn by lot whenever one waits.
// What a GPU leaves open is resolved to the worst: shared memory begins as NaN, a cp.async moves
// its bytes only when it is waited for and spoils their place until then, and a sum in an mma is
// cut off, not rounded. Any access to global memory outside of the matrices, or not aligned, is an
// error, and so is writing W twice.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_set>
#include <vector>

#include "cuda/launch.h"
#include "cuda/lowrank_add.cuh"
#include "cuda/plan.h"

namespace emulator {
namespace {

using portllm::cuda::kThreads;
constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;
constexpr uint32_t kPoison = 0xffffffffu;  // a NaN in every type
constexpr size_t kGuardBytes = 4096;

struct Copy {
  uint4* shared;
  const void* global;
};

// Where a fiber that waits is; all that wait together must be at the same place.
enum class Wait { none, barrier, mma };

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  bool started = false, done = false;
  Wait wait = Wait::none;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  std::deque<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;
  // An mma under way.
  Mma kind;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct Range {
  uintptr_t end;
  bool written;
};

// Everything about the block that runs.
Fiber fibers[kThreads];
Fiber* current;
jmp_buf scheduler;
std::vector<int> ready;
void (*kernel)(const portllm::cuda::Table&);
const portllm::cuda::Table* table;
int block, blocks, waiting, finished, warp_waiting[kThreads / kWarp];
bool barrier_result, barrier_next;
std::exception_ptr error;
std::vector<uint4> shared;
size_t shared_words;
uint64_t random_state;
// About global memory.
std::map<uintptr_t, Range> ranges;  // by their begin
std::unordered_set<uintptr_t> written;

uint32_t random_below(uint32_t n) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((random_state >> 33) % n);
}

int index_of(const Fiber* fiber) { return static_cast<int>(fiber - fibers); }

void body() {
  try {
    kernel(*table);
  } catch (...) {
    error = std::current_exception();
  }
  current->done = true;
  ++finished;
  _longjmp(scheduler, 1);
}

// Back to the scheduler, until what this fiber waits for has happened.
void suspend(Wait wait) {
  current->wait = wait;
  if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
  if (error) throw std::runtime_error("another thread failed");
}

void release(int first, int count) {
  for (int i = first; i < first + count; ++i) {
    fibers[i].wait = Wait::none;
    if (&fibers[i] != current) ready.push_back(i);
  }
}

// Runs one fiber until it waits or ends.
void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
  setcontext(&fiber.context);
}

void check_range(const void* global, int bytes, bool writes) {
  const auto at = reinterpret_cast<uintptr_t>(global);
  if (at % bytes != 0) throw std::runtime_error("an access is not aligned");
  auto range = ranges.upper_bound(at);
  if (range == ranges.begin()) throw std::runtime_error("an access before every matrix");
  --range;
  if (at + bytes > range->second.end) throw std::runtime_error("an access outside of the matrices");
  if (writes && !range->second.written) throw std::runtime_error("a factor is written");
}

float value(Mma kind, uint32_t bits) {
  const auto half = static_cast<uint16_t>(bits);
  return kind == Mma::bf16 ? portllm::widen(portllm::bf16{half})
                           : portllm::widen(portllm::fp16{half});
}

// 2^exponent, and the exponent of a number's leading bit; of normal numbers.
double power(int exponent) { return std::bit_cast<double>(uint64_t(1023 + exponent) << 52); }
int leading(double x) { return static_cast<int>(std::bit_cast<uint64_t>(x) >> 52 & 0x7ff) - 1023; }

// x without the bits below 2^exponent; it has less than 63 above.
double cut(double x, int exponent) {
  return static_cast<double>(static_cast<int64_t>(x * power(-exponent))) * power(exponent);
}

// c + sum of x y, as tensor cores may do it: all are cut off 23 bits below the leading bit of the
// largest.
float dot(const float* x, const float* y, float c) {
  double terms[17], largest = 0;
  for (int k = 0; k < 16; ++k) terms[k] = double{x[k]} * double{y[k]};
  terms[16] = c;
  double sum = 0;
  for (const double term : terms) {
    largest = std::max(largest, std::abs(term));
    sum += term;
  }
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  if (largest == 0) return 0;
  const int lowest = leading(largest) - 23;
  sum = 0;
  for (const double term : terms) sum += cut(term, lowest);
  if (sum == 0) return 0;
  return static_cast<float>(cut(sum, leading(sum) - 23));
}

// All lanes are here: the fragments as the PTX ISA lays them out for m16n8k16.
void multiply(Fiber* warp) {
  float a[16][16], b[8][16];
  const Mma kind = warp[0].kind;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane].kind != kind) throw std::runtime_error("lanes are at different instructions");
    const int group = lane / 4, thread = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i / 2 % 2 ? group + 8 : group, col = thread * 2 + i % 2 + (i >= 4 ? 8 : 0);
      a[row][col] = value(kind, warp[lane].a[i / 2] >> 16 * (i % 2));
    }
    for (int i = 0; i < 4; ++i) {
      const int row = thread * 2 + i % 2 + (i >= 2 ? 8 : 0);
      b[group][row] = value(kind, warp[lane].b[i / 2] >> 16 * (i % 2));
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      float& d = warp[lane].d[i];
      d = dot(a[lane / 4 + i / 2 * 8], b[lane % 4 * 2 + i % 2], d);
    }
  }
}

void run_block() {
  std::fill(shared.begin(), shared.end(), uint4{kPoison, kPoison, kPoison, kPoison});
  waiting = finished = 0;
  barrier_next = false;
  ready.clear();
  for (int i = 0; i < kThreads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.started = fiber.done = false;
    fiber.wait = Wait::none;
    fiber.groups.clear();
    fiber.open.clear();
    ready.push_back(i);
  }
  std::fill(std::begin(warp_waiting), std::end(warp_waiting), 0);
  while (!ready.empty()) {
    std::swap(ready[random_below(static_cast<uint32_t>(ready.size()))], ready.back());
    Fiber& fiber = fibers[ready.back()];
    ready.pop_back();
    resume(fiber);
    if (error) std::rethrow_exception(error);  // the other fibers are never resumed
  }
  if (finished != kThreads) throw std::runtime_error("threads wait for some that do not come");
  for (size_t i = shared_words; i < shared.size(); ++i) {
    if (shared[i].x != kPoison || shared[i].w != kPoison) {
      throw std::runtime_error("shared memory is written behind its end");
    }
  }
}

}  // namespace

int thread_index() { return index_of(current); }
int block_index() { return block; }
int block_count() { return blocks; }
uint4* shared_memory() { return shared.data(); }

bool barrier_any(bool predicate) {
  barrier_next |= predicate;
  if (++waiting == kThreads) {
    waiting = 0;
    barrier_result = barrier_next;
    barrier_next = false;
    release(0, kThreads);
    // The last to come does not always go on first.
    ready.push_back(index_of(current));
    suspend(Wait::none);
  } else {
    suspend(Wait::barrier);
  }
  return barrier_result;
}

void cp_async16(uint4* to, const void* global) {
  check_range(global, 16, false);
  if (to < shared.data() || to >= shared.data() + shared_words) {
    throw std::runtime_error("a copy goes outside of shared memory");
  }
  *to = {kPoison, kPoison, kPoison, kPoison};
  current->open.push_back({to, global});
}

void cp_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void cp_async_wait(int pending) {
  while (current->groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : current->groups.front()) std::memcpy(copy.shared, copy.global, 16);
    current->groups.pop_front();
  }
}

void check_read(const void* global, int bytes) { check_range(global, bytes, false); }

void check_write(const void* global, int bytes) {
  check_range(global, bytes, true);
  for (int i = 0; i < bytes; i += 2) {
    const auto at = reinterpret_cast<uintptr_t>(global) + static_cast<uintptr_t>(i);
    if (!written.insert(at).second) throw std::runtime_error("an element is written twice");
  }
}

void mma(Mma kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  current->kind = kind;
  current->d = d;
  current->a = a;
  current->b = b;
  const int warp = index_of(current) / kWarp;
  if (++warp_waiting[warp] < kWarp) {
    suspend(Wait::mma);
    return;
  }
  warp_waiting[warp] = 0;
  multiply(fibers + warp * kWarp);
  release(warp * kWarp, kWarp);
}

namespace {

using portllm::cuda::DType;

void forget() {
  error = nullptr;
  ranges.clear();
  written.clear();
}

// A matrix that may be accessed from now on.
void remember(const void* data, DType dtype, int64_t rows, int64_t cols, int64_t row_stride,
              int64_t col_stride, bool is_written) {
  if (rows == 0 || cols == 0) return;
  const int64_t size = dtype == DType::fp64 ? 8 : dtype == DType::fp32 ? 4 : 2;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const int64_t last = (rows - 1) * row_stride + (cols - 1) * col_stride;
  Range& range = ranges[begin];
  range = {std::max(range.end, begin + static_cast<uintptr_t>((last + 1) * size)), is_written};
}

template <DType kDType>
auto kernel_of(bool aligned) {
  return aligned ? portllm::cuda::lowrank_add<kDType, true>
                 : portllm::cuda::lowrank_add<kDType, false>;
}

void run(portllm::cuda::Launch launch, int most_blocks, int stages) {
  launch.table.stages = launch.aligned ? stages : 0;
  table = &launch.table;
  kernel = launch.dtype == DType::bf16   ? kernel_of<DType::bf16>(launch.aligned)
           : launch.dtype == DType::fp16 ? kernel_of<DType::fp16>(launch.aligned)
                                         : kernel_of<DType::fp32>(launch.aligned);
  shared_words = portllm::cuda::shared_bytes(launch.dtype == DType::fp32 ? 4 : 2,
                                             launch.table.stages, launch.several_terms) /
                 sizeof(uint4);
  shared.resize(shared_words + kGuardBytes / sizeof(uint4));
  blocks = std::min(launch.table.n_tiles, most_blocks);
  for (block = 0; block < blocks; ++block) run_block();
}

}  // namespace
}  // namespace emulator

// For the binding: matrices are taken from the table, since nothing else is known here.
namespace portllm::cuda {

void start(const Launch& launch, int, void*) {
  emulator::forget();
  const Table& table = launch.table;
  for (int i = 0; i < table.n_weights; ++i) {
    const Weight& w = table.weights[i];
    emulator::remember(w.data, launch.dtype, w.m, w.n, w.row_stride, w.col_stride, true);
    for (int t = w.first_term; t < w.first_term + w.n_terms; ++t) {
      const Term& x = table.terms[t];
      emulator::remember(x.a, x.a_dtype, x.rank, w.n, x.a_stride_k, x.a_stride_n, false);
      emulator::remember(x.b, x.b_dtype, w.m, x.rank, x.b_stride_m, x.b_stride_k, false);
    }
  }
  constexpr int kBlocks = 3;
  emulator::run(launch, kBlocks, kMaxStages);
}

const char* problem() { return nullptr; }

}  // namespace portllm::cuda

// What Python gives: see tests/test_cuda_emulated.py.
struct MatrixArgument {
  void* data;
  int64_t dtype, rows, cols, row_stride, col_stride;
};

// Updates all weights; the empty string, or what went wrong. Terms are A, B, A, B, ...
extern "C" [[gnu::visibility("default")]] const char* emulate(
    const MatrixArgument* weights, int64_t n_weights, const MatrixArgument* factors,
    const double* scalings, const int64_t* n_terms, int most_blocks, int stages, uint64_t seed,
    int64_t* n_launches) {
  using namespace portllm::cuda;
  static std::string message;
  const auto take = [](const MatrixArgument& x, bool is_written) {
    const auto dtype = static_cast<DType>(x.dtype);
    emulator::remember(x.data, dtype, x.rows, x.cols, x.row_stride, x.col_stride, is_written);
    return Matrix{x.data, dtype, x.row_stride, x.col_stride};
  };
  emulator::forget();
  emulator::random_state = seed;
  try {
    std::vector<Update> updates;
    size_t written = 0;
    for (int64_t i = 0; i < n_weights; ++i) {
      const MatrixArgument& w = weights[i];
      Update update{take(w, true), w.rows, w.cols, {}};
      for (int64_t t = 0; t < n_terms[i]; ++t, factors += 2, ++scalings) {
        update.terms.push_back(
            {take(factors[0], false), take(factors[1], false), factors[0].rows, *scalings});
      }
      if (!update.terms.empty()) written += w.rows * w.cols * (w.dtype == 2 ? 2 : 1);
      updates.push_back(std::move(update));
    }
    const std::vector<Launch> launches = plan(std::move(updates));
    *n_launches = static_cast<int64_t>(launches.size());
    for (const Launch& launch : launches) emulator::run(launch, most_blocks, stages);
    if (emulator::written.size() != written) throw std::runtime_error("an element is not written");
    message.clear();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
