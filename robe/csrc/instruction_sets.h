// Kernels of several instruction sets in one library. Each library of kernels includes this once, with
// ROBE_KERNELS_OF_A_SET the file to compile for each set: it defines ``kernels``, of type Kernels, in namespace ROBE_ISA.

#pragma once

#include <cstring>
#include <vector>

#define ROBE_ISA plain
#define ROBE_ISA_NAME "plain"
#define ROBE_LANES 4
#include ROBE_KERNELS_OF_A_SET
#undef ROBE_ISA
#undef ROBE_ISA_NAME
#undef ROBE_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#define ROBE_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,bmi,bmi2,fma,f16c\"))), apply_to=function)")
#define ROBE_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl\"))), apply_to=function)")
#define ROBE_TARGET_END _Pragma("clang attribute pop")
#else
#define ROBE_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,bmi,bmi2,fma,f16c\")")
#define ROBE_TARGET_AVX512 \
  _Pragma("GCC push_options")  \
  _Pragma("GCC target(\"avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512\")")
#define ROBE_TARGET_END _Pragma("GCC pop_options")
#endif

ROBE_TARGET_AVX2
#define ROBE_FMA
#define ROBE_ISA avx2
#define ROBE_ISA_NAME "avx2"
#define ROBE_LANES 8
#include ROBE_KERNELS_OF_A_SET
#undef ROBE_ISA
#undef ROBE_ISA_NAME
#undef ROBE_LANES
ROBE_TARGET_END

ROBE_TARGET_AVX512
#define ROBE_ISA avx512
#define ROBE_ISA_NAME "avx512"
#define ROBE_LANES 16
#include ROBE_KERNELS_OF_A_SET
#undef ROBE_ISA
#undef ROBE_ISA_NAME
#undef ROBE_LANES
ROBE_TARGET_END
#endif

namespace robe {
namespace {

// Those that this CPU can run, the widest last.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> all{&plain::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("fma");
  if (has_avx2) all.push_back(&avx2::kernels);
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&avx512::kernels);
#endif
  return all;
}

const Kernels* kernels = usable().back();

}  // namespace
}  // namespace robe

#define ROBE_EXPORT __attribute__((visibility("default")))

extern "C" {

// The instruction set in use.
ROBE_EXPORT const char* robe_isa() { return robe::kernels->name; }

// Use another instruction set, by name; false where this CPU lacks it. For tests and measurements.
ROBE_EXPORT bool robe_set_isa(const char* name) {
  for (const robe::Kernels* each : robe::usable())
    if (!std::strcmp(each->name, name)) {
      robe::kernels = each;
      return true;
    }
  return false;
}
}
