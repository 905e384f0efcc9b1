#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace tinyres {

// Defined by the copies of cpu/table.cpp.
namespace baseline {
void fill_tables(Kernels<float>&, Kernels<double>&);
}
#ifdef TINYRES_X86
namespace avx2 {
void fill_tables(Kernels<float>&, Kernels<double>&);
}
namespace avx512 {
void fill_tables(Kernels<float>&, Kernels<double>&);
}
#endif

namespace {

struct Isa {
  const char* name;
  bool supported;
  void (*fill_tables)(Kernels<float>&, Kernels<double>&);
};

std::vector<Isa> all_isas() {
#ifdef TINYRES_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return {{"baseline", true, baseline::fill_tables},
          {"avx2", avx2, avx2::fill_tables},
          {"avx512", avx512, avx512::fill_tables}};
#else
  return {{"baseline", true, baseline::fill_tables}};
#endif
}

std::string chosen;
Kernels<float> float_kernels;
Kernels<double> double_kernels;

}  // namespace

void choose_isa() {
  const char* const forced = std::getenv("TINYRES_CPU_ISA");
  void (*fill_tables)(Kernels<float>&, Kernels<double>&) = nullptr;
  std::string possible;
  for (const Isa& candidate : all_isas()) {
    if (!candidate.supported) continue;
    possible += (possible.empty() ? "" : ", ") + std::string(candidate.name);
    if (forced && *forced && std::string(forced) != candidate.name) continue;
    chosen = candidate.name;
    fill_tables = candidate.fill_tables;
  }
  if (!fill_tables)
    throw std::runtime_error("TINYRES_CPU_ISA=" + std::string(forced) + " cannot be used here; possible: " + possible);
  fill_tables(float_kernels, double_kernels);
}

const std::string& isa() { return chosen; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& candidate : all_isas()) {
    if (candidate.supported) names.push_back(candidate.name);
  }
  return names;
}

template <>
const Kernels<float>& kernels<float>() {
  return float_kernels;
}
template <>
const Kernels<double>& kernels<double>() {
  return double_kernels;
}

}  // namespace tinyres
