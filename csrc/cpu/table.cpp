// The kernel tables of one instruction set, gathered from the files that define the kernels.
#include "vec.h"

namespace tinyres::TINYRES_TARGET {

template <class T>
void elementwise_kernels(Kernels<T>& table);
template <class T>
void reduce_kernels(Kernels<T>& table);
template <class T>
void matmul_kernels(Kernels<T>& table);
template <class T>
void conv2d_kernels(Kernels<T>& table);
template <class T>
void batch_norm_kernels(Kernels<T>& table);
template <class T>
void pool_kernels(Kernels<T>& table);
template <class T>
void loss_kernels(Kernels<T>& table);
template <class T>
void sgd_kernels(Kernels<T>& table);
template <class T>
void augment_kernels(Kernels<T>& table);

namespace {

template <class T>
void fill_table(Kernels<T>& table) {
  elementwise_kernels(table);
  reduce_kernels(table);
  matmul_kernels(table);
  conv2d_kernels(table);
  batch_norm_kernels(table);
  pool_kernels(table);
  loss_kernels(table);
  sgd_kernels(table);
  augment_kernels(table);
}

}  // namespace

void fill_tables(Kernels<float>& floats, Kernels<double>& doubles);
void fill_tables(Kernels<float>& floats, Kernels<double>& doubles) {
  fill_table(floats);
  fill_table(doubles);
}

}  // namespace tinyres::TINYRES_TARGET
