// conv2d by the kernels of conv3x3.cu, without batch norm around it, for the dispatchers in conv2d.cu. Arguments as in
// kernels.h; float is rounded to tf32. Zeros stand for what lies outside of an image, of x as of dy, up to the end of a
// tile: what is not finite in x gives NaN to taps of dw that it meets only there.
#pragma once

#include <initializer_list>

#include "common.h"

namespace tinyres::direct {

// Whether these kernels take that shape, and arrays that lie there.
bool takes(const Window& s, std::initializer_list<const void*> arrays);

template <class T>
void forward(const char* op, T* y, const T* x, const T* w, const Window& s);
template <class T>
void backward_input(const char* op, T* dx, const T* dy, const T* w, const Window& s, bool add);
template <class T>
void backward_weight(const char* op, Wide<T>* dw, const T* dy, const T* x, const Window& s);

}  // namespace tinyres::direct
