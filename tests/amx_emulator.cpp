// Intel AMX-BF16 for tests on a CPU without it, as the Intel SDM describes it. Build and preload:
//   g++ -std=c++20 -O3 -shared -fPIC tests/amx_emulator.cpp -o amx_emulator.so
//   LD_PRELOAD=$PWD/amx_emulator.so program
//
// A program asks Linux for the tiles by syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, 18). Where
// Linux refuses, this says yes, and from then on does what an AMX instruction should have, when its
// SIGILL comes. On a CPU that has AMX nothing changes. With AMX_EMULATOR_REFUSE set, it says no.
//
// An instruction that is none of the eight, or that would fault, goes to the handler that was there
// before: most often there is none, and the process dies. What was wrong is printed first.
#include <errno.h>
#include <immintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <bit>
#include <initializer_list>

namespace {

constexpr int kTiles = 8;
constexpr int kRows = 16;
constexpr int kCols = 16;  // of four bytes

// What LDTILECFG reads.
struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved[14];
  uint16_t colsb[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Tile {
  uint32_t row[kRows][kCols];
};

struct State {
  Config config;  // all zero: not configured
  Tile tile[kTiles];
};

// The model spares the handler an allocation.
[[gnu::tls_model("initial-exec")]] thread_local State state;

struct sigaction previous;

[[noreturn]] void fault(const char* why) {
  for (const char* text : {"amx_emulator: ", why, "\n"}) {
    if (write(STDERR_FILENO, text, strlen(text)) < 0) break;
  }
  sigaction(SIGILL, &previous, nullptr);
  raise(SIGILL);
  _exit(128 + SIGILL);  // whoever handled it came back
}

void require(bool condition, const char* otherwise) {
  if (!condition) fault(otherwise);
}

class Registers {
 public:
  explicit Registers(void* context)
      : gregs_(static_cast<ucontext_t*>(context)->uc_mcontext.gregs) {}

  // By its number in an instruction.
  int64_t operator[](int number) const {
    constexpr int kOrder[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                              REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                              REG_R12, REG_R13, REG_R14, REG_R15};
    return gregs_[kOrder[number]];
  }

  const uint8_t* rip() const { return reinterpret_cast<const uint8_t*>(gregs_[REG_RIP]); }

  void resume_at(const uint8_t* p) { gregs_[REG_RIP] = reinterpret_cast<greg_t>(p); }

 private:
  greg_t* gregs_;
};

// VEX.128.0F38.W0: C4, ~R ~X ~B map, W ~vvvv L pp, opcode, ModRM, perhaps SIB and displacement.
struct Instruction {
  enum Prefix { kNone, k66, kF3, kF2 };  // pp

  Prefix prefix;
  int opcode;
  int reg;
  int rm;
  int vvvv;
  bool memory;
  bool sib;
  uint8_t* address = nullptr;
  int64_t stride = 0;  // the index register, scaled; not yet in the address
  const uint8_t* end = nullptr;

  static constexpr int key(Prefix prefix, int opcode) { return prefix << 8 | opcode; }
};

bool decode(const Registers& registers, Instruction& out) {
  const uint8_t* p = registers.rip();
  const bool fs = *p == 0x64;  // a variable of the thread's own
  p += fs;
  if (p[0] != 0xc4 || (p[1] & 0x1f) != 2 || (p[2] & 0x84) != 0) return false;
  const int r = ~p[1] >> 7 & 1, x = ~p[1] >> 6 & 1, b = ~p[1] >> 5 & 1;
  const int mod = p[4] >> 6, low = p[4] & 7;
  out = {.prefix = static_cast<Instruction::Prefix>(p[2] & 3),
         .opcode = p[3],
         .reg = r << 3 | (p[4] >> 3 & 7),
         .rm = b << 3 | low,
         .vvvv = ~p[2] >> 3 & 15,
         .memory = mod != 3,
         .sib = mod != 3 && low == 4};
  p += 5;
  if (out.memory) {
    int base = low;
    if (out.sib) {
      const int index = x << 3 | (*p >> 3 & 7);
      if (index != 4) out.stride = registers[index] << (*p >> 6);  // 4 stands for none
      base = *p++ & 7;
    }
    const bool no_base = mod == 0 && base == 5;
    int64_t address = no_base ? 0 : registers[b << 3 | base];
    if (mod == 1) {
      address += static_cast<int8_t>(*p++);
    } else if (mod == 2 || no_base) {
      int32_t displacement;
      memcpy(&displacement, p, sizeof displacement);
      p += sizeof displacement;
      address += displacement;
      if (no_base && !out.sib) address += reinterpret_cast<int64_t>(p);  // relative to RIP
    }
    if (fs) address += reinterpret_cast<int64_t>(__builtin_thread_pointer());
    out.address = reinterpret_cast<uint8_t*>(address);
  }
  out.end = p;
  return true;
}

// A call that stays one: AddressSanitizer's own memcpy then checks what the program's tiles touch.
[[gnu::noipa]] void copy(void* to, const void* from, size_t size) { memcpy(to, from, size); }

void load_config(const Config& config) {
  state = {};
  if (config.palette == 0) return;
  require(config.palette == 1, "LDTILECFG: no such palette");
  require(config.start_row == 0, "LDTILECFG: start_row is not emulated");
  for (uint8_t byte : config.reserved) require(byte == 0, "LDTILECFG: a reserved byte is set");
  for (int i = 0; i < 16; ++i) {
    const int rows = config.rows[i], colsb = config.colsb[i];
    require(i < kTiles || (rows | colsb) == 0, "LDTILECFG: there are eight tiles");
    require(rows <= kRows && colsb <= 4 * kCols, "LDTILECFG: a tile is too large");
    require((rows == 0) == (colsb == 0), "LDTILECFG: a tile has rows or columns, not both");
  }
  state.config = config;
}

Tile& tile(int index) {
  require(state.config.palette != 0, "the tiles are not configured");
  require(index < kTiles && state.config.rows[index] != 0, "this tile is not configured");
  return state.tile[index];
}

// Subnormal numbers count as zeros and become zeros, whatever the program has set; the return from
// the handler brings back its setting.
[[gnu::noinline]] void flush_subnormal_numbers() {
  _mm_setcsr(0x1f80 | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
}

float lower(uint32_t pair) { return std::bit_cast<float>(pair << 16); }
float upper(uint32_t pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

[[gnu::noinline, gnu::target("avx2,fma")]] void multiply(Tile& c, const Tile& a, const Tile& b,
                                                         int rows, int pairs, int cols) {
  for (int m = 0; m < rows; ++m) {
    float even[kCols] = {}, odd[kCols] = {};
    for (int k = 0; k < pairs; ++k) {
      for (int n = 0; n < kCols; ++n) {
        even[n] = __builtin_fmaf(lower(a.row[m][k]), lower(b.row[k][n]), even[n]);
        odd[n] = __builtin_fmaf(upper(a.row[m][k]), upper(b.row[k][n]), odd[n]);
      }
    }
    for (int n = 0; n < cols; ++n) {
      const float sum = std::bit_cast<float>(c.row[m][n]) + (even[n] + odd[n]);
      c.row[m][n] = std::bit_cast<uint32_t>(sum);
    }
  }
}

void tdpbf16ps(int c, int a, int b) {
  Tile &into = tile(c), &left = tile(a), &right = tile(b);
  const Config& config = state.config;
  require(a != b && b != c && c != a, "TDPBF16PS: the tiles must be three");
  require((config.colsb[a] | config.colsb[b] | config.colsb[c]) % 4 == 0,
          "TDPBF16PS: a row is not a multiple of four bytes");
  require(config.rows[c] == config.rows[a] && config.colsb[c] == config.colsb[b] &&
              config.colsb[a] / 4 == config.rows[b],
          "TDPBF16PS: the shapes of the tiles do not fit");
  flush_subnormal_numbers();
  multiply(into, left, right, config.rows[c], config.rows[b], config.colsb[c] / 4);
}

void move_rows(const Instruction& in, bool store) {
  Tile& target = tile(in.reg);
  if (!store) target = {};
  for (int i = 0; i < state.config.rows[in.reg]; ++i) {
    uint8_t* memory = in.address + i * in.stride;
    const size_t size = state.config.colsb[in.reg];
    store ? copy(memory, target.row[i], size) : copy(target.row[i], memory, size);
  }
}

// Does it, if it is one of them.
bool execute(const Instruction& in) {
  using enum Instruction::Prefix;
  constexpr auto key = Instruction::key;
  const int what = key(in.prefix, in.opcode);
  if (in.vvvv != 0 && what != key(kF3, 0x5c)) return false;
  if (what == key(kNone, 0x49) && !in.memory && in.reg == 0 && in.rm == 0) {  // TILERELEASE
    state = {};
  } else if (what == key(kNone, 0x49) && in.memory && in.reg == 0) {  // LDTILECFG
    Config config;
    copy(&config, in.address + in.stride, sizeof config);
    load_config(config);
  } else if (what == key(k66, 0x49) && in.memory && in.reg == 0) {  // STTILECFG
    copy(in.address + in.stride, &state.config, sizeof state.config);
  } else if (what == key(kF2, 0x49) && !in.memory && in.rm == 0) {  // TILEZERO
    tile(in.reg) = {};
  } else if (what == key(kF2, 0x4b) && in.sib) {  // TILELOADD
    move_rows(in, false);
  } else if (what == key(k66, 0x4b) && in.sib) {  // TILELOADDT1
    move_rows(in, false);
  } else if (what == key(kF3, 0x4b) && in.sib) {  // TILESTORED
    move_rows(in, true);
  } else if (what == key(kF3, 0x5c) && !in.memory) {  // TDPBF16PS
    tdpbf16ps(in.reg, in.rm, in.vvvv);
  } else {
    return false;
  }
  return true;
}

bool step(Registers& registers) {
  Instruction instruction;
  if (!decode(registers, instruction) || !execute(instruction)) return false;
  registers.resume_at(instruction.end);
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  const int saved_errno = errno;
  Registers registers(context);
  require(step(registers), "this instruction is not one of AMX-BF16");
  while (step(registers)) {  // spares those that follow at once their own signal
  }
  errno = saved_errno;
}

// Not before the program has asked: handlers that a framework sets at its start are then replaced.
bool start() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;  // fault() raises it again
  return sigaction(SIGILL, &action, &previous) == 0;
}

long system_call(long number, const long* arguments) {
  long result = number;
  register long fourth asm("r10") = arguments[3];
  register long fifth asm("r8") = arguments[4];
  register long sixth asm("r9") = arguments[5];
  asm volatile("syscall"
               : "+a"(result)
               : "D"(arguments[0]), "S"(arguments[1]), "d"(arguments[2]), "r"(fourth), "r"(fifth),
                 "r"(sixth)
               : "rcx", "r11", "memory");
  return result;
}

}  // namespace

// Takes the place of the C library's.
extern "C" long syscall(long number, ...) noexcept {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  long arguments[6];
  va_list list;
  va_start(list, number);
  for (long& argument : arguments) argument = va_arg(list, long);
  va_end(list);
  const bool asks =
      number == SYS_arch_prctl && arguments[0] == kRequest && arguments[1] == kTileData;
  const bool refuse = asks && getenv("AMX_EMULATOR_REFUSE");
  long result = refuse ? -EINVAL : system_call(number, arguments);
  if (asks && !refuse && result != 0) {
    static const bool started = start();  // once
    if (started) result = 0;
  }
  if (result >= 0 || result < -4095) return result;
  errno = static_cast<int>(-result);
  return -1;
}
