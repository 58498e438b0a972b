// What takes an update off again to the last bit: the record of one chunk, a row of kSpan columns.
//
// From an updated weight w' and the sum d that was added, round(w' - d) gives the old weight back,
// except where rounding to w' lost bits of it: where w' has the larger exponent. So for exactly these
// elements ("members"; whoever has w' and d knows them) the record holds the difference that is left,
// code = old - round(w' - d), as an integer of the weight's size, modulo 2^bits. The few other
// elements that round(w' - d) does not give back ("strays": ties; Inf and NaN) are stored as they were.
// Measured for bf16 with a delta of 1 % of the weight: 2.4 % members, 95 % of their codes in -1..1, and
// 0.05 % strays.
//
// A chunk, in bytes, little-endian, nothing if it has neither members nor strays:
//   u16       number of members
//   2 bits    of each member, four in a byte, the first in the lowest bits: 0, 1, 3 (for -1), or 2
//   i8        of each 2, in order: the code, or -128
//   U         of each -128, in order: the code; U is the unsigned integer of the weight's size
//   u16, U    of each stray, up to the end: the column in the chunk, and the weight's bits as they were
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/half.h"
#include "cpu/lowrank_add.h"

namespace portllm {
namespace {

constexpr int64_t kSpan = 1024;

// The bits of a weight, and those of its exponent.
template <class E>
using Bits = std::conditional_t<
    sizeof(E) == 2, uint16_t, std::conditional_t<sizeof(E) == 4, uint32_t, uint64_t>>;
template <class E>
constexpr Bits<E> kExponent = 0;
template <>
constexpr uint16_t kExponent<bf16> = 0x7f80;
template <>
constexpr uint16_t kExponent<fp16> = 0x7c00;
template <>
constexpr uint32_t kExponent<float> = 0x7f800000;
template <>
constexpr uint64_t kExponent<double> = 0x7ff0000000000000;

// round(w' - d), as bits. Half away from zero for bf16, which is the cheapest: it is only a guess.
inline uint16_t guess(bf16 after, float sum) {
  return static_cast<uint16_t>((std::bit_cast<uint32_t>(widen(after) - sum) + 0x8000u) >> 16);
}
inline uint16_t guess(fp16 after, float sum) { return narrow<fp16>(widen(after) - sum).bits; }
inline uint32_t guess(float after, float sum) { return std::bit_cast<uint32_t>(after - sum); }
inline uint64_t guess(double after, double sum) { return std::bit_cast<uint64_t>(after - sum); }

// One chunk, unpacked.
template <class U>
struct Log {
  struct Stray {
    uint16_t column;
    U bits;
  };
  static constexpr int kSlack = 64;  // a vector's load or store may reach past the last code

  int members = 0;
  int strays = 0;
  int next = 0;        // when read: the next member
  int next_stray = 0;  // and the next stray
  U codes[kSpan + kSlack];
  Stray stray[kSpan];

  void clear() { members = strays = next = next_stray = 0; }
};

// The codes of a chunk in two bits each, and the bytes that follow for those that need more; returns how
// many. Both outputs have room for 64 bytes more than that.
template <class U>
int64_t pack_codes(const U* codes, int members, uint8_t* packed, uint8_t* follow) {
  int64_t count = 0;
  for (int i = 0; i < members; i += 4) {
    unsigned byte = 0;
    for (int j = 0; j < 4 && i + j < members; ++j) {
      const U code = codes[i + j];
      if (static_cast<U>(code + 1) <= 2) {
        byte |= static_cast<unsigned>(code & 3) << 2 * j;
      } else {
        byte |= 2u << 2 * j;
        follow[count++] = static_cast<uint8_t>(static_cast<U>(code + 127) <= 254 ? code : U{0x80});
      }
    }
    packed[i / 4] = static_cast<uint8_t>(byte);
  }
  return count;
}

// The other way round; returns how many bytes of `follow` it took, or -1 if there are too few. Codes that
// need more than a byte become -128.
template <class U>
int64_t unpack_codes(const uint8_t* packed, int members, const uint8_t* follow, const uint8_t* end,
                     U* codes) {
  const uint8_t* const start = follow;
  for (int i = 0; i < members; ++i) {
    const int two = packed[i / 4] >> i % 4 * 2 & 3;
    codes[i] = static_cast<U>((two ^ 2) - 2);  // 0, 1, -2 for what follows, -1
    if (two != 2) continue;
    if (follow == end) return -1;
    codes[i] = static_cast<U>(static_cast<int8_t>(*follow++));
  }
  return follow - start;
}

// A SIMD wrapper S may have pack_codes and unpack_codes of its own.
template <class S, class U>
constexpr bool kVectorCodes = requires(U* codes, uint8_t* out) {
  S::pack_codes(codes, 0, out, out);
};

// Appends the chunk, and returns its bytes.
template <class S, class U>
uint16_t pack_log(const Log<U>& log, Bytes& out) {
  if (log.members == 0 && log.strays == 0) return 0;
  constexpr int kRoom = 64;
  const int groups = (log.members + 3) / 4;
  uint8_t* const start = out.room(2 + groups + log.members * (1 + sizeof(U)) +
                                  log.strays * (2 + sizeof(U)) + 2 * kRoom);
  uint8_t* p = start;
  const auto put = [&](const auto value) {
    std::memcpy(p, &value, sizeof value);
    p += sizeof value;
  };
  put(static_cast<uint16_t>(log.members));
  uint8_t* const follow = p + groups;
  uint8_t bytes[kSpan + kRoom];
  int64_t count;
  if constexpr (kVectorCodes<S, U>) {
    count = S::pack_codes(log.codes, log.members, p, bytes);
  } else {
    count = pack_codes(log.codes, log.members, p, bytes);
  }
  std::memcpy(follow, bytes, count);
  p = follow + count;
  if (std::memchr(bytes, 0x80, count)) {
    for (int i = 0; i < log.members; ++i) {
      if (static_cast<U>(log.codes[i] + 127) > 254) put(log.codes[i]);
    }
  }
  for (int i = 0; i < log.strays; ++i) {
    put(log.stray[i].column);
    put(log.stray[i].bits);
  }
  out.add(p - start);
  return static_cast<uint16_t>(p - start);
}

// Unpacks a chunk of so many columns; false if it cannot be one.
template <class S, class U>
bool unpack_log(const uint8_t* data, int64_t size, int64_t columns, Log<U>& log) {
  log.clear();
  if (size == 0) return true;
  const uint8_t* const end = data + size;
  uint16_t members;
  if (size < 2) return false;
  std::memcpy(&members, data, 2);
  data += 2;
  const int groups = (members + 3) / 4;
  if (members > columns || end - data < groups) return false;
  const uint8_t* const follow = data + groups;
  int64_t count;
  if constexpr (kVectorCodes<S, U>) {
    count = S::unpack_codes(data, members, follow, end, log.codes);
  } else {
    count = unpack_codes(data, members, follow, end, log.codes);
  }
  if (count < 0) return false;
  data = follow + count;
  constexpr U kWide = static_cast<U>(-128);
  const auto wide = std::count(follow, data, uint8_t{0x80});
  if (end - data < wide * static_cast<int64_t>(sizeof(U))) return false;
  for (int i = 0, left = static_cast<int>(wide); left > 0; ++i) {
    if (log.codes[i] != kWide) continue;
    std::memcpy(&log.codes[i], data, sizeof(U));
    data += sizeof(U);
    --left;
  }
  constexpr int64_t kStray = 2 + sizeof(U);
  if ((end - data) % kStray != 0 || (end - data) / kStray > columns) return false;
  for (; data < end; data += kStray) {
    auto& stray = log.stray[log.strays];
    std::memcpy(&stray.column, data, 2);
    std::memcpy(&stray.bits, data + 2, sizeof(U));
    const int before = log.strays ? log.stray[log.strays - 1].column : -1;
    if (stray.column <= before || stray.column >= columns) return false;
    ++log.strays;
  }
  log.members = members;
  return true;
}

}  // namespace
}  // namespace portllm
