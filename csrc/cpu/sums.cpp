// Checksums of the sectors of a file's bytes; portllm/sums.py says what they are and what for.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

constexpr size_t kSector = 512;
constexpr size_t kWords = kSector / 8;

struct Keys {
  uint32_t low[kWords], high[kWords];
  constexpr Keys() : low(), high() {
    for (size_t i = 0; i < kWords; ++i) {
      low[i] = static_cast<uint32_t>((2 * i + 1) * 0x9e3779b97f4a7c15u >> 32);
      high[i] = static_cast<uint32_t>((2 * i + 2) * 0x9e3779b97f4a7c15u >> 32);
    }
  }
};
constexpr Keys kKeys;

inline void sums_of_sector(const uint8_t* data, uint64_t* out) {
  uint64_t sum = 0, parity = 0;
  for (size_t i = 0; i < kWords; ++i) {
    uint64_t word;
    std::memcpy(&word, data + 8 * i, 8);
    const uint32_t low = static_cast<uint32_t>(word) + kKeys.low[i];
    const uint32_t high = static_cast<uint32_t>(word >> 32) + kKeys.high[i];
    sum += static_cast<uint64_t>(low) * high;
    parity ^= word;
  }
  out[0] = sum;
  out[1] = parity;
}

}  // namespace

// `first` bytes up to the first border of a sector in the file, then whole sectors, then the rest; out
// has two numbers for each.
extern "C" __attribute__((visibility("default"))) void portllm_sector_sums(const uint8_t* data, size_t size,
                                                                          size_t first, uint64_t* out) {
  size_t length = first;
  while (size > 0) {
    length = length < size ? length : size;
    if (length == kSector) {
      sums_of_sector(data, out);
    } else {
      uint8_t padded[kSector] = {};
      std::memcpy(padded, data, length);
      sums_of_sector(padded, out);
    }
    data += length;
    size -= length;
    out += 2;
    length = kSector;
  }
}
