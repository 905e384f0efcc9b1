// conv2d on tensor cores (conv2d_mma.cu), for the dispatchers in conv2d.cu. T is bf16, or float, whose products are
// then those of operands rounded to tf32. Arguments as in kernels.h; outputs are not empty.
#pragma once

#include "correlation.h"

namespace tinyres::mma {

template <class T>
void forward(const char* op, T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Shape& s);
template <class T>
void backward_input(const char* op, T* dx, const T* dy, const T* w, const Shape& s, bool add);
template <class T>
void backward_weight(const char* op, Wide<T>* dw, const T* dy, const T* x, const Shape& s);

}  // namespace tinyres::mma
