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
// winograd: CPU; tiled and mma: CUDA; direct: on the CPU blocked loops, on CUDA conv3x3.cu where it takes the shape.
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

// ---- for the 3x3 convolutions fused with batch norm (conv3x3.cu) ---------------------------------------------------
// Batch norm needs sums over a whole tensor. The kernel that writes the tensor leaves them in parts, `rows`: one row
// for each of its blocks, in a buffer of `row_count` rows. The kernels that read the tensor add the rows, in their
// order, before they begin; the first of them also keeps the result, which later ones then read instead.

// Batch norm of a raw tensor x (M, C) as it is loaded: x * scale + shift with scale = gamma * inv_std and
// shift = beta - mean * scale.
template <class T>
struct BatchNorm {
  const Wide<T>*gamma, *beta;          // both nullptr: there is no batch norm, and no ReLU after it
  const Wide<T>* rows;                 // per block C means, C sums of squared deviations; behind all rows a count each
  i64 row_count;                       // 0: mean and inv_std are known
  Wide<T>*mean, *inv_std;              // (C), written if there are rows, else read
  Wide<T>*running_mean, *running_var;  // updated if there are rows, and if they are given
  double momentum, eps;
};

// Its gradient: dy of the raw tensor y (M, C) from dz, the gradient of the batch norm's result, as it is loaded:
// dy = a * dz + b * y + c, with a, b and c from the sums of dz and of dz * (y - mean) over M.
template <class T>
struct BatchNormGradient {
  const T* y;  // nullptr: there is no batch norm, and dz is dy
  const Wide<T>*gamma, *mean, *inv_std;
  const Wide<T>* rows;     // per block C sums of dz, C sums of dz * (y - mean)
  i64 row_count;           // 0: dgamma and dbeta are known
  Wide<T>*dgamma, *dbeta;  // (C), written if there are rows, else read
};

// What goes round the convolutions of a block: x (N, H, W, C). Forward, y[n, p, q, k] += x[n, p * stride, q * stride,
// k - before] where x has such a channel; backward, the other way round, dx[n, p * stride, q * stride, c] +=
// x[n, p, q, c + before]. 1 and 0 are the identity; option A has a stride of 2, and before its channels that many
// zeros.
template <class T>
struct Shortcut {
  const T* x;  // nullptr: none
  i64 H, W, C, stride, before;
};

// What becomes of dx (N, H, W, C), the gradient by the input of a convolution: dz = (dx + shortcut) where the ReLU
// before the convolution let its input pass, else 0; and the parts of the sums that the batch norm before that ReLU
// needs.
template <class T>
struct InputGradient {
  Shortcut<T> shortcut;  // the gradient that came round
  const T* output;  // dz passes where output > 0, or, if it is nullptr and beta is given, where batch norm of y > 0
  const T* y;       // the raw input (N, H, W, C) of that batch norm
  const Wide<T>*gamma, *beta, *mean, *inv_std;
  Wide<T>* rows;  // per block C sums of dz, C sums of dz * (y - mean); nullptr: not wanted
};

constexpr i64 CLASSIFIER_LIMIT = 11000;  // so that what a block of head.cu keeps fits into 99 KB

// ---- for SGD -------------------------------------------------------------------------------------------------------

// One parameter, of n elements.
template <class T>
struct SgdParameter {
  T *w, *velocity;  // updated; velocity is nullptr where momentum is 0
  bf16* copy;       // gets the new w, rounded; nullptr: not wanted. Only beside float
  const T* dw;      // `parts` arrays of n, one behind the other, that are added up: what weight gradients leave
  i64 n, parts;
  double decay;
};

struct SgdRule {
  double lr;
  const double* lr_array;  // if given, the rate is what lies there when the kernel runs
  double momentum;
  bool nesterov;
};

// ---- for batches of a step that the device counts ------------------------------------------------------------------

// The images of step s: order[s % steps_per_epoch * batch_size + i] for i < N. Where `augment`, draw s under `key`
// moves and flips them; `padding` pixels of zeros around an image are what it may move into.
struct BatchPlan {
  i64 N, batch_size, steps_per_epoch;
  bool augment;
  i64 padding;
  std::uint64_t key;
};

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

  // conv3x3.cu: padding 1, stride 1 or 2, C and K each 16, 32 or 64, arrays aligned to 16 bytes; nullptr on the CPU ---
  // float goes through the tensor cores as tf32. How many rows of partial sums a kernel leaves, forward or in
  // backward_input; 0 if these kernels do not take the shape.
  i64 (*conv3x3_rows)(const Window& s, bool backward);
  // y = convolution of relu(batch norm of x), or of x, with w; rows, if given, get the statistics of y:
  // conv3x3_rows * (2 K + 1) numbers.
  void (*conv3x3_forward)(T* y, Wide<T>* rows, const T* x, const T* w, const BatchNorm<T>& batch_norm, const Window& s);
  // dx (N, H, W, C) from dz (N, P, Q, K), w as it is.
  void (*conv3x3_backward_input)(T* dx, const T* dz, const T* w, const BatchNormGradient<T>& gradient,
                                 const InputGradient<T>& input, const Window& s);
  // dw from dz and x, or relu(batch norm of x) whose mean and inv_std are known. If `slabs` is given, conv3x3_slabs
  // times as large as dw, dw is not written, but left there in parts, to be added in order by whoever updates the
  // weights.
  i64 (*conv3x3_slabs)(const Window& s);
  void (*conv3x3_backward_weight)(Wide<T>* dw, Wide<T>* slabs, const T* dz, const T* x,
                                  const BatchNormGradient<T>& gradient, const BatchNorm<T>& batch_norm,
                                  const Window& s);
  // y (N, H, W, C) = relu(batch norm of x + shortcut); shortcut_batch_norm, if it has a gamma, applies to the shortcut,
  // which then is the raw output of a convolution. C is a power of two from 16 to 256.
  void (*block_output)(T* y, const T* x, const BatchNorm<T>& batch_norm, const Shortcut<T>& shortcut,
                       const BatchNorm<T>& shortcut_batch_norm, i64 N, i64 H, i64 W, i64 C);
  // dz = dy where output > 0, else 0, all (M, C), and the rows of sums with y, the batch norm's raw input:
  // block_output_rows * 2 C numbers. Where no convolution's backward_input has done it.
  i64 (*block_output_rows)(i64 M, i64 C);
  void (*block_output_backward)(T* dz, Wide<T>* rows, const T* dy, const T* output, const T* y, const Wide<T>* mean,
                                i64 M, i64 C);

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

  // head.cu: the end of a network; nullptr on the CPU -------------------------------------------------------
  // cross_entropy of (the means over HW of x (N, HW, C)) w + b, w (C, K) and b (K), and, where dx is given, the
  // gradients by x, w and b. dw and db, if `parts`, are not written whole, but left in classifier_parts parts each, to
  // be added up. metrics (4), updated: the losses of all images, how many are not classified right, how many there are,
  // and a 0 that the kernel counts its blocks with. C + 2 K is at most CLASSIFIER_LIMIT.
  i64 (*classifier_parts)(i64 N, i64 C, i64 K);
  void (*classifier)(Wide<T>* loss, T* dx, Wide<T>* dw, Wide<T>* db, double* metrics, const T* x, const T* w,
                     const T* b, const i64* labels, double smoothing, bool parts, i64 N, i64 HW, i64 C, i64 K);

  // sgd.cpp: `count` parameters -------------------------------------------------------------------------------
  // v = momentum * v + (dw + decay * w); w -= lr * (nesterov ? dw + decay * w + momentum * v : v). w and v updated.
  void (*sgd)(i64 count, const SgdParameter<T>* parameters, const SgdRule& rule);

  // augment.cpp ----------------------------------------------------------------------------------------------
  // x[i] (H, W, C) = the image index[i] normalised as (u8 - mean[h, w, c]) * scale[c], flipped left to right where
  // flip[i], moved by (top[i], left[i]): x[i][h][w] = image[h + top][w + left], zero outside of the image.
  // The shift applies to the image after the flip.
  void (*augment)(T* x, const std::uint8_t* images, const i64* index, const std::int32_t* top, const std::int32_t* left,
                  const std::uint8_t* flip, const float* mean, const float* scale, i64 N, i64 H, i64 W, i64 C);
  // x (N, H, W, C) and batch_labels (N) of step counter[0], which becomes the next one; counter[1] is 0, and counts
  // blocks.
  void (*augment_step)(T* x, i64* batch_labels, const std::uint8_t* images, const i64* labels, const i64* order,
                       i64* counter, const float* mean, const float* scale, const BatchPlan& plan, i64 H, i64 W, i64 C);
};

// The table in use. The CPU's is chosen by dispatch.cpp, CUDA's is gathered in cuda/table.cu, for bf16 too.
template <class T>
const Kernels<T>& kernels();

// How many of CUDA's kernels this thread has asked for.
std::uint64_t launch_count();

}  // namespace tinyres
