// Runs AMX instructions as a compiler and an assembler encode them; see test_amx_emulator.py.
//   amx_cases products FILE THREADS    load, multiply and store every case in FILE, in place
//   amx_cases NAME                     one of the checks in main: exit status 0, or death
#include <fcntl.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <barrier>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  Config& set(int tile, int tile_rows, int tile_colsb) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    colsb[tile] = static_cast<uint16_t>(tile_colsb);
    return *this;
  }
};
static_assert(sizeof(Config) == 64);

// The compiler does not know that the instructions read memory behind a pointer (GCC 12).
void fence() { asm volatile("" ::: "memory"); }

void configure(const Config& config) {
  fence();
  _tile_loadconfig(&config);
}

void ask() {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) {
    std::printf("refused: %d\n", errno);
    std::exit(3);
  }
}

constexpr int kBuffer = 4096;

// The test writes these: C += A B, with A [m, 2k], B [k, 2n] in bf16, and C [m, n] in fp32.
struct Case {
  int32_t m, k, n;
  int32_t start[3];   // of A, B and C in their buffers, in bytes
  int32_t stride[3];  // in bytes
  int32_t unused[7];
  uint8_t a[kBuffer], b[kBuffer], c[kBuffer];
};
static_assert(sizeof(Case) == 64 + 3 * kBuffer);

// The tiles' numbers are part of the instructions.
#define PRODUCT(C, A, B)                                                                      \
  {                                                                                           \
    configure(Config().set(A, x.m, 4 * x.k).set(B, x.k, 4 * x.n).set(C, x.m, 4 * x.n));       \
    _tile_loadd(A, x.a + x.start[0], x.stride[0]);                                            \
    _tile_stream_loadd(B, x.b + x.start[1], x.stride[1]);                                     \
    _tile_loadd(C, x.c + x.start[2], x.stride[2]);                                            \
    meet();                                                                                   \
    _tile_dpbf16ps(C, A, B);                                                                  \
    meet();                                                                                   \
    _tile_stored(C, x.c + x.start[2], x.stride[2]);                                           \
  }

template <class Meet>
void product(Case& x, int variant, const Meet& meet) {
  switch (variant % 4) {
    case 0: PRODUCT(0, 1, 2) break;
    case 1: PRODUCT(7, 3, 5) break;
    case 2: PRODUCT(4, 6, 0) break;
    case 3: PRODUCT(2, 0, 7) break;
  }
}

// Threads go in step, so that all their tiles are in use at once.
int products(const char* path, int threads) {
  const int file = open(path, O_RDWR);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return 2;
  void* map = mmap(nullptr, status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (map == MAP_FAILED) return 2;
  const auto cases = static_cast<Case*>(map);
  const int count = static_cast<int>(status.st_size / sizeof(Case));
  if (count % threads != 0) return 2;
  std::barrier barrier(threads);
  const auto work = [&](int thread) {
    for (int i = thread; i < count; i += threads) {
      product(cases[i], i / threads + thread, [&] { barrier.arrive_and_wait(); });
    }
    _tile_release();
  };
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) pool.emplace_back(work, i);
  for (std::thread& thread : pool) thread.join();
  return 0;
}

alignas(64) Config global;
thread_local Config local_to_thread;

// One tile, copied from `from` to `to` with every way to write an address.
int addressing() {
  global.set(6, 5, 24);
  fence();
  asm volatile("ldtilecfg %0" ::"m"(global));  // relative to RIP
  const auto stored_by = [](const auto& store) {
    unsigned char out[64];
    std::memset(out, 0xee, sizeof out);
    store(out);
    return std::memcmp(out, &global, sizeof out) == 0;
  };
  bool right = stored_by([](auto* p) { _tile_storeconfig(p), fence(); });
  right &= stored_by([](auto* p) {
    asm volatile("sttilecfg -8(%0,%1,4)" ::"r"(p), "r"(2l) : "memory");
  });
  right &= stored_by([](auto* p) {
    asm volatile("mov %0, %%r13; sttilecfg (%%r13)" ::"r"(p) : "r13", "memory");
  });
  if (!right) return 10;
  local_to_thread = global;
  configure(local_to_thread);

  unsigned char from[2048], to[2048];
  for (int i = 0; i < 2048; ++i) from[i] = static_cast<unsigned char>(i * 37 + i / 256);
  int failures = 0;
  const auto expect = [&](int source, int stride) {
    for (int i = 0; i < 5; ++i) {
      failures += std::memcmp(to + i * 64, from + source + i * stride, 24) != 0;
      for (int j = 24; j < 64; ++j) failures += to[i * 64 + j] != 0xee;
    }
  };
#define COPY(LOAD, BASE, INDEX, SOURCE, STRIDE)                                               \
  std::memset(to, 0xee, sizeof to);                                                           \
  fence();                                                                                    \
  asm volatile(                                                                               \
      "mov %0, %%r8; mov %0, %%r12; mov %0, %%r13; mov %1, %%r9; mov %1, %%r14\n\t" LOAD      \
      ", %%tmm6\n\ttilestored %%tmm6, (%2,%3,2)" ::"r"(from + (BASE)),                        \
      "r"(long{INDEX}), "r"(to), "r"(32l)                                                     \
      : "r8", "r9", "r12", "r13", "r14", "memory");                                           \
  expect(SOURCE, STRIDE);

  COPY("tileloadd (%0,%1,1)", 8, 72, 8, 72)
  COPY("tileloadd 0x7f(%0,%1,2)", 1, 40, 128, 80)
  COPY("tileloaddt1 -0x80(%0,%1,4)", 256, 25, 128, 100)
  COPY("tileloadd 0x180(%0,%1,8)", 16, 3, 400, 24)
  COPY("tileloadd -0x400(%%r8,%%r9,1)", 1100, -13, 76, -13)
  COPY("tileloaddt1 (%%r12,%%r14,1)", 5, 64, 5, 64)
  COPY("tileloadd (%%r13,%%r9,2)", 6, 50, 6, 100)
  COPY("tileloadd 0x10(%%r13,%1,1)", 6, 50, 22, 50)
  COPY("tileloadd (%0)", 33, 1, 33, 0)  // no index: a stride of 0
  return failures;
}

// What a tile holds after TILEZERO, and all of it after a configuration and TILERELEASE.
int zeroing() {
  alignas(64) float in[16][16], out[16][16];
  for (auto& row : in) {
    for (float& value : row) value = 3;
  }
  const auto all_zero = [&] {
    for (const auto& row : out) {
      for (const float value : row) {
        if (value != 0) return false;
      }
    }
    return true;
  };
  const auto store = [&] {
    std::memset(out, 0xee, sizeof out);
    _tile_stored(1, out, 64);
  };
  const Config config = Config().set(1, 16, 64);
  configure(config);
  _tile_loadd(1, in, 64);
  store();
  if (std::memcmp(in, out, sizeof out) != 0) return 10;
  _tile_zero(1);
  store();
  if (!all_zero()) return 11;
  _tile_loadd(1, in, 64);
  configure(config);
  store();
  if (!all_zero()) return 12;
  _tile_release();
  Config after;
  _tile_storeconfig(&after);
  fence();
  for (int i = 0; i < 64; ++i) {
    if (reinterpret_cast<unsigned char*>(&after)[i] != 0) return 13;
  }
  return 0;
}

// The heap block ends inside the last row.
int overflow(bool store) {
  configure(Config().set(0, 16, 64));
  const std::unique_ptr<char[]> block(new char[1020]());
  fence();
  if (store) {
    _tile_stored(0, block.get(), 64);
  } else {
    _tile_loadd(0, block.get(), 64);
  }
  return 0;
}

// A [4, 16], B [16, 4], C [4, 4].
Config fitting() { return Config().set(0, 4, 16).set(1, 4, 32).set(2, 8, 16); }

void multiply(const Config& config) {
  configure(config);
  _tile_dpbf16ps(0, 1, 2);
}

// tdpbf16ps %tmm1, %tmm1, %tmm0, which the assembler refuses as well.
void square() { asm volatile(".byte 0xc4, 0xe2, 0x72, 0x5c, 0xc1"); }

void touch() { _tile_zero(0); }

void configure_with_byte(int index, unsigned char value) {
  Config config = fitting();
  reinterpret_cast<unsigned char*>(&config)[index] = value;
  configure(config);
}

// What the hardware refuses: none of these comes back.
const std::map<std::string, void (*)()> kWrong = {
    {"another instruction", [] { __builtin_trap(); }},
    {"not configured", touch},
    {"palette", [] { configure_with_byte(0, 2); }},
    {"reserved byte", [] { configure_with_byte(15, 1); }},
    {"ninth tile", [] { configure(fitting().set(8, 1, 4)); }},
    {"too many rows", [] { configure(fitting().set(0, 17, 16)); }},
    {"too many columns", [] { configure(fitting().set(0, 4, 68)); }},
    {"rows without columns", [] { configure(fitting().set(0, 4, 0)); }},
    {"columns without rows", [] { configure(fitting().set(0, 0, 16)); }},
    {"a tile without a shape", [] { configure(fitting().set(0, 0, 0)), touch(); }},
    {"released", [] { configure(fitting()), _tile_release(), touch(); }},
    {"palette 0", [] { configure(fitting()), configure_with_byte(0, 0), touch(); }},
    {"another thread", [] { configure(fitting()), std::thread(touch).join(); }},
    {"one tile twice", [] { configure(fitting()), square(); }},
    {"half a pair", [] { multiply(fitting().set(1, 4, 34)); }},
    {"inner size", [] { multiply(fitting().set(2, 7, 16)); }},
    {"rows", [] { multiply(fitting().set(0, 5, 16)); }},
    {"columns", [] { multiply(fitting().set(0, 4, 12)); }},
};

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "without asking") configure(fitting()), touch();
  ask();
  ask();
  if (name == "asking") return 0;
  if (name == "products" && argc == 4) return products(argv[2], std::atoi(argv[3]));
  if (name == "addressing") return addressing();
  if (name == "zeroing") return zeroing();
  if (name == "load too much") return overflow(false);
  if (name == "store too much") return overflow(true);
  if (name == "fitting") return multiply(fitting()), 0;
  if (const auto wrong = kWrong.find(name); wrong != kWrong.end()) wrong->second();
  return 2;
}
