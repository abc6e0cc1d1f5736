#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

namespace lorac {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

const Kernels& Choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  const std::initializer_list<Candidate> candidates = {{&kAvx512, avx512}, {&kAvx2, avx2}, {&kPortable, true}};
#elif defined(__aarch64__)
  const std::initializer_list<Candidate> candidates = {{&kNeon, true}, {&kPortable, true}};
#else
  const std::initializer_list<Candidate> candidates = {{&kPortable, true}};
#endif
  const char* wanted = std::getenv("LORAC_NATIVE_KERNELS");
  const Kernels* best = nullptr;
  for (const Candidate& candidate : candidates) {
    if (!candidate.runs) continue;
    if (wanted != nullptr && std::strcmp(wanted, candidate.kernels->name) == 0) return *candidate.kernels;
    if (best == nullptr) best = candidate.kernels;
  }
  return *best;
}

}  // namespace

const Kernels& ChooseKernels() {
  static const Kernels& chosen = Choose();
  return chosen;
}

}  // namespace lorac
