// Chains of multiply-adds in registers, as many as hide the instruction's latency: nothing but the
// arithmetic units is timed. peak.py compiles it.
#include <cstdint>

#if defined(__x86_64__)

#include <immintrin.h>

namespace {

constexpr int kChains = 12;

// Runs `rounds` times kChains instructions; the empty asm keeps each of them from being left out.
#define CHAINS(name, isa, Vector, one, small, step)                          \
  extern "C" __attribute__((target(isa))) void name(int64_t rounds) {        \
    const Vector x = one, y = small;                                         \
    Vector sum[kChains];                                                     \
    for (Vector& s : sum) s = y;                                             \
    for (int64_t i = 0; i < rounds; ++i) {                                   \
      _Pragma("GCC unroll 12") for (int c = 0; c < kChains; ++c) {           \
        Vector s = sum[c];                                                   \
        s = step;                                                            \
        asm volatile("" : "+v"(s));                                          \
        sum[c] = s;                                                          \
      }                                                                      \
    }                                                                        \
  }

}  // namespace

CHAINS(fma_256, "avx2,fma", __m256, _mm256_set1_ps(1), _mm256_set1_ps(1e-3f),
       _mm256_fmadd_ps(x, y, s))
CHAINS(fma_512, "avx512f", __m512, _mm512_set1_ps(1), _mm512_set1_ps(1e-3f),
       _mm512_fmadd_ps(x, y, s))
CHAINS(dot_bf16, "avx512f,avx512bf16", __m512, _mm512_set1_ps(1), _mm512_set1_ps(1e-3f),
       _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)y))

extern "C" int chains() { return kChains; }

#endif
