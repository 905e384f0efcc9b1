// What conv2d.cpp needs of winograd.cpp.
#pragma once

#include "../kernels.h"

namespace tinyres::TINYRES_TARGET {

// Whether this convolution of floats goes through Winograd's algorithm. By the shape alone.
bool use_winograd(const Window& s, ConvAlgorithm algorithm);

void winograd_forward(float* y, const float* x, const float* w, const Epilogue<float>& epilogue, const Window& s);
void winograd_backward_input(float* dx, const float* dy, const float* w, const Window& s, bool add);
void winograd_backward_weight(float* dw, const float* dy, const float* x, const Window& s);

}  // namespace tinyres::TINYRES_TARGET
