// The variants of the kernel; each is null where the compiler's target or the CPU lacks it.
#pragma once

#include "cpu/dora.h"
#include "cpu/lowrank_add.h"

namespace portllm {

const Isa* amx_bf16();     // what avx512_bf16 needs, AMX_BF16, and the kernel's permission
const Isa* avx512_bf16();  // what avx512 needs, and AVX512_BF16
const Isa* avx512();       // F, BW, VL, DQ
const Isa* avx2();         // AVX2, FMA, F16C
const Isa* portable();     // C++ only; slow on a CPU without fused multiply-add

}  // namespace portllm
