// The kernel tables of CUDA, gathered from the files that define the kernels.
#include "common.h"

namespace tinyres {
namespace {

template <class T>
Kernels<T> gather() {
  Kernels<T> table{};
  elementwise_kernels(table);
  reduce_kernels(table);
  matmul_kernels(table);
  conv2d_kernels(table);
  conv3x3_kernels(table);
  block_output_kernels(table);
  batch_norm_kernels(table);
  pool_kernels(table);
  loss_kernels(table);
  head_kernels(table);
  sgd_kernels(table);
  augment_kernels(table);
  return table;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  static const Kernels<float> table = gather<float>();
  return table;
}
template <>
const Kernels<double>& kernels<double>() {
  static const Kernels<double> table = gather<double>();
  return table;
}
template <>
const Kernels<bf16>& kernels<bf16>() {
  static const Kernels<bf16> table = gather<bf16>();
  return table;
}

std::uint64_t launch_count() { return launches; }

}  // namespace tinyres
