// The kernels, compiled for each instruction set, and the choice among them at run time.

#include <cstdlib>

#include "step.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define LOWBIT_X86 1
#include <immintrin.h>
#endif

#if defined(__clang__)
#define LOWBIT_PRAGMA(text) _Pragma(#text)
#define LOWBIT_BEGIN(features) \
  LOWBIT_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define LOWBIT_END _Pragma("clang attribute pop")
#else
#define LOWBIT_PRAGMA(text) _Pragma(#text)
#define LOWBIT_BEGIN(features) _Pragma("GCC push_options") LOWBIT_PRAGMA(GCC target(features))
#define LOWBIT_END _Pragma("GCC pop_options")
#endif

// Loops whose length a caller knows must be in it to be unrolled.
#define LOWBIT_INLINE inline __attribute__((always_inline))
#define LOWBIT_APART __attribute__((noinline))
#define LOWBIT_LAMBDA __attribute__((always_inline))

namespace lowbit {

namespace generic {
namespace {
#include "vector_generic.h"
#include "coding.inc"
#include "arrays.inc"
#include "steps.inc"
#include "quantization.inc"
constexpr Target kTarget{"generic", run_step, run_maxima, run_square_sums, run_quantize, run_dequantize};
}  // namespace
}  // namespace generic

#ifdef LOWBIT_X86
LOWBIT_BEGIN("avx2,fma")
namespace avx2 {
namespace {
#include "vector_avx2.h"
#include "coding.inc"
#include "arrays.inc"
#include "steps.inc"
#include "quantization.inc"
constexpr Target kTarget{"avx2", run_step, run_maxima, run_square_sums, run_quantize, run_dequantize};
}  // namespace
}  // namespace avx2
LOWBIT_END

LOWBIT_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
namespace {
#include "vector_avx512.h"
#include "coding.inc"
#include "arrays.inc"
#include "steps.inc"
#include "quantization.inc"
constexpr Target kTarget{"avx512", run_step, run_maxima, run_square_sums, run_quantize, run_dequantize};
}  // namespace
}  // namespace avx512
LOWBIT_END
#endif

namespace {

const Target& chosen() {
  const char* wish = std::getenv("LOWBIT_CPU_TARGET");
  auto wanted = [wish](const char* name) { return !wish || !std::strcmp(wish, name); };
#ifdef LOWBIT_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wanted("avx512")) return avx512::kTarget;
  if (has_avx2 && (wanted("avx2") || wanted("avx512"))) return avx2::kTarget;
#endif
  return generic::kTarget;
}

}  // namespace

const Target& target() {
  static const Target& best = chosen();
  return best;
}

}  // namespace lowbit
