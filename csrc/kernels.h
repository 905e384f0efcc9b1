// Every kernel of the engine, declared once. A device (an instruction set of the CPU, or CUDA) fills one table of
// function pointers per element type; the bindings call through it and know nothing else. On a GPU all pointers to
// elements are the GPU's, and a call returns when its work is in the queue of the current stream.
//
// Conventions, here and in every kernel file:
//   - arrays are dense and row-major; activations NHWC, convolution weights RSCK, matrices (rows, columns);
//   - outputs come first, then inputs, then sizes; every output element is overwritten, never added to,
//     unless the comment says "updated";
//   - gradients carry the name of what they belong to: dx is the gradient of the loss by x;
//   - no sum depends on the number of threads: work is split into parts by shape alone.
//   N batch, H W input size, C channels, K filters, R S window, P Q output size.
#pragma once

#include <cstdint>

#include "bf16.h"

namespace tinyres {

using i64 = std::int64_t;

constexpr int MAX_RANK = 16;

// A window sliding over an image: convolutions and pooling. P = (H + 2*pad_h - R) / stride_h + 1, Q likewise.
struct Window {
  i64 N, H, W, C;
  i64 K;  // filters of a convolution; equal to C for pooling
  i64 R, S, P, Q;
  i64 stride_h, stride_w, pad_h, pad_w;
};

// Up to three operands walked together. Strides count elements; 0 repeats an operand along an axis.
struct Strided {
  int rank;
  i64 size[MAX_RANK];
  i64 y[MAX_RANK], a[MAX_RANK], b[MAX_RANK];
};

// What becomes of a convolution's sums: y = relu(sum + bias + residual), each of the three where it is given. bias is
// (K), residual like y, or y itself.
template <class T>
struct Epilogue {
  const T* bias;
  const T* residual;
  bool relu;
};

// One matrix of a batch: element (i, j) lies at i * row + j * column.
struct MatrixView {
  i64 row, column;
};

// Draw number `draw` of the stream `key` (see tinyres/backend/random.py for the generator).
struct RandomKey {
  std::uint64_t key, draw;
};

enum class Binary { add, sub, mul, div, pow, maximum };
enum class Unary { neg, exp, log, sqrt, sigmoid, tanh, relu };  // backward from dy and y (see unary_backward)
// direct and winograd: CPU; tiled and mma: CUDA.
enum class ConvAlgorithm { automatic, naive, direct, tiled, winograd, mma };

// What sums run in, and what is kept of statistics, parameters and weight gradients, where elements are T.
template <class T>
struct WideOf {
  using Type = T;
};
template <>
struct WideOf<bf16> {
  using Type = float;
};
template <class T>
using Wide = typename WideOf<T>::Type;

template <class T>
struct Kernels {
  // elementwise.cpp ------------------------------------------------------------------------------------------
  void (*binary)(Binary op, T* y, const T* a, const T* b, const Strided& s);  // y dense: s.y is not read
  void (*unary)(Unary op, T* y, const T* x, i64 n);
  // dx = dy * f'(x), f' written in terms of y = f(x): sqrt, sigmoid, tanh, relu.
  void (*unary_backward)(Unary op, T* dx, const T* dy, const T* y, i64 n);
  void (*add_relu)(T* y, const T* a, const T* b, i64 n);  // max(a + b, 0); its backward is relu's
  // Both gradients in the broadcast shape n. A tie of maximum gives each side half; 0**0 counts as constant in b.
  void (*maximum_backward)(T* da, T* db, const T* dy, const T* a, const T* b, i64 n);
  void (*pow_backward)(T* da, T* db, const T* dy, const T* a, const T* b, const T* y, i64 n);
  void (*dropout)(T* y, const T* x, i64 n, double p, RandomKey key);  // y = x / (1 - p) or 0; backward: same on dy
  void (*copy)(T* y, const T* a, const Strided& s);                   // y[s.y] = a[s.a]
  void (*fill)(T* y, double value, i64 n);
  // Between float and bf16, rounded to the nearest, ties to even: in the table of float alone.
  void (*to_bf16)(bf16* y, const T* x, i64 n);
  void (*from_bf16)(T* y, const bf16* x, i64 n);

  // reduce.cpp -----------------------------------------------------------------------------------------------
  void (*sum)(T* y, const T* x, i64 outer, i64 n, i64 inner);  // y (outer, inner) of x (outer, n, inner), in double
  void (*max)(T* y, const T* x, i64 outer, i64 n, i64 inner);  // the largest; NaN where one is NaN
  // dx (outer, n, inner) = dy / ties where x == y, else 0, with dy and y (outer, inner); NaN where y is NaN.
  void (*max_backward)(T* dx, const T* dy, const T* x, const T* y, i64 outer, i64 n, i64 inner);

  // matmul.cpp -----------------------------------------------------------------------------------------------
  // y (batch, M, N) dense = a (batch, M, K) times b (batch, K, N); a stride of 0 repeats a matrix over the batch.
  void (*matmul)(T* y, const T* a, const T* b, i64 batch, i64 M, i64 N, i64 K, i64 a_batch, MatrixView a_view,
                 i64 b_batch, MatrixView b_view);

  // conv2d.cpp -----------------------------------------------------------------------------------------------
  void (*conv2d_forward)(T* y, const T* x, const T* w, const Epilogue<T>& epilogue, const Window& s,
                         ConvAlgorithm algorithm);
  // Writes dx, or adds to what it holds.
  void (*conv2d_backward_input)(T* dx, const T* dy, const T* w, const Window& s, ConvAlgorithm algorithm, bool add);
  void (*conv2d_backward_weight)(Wide<T>* dw, const T* dy, const T* x, const Window& s, ConvAlgorithm algorithm);

  // batch_norm.cpp: x is (M, C), statistics over M ----------------------------------------------------------
  // y = gamma * (x - mean) * inv_std + beta, plus residual if given, through ReLU if asked. mean and inv_std
  // (C) are written for backward; running_mean and running_var, if given, are updated with share `momentum`.
  void (*batch_norm_forward)(T* y, Wide<T>* mean, Wide<T>* inv_std, Wide<T>* running_mean, Wide<T>* running_var,
                             const T* x, const Wide<T>* gamma, const Wide<T>* beta, const T* residual, bool relu,
                             double momentum, double eps, i64 M, i64 C);
  // Through a ReLU dy is masked by y > 0: of y itself, if that is given, or of y as it follows from x, if beta is given
  // (an array less to read; not with a residual). dresidual, if given, gets the masked dy.
  void (*batch_norm_backward)(T* dx, T* dresidual, Wide<T>* dgamma, Wide<T>* dbeta, const T* dy, const T* x, const T* y,
                              const Wide<T>* gamma, const Wide<T>* beta, const Wide<T>* mean, const Wide<T>* inv_std,
                              i64 M, i64 C);
  void (*batch_norm_inference)(T* y, const T* x, const Wide<T>* gamma, const Wide<T>* beta, const Wide<T>* mean,
                               const Wide<T>* var, const T* residual, bool relu, double eps, i64 M, i64 C);
  void (*batch_norm_inference_backward)(T* dx, Wide<T>* dgamma, Wide<T>* dbeta, const T* dy, const T* x,
                                        const Wide<T>* gamma, const Wide<T>* mean, const Wide<T>* var, double eps,
                                        i64 M, i64 C);

  // pool.cpp -------------------------------------------------------------------------------------------------
  // argmax: position r * S + s inside the window of the first largest element; padding never wins.
  void (*max_pool2d_forward)(T* y, std::int32_t* argmax, const T* x, const Window& s);
  void (*max_pool2d_backward)(T* dx, const T* dy, const std::int32_t* argmax, const Window& s);
  void (*avg_pool2d_forward)(T* y, const T* x, const Window& s);  // padding counts as zeros, divisor R * S
  void (*avg_pool2d_backward)(T* dx, const T* dy, const Window& s);
  void (*global_avg_pool2d_forward)(T* y, const T* x, i64 N, i64 HW, i64 C);
  void (*global_avg_pool2d_backward)(T* dx, const T* dy, i64 N, i64 HW, i64 C);

  // loss.cpp: mean over N of the cross-entropy of softmax(logits) against smoothed labels, and its gradient ---
  void (*cross_entropy)(Wide<T>* loss, T* dlogits, const T* logits, const i64* labels, double smoothing, i64 N, i64 K);

  // sgd.cpp: one parameter of n elements per index; velocity is nullptr where momentum is 0 -------------------
  // v = momentum * v + (dw + decay * w); w -= lr * (nesterov ? dw + decay * w + momentum * v : v). w and v updated.
  void (*sgd)(i64 count, T* const* w, T* const* velocity, const T* const* dw, const i64* n, const double* decay,
              double lr, double momentum, bool nesterov);

  // augment.cpp ----------------------------------------------------------------------------------------------
  // x[i] (H, W, C) = the image index[i] normalised as (u8 - mean[h, w, c]) * scale[c], flipped left to right where
  // flip[i], moved by (top[i], left[i]): x[i][h][w] = image[h + top][w + left], zero outside of the image.
  // The shift applies to the image after the flip.
  void (*augment)(T* x, const std::uint8_t* images, const i64* index, const std::int32_t* top, const std::int32_t* left,
                  const std::uint8_t* flip, const float* mean, const float* scale, i64 N, i64 H, i64 W, i64 C);
};

// The table in use. The CPU's is chosen by dispatch.cpp, CUDA's is gathered in cuda/table.cu, for bf16 too.
template <class T>
const Kernels<T>& kernels();

}  // namespace tinyres
