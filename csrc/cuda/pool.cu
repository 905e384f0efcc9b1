// Pooling over windows of NHWC images, and over whole images.
//
// Forward, a thread makes an output element from the part of its window that lies on the image. Backward, it makes an
// element of dx from the windows that cover it, in order: nothing is added to by two threads, so every sum has a
// fixed order. Neighbouring threads take neighbouring channels, so that a warp reads runs of memory; the rows of a
// block take neighbouring pixels, whose windows overlap and are found in the cache.
//   N batch, H W input size, C channels, R S window, P Q output size.
#include "common.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;
constexpr i64 MAX_PIXELS = i64(1) << 30;  // leaves room for padding in an int

// As many threads along x as there are channels, or 256; what is left of the block along y.
inline dim3 block_for(i64 C) {
  unsigned channels = 1;
  while (channels < C && channels < THREADS) channels *= 2;
  return dim3(channels, THREADS / channels);
}

// Launches a kernel for which threadIdx.x is a channel and thread_pixel() one of `pixels`.
template <class... Params, class... Args>
void launch_pixels(const char* op, void (*kernel)(Params...), i64 pixels, i64 C, Args... args) {
  if (pixels == 0) return;
  const dim3 block = block_for(C);
  launch(op, kernel, dim3(unsigned(ceil_div(pixels, block.y))), block, 0, current_stream(), args...);
}

__device__ inline int thread_pixel() { return int(blockIdx.x * blockDim.y + threadIdx.y); }

inline void check_pixels(const char* op, i64 input, i64 output) {
  if (max(input, output) > MAX_PIXELS)
    throw std::invalid_argument("[" + std::string(op) + "] a batch must have at most 2**30 pixels; got " +
                                std::to_string(max(input, output)));
}

inline void check_window(const char* op, const Window& s) { check_pixels(op, s.N * s.H * s.W, s.N * s.P * s.Q); }

// ---- windows and what they cover ----------------------------------------------------------------------------------

struct Span {
  int begin, end;
};

// The part of a window along one axis that lies on the image, for a window starting at `start`.
__device__ inline Span on_image(int start, int window, int size) { return {max(0, -start), min(window, size - start)}; }

// The windows along one axis that cover position `at`, the first of which starts at -padding.
__device__ inline Span covering(int at, int window, int stride, int padding, int count) {
  const int end = at + padding, begin = end - window;  // a window may start in (begin, end]
  return {begin < 0 ? 0 : begin / stride + 1, min(end / stride + 1, count)};
}

// body(input pixel, position r * S + s in the window) for the part of an output pixel's window that lies on the image.
template <class Body>
__device__ void for_inputs(const Window& s, int pixel, const Body& body) {
  const int P = int(s.P), Q = int(s.Q), H = int(s.H), W = int(s.W), R = int(s.R), S = int(s.S);
  const int n = pixel / (P * Q), p = pixel / Q % P, q = pixel % Q;
  const int h = p * int(s.stride_h) - int(s.pad_h), w = q * int(s.stride_w) - int(s.pad_w);
  const Span rows = on_image(h, R, H), columns = on_image(w, S, W);
  for (int r = rows.begin; r < rows.end; r++)
    for (int t = columns.begin; t < columns.end; t++) body((n * H + h + r) * W + w + t, r * S + t);
}

// body(output pixel, position in its window) for the windows that cover an input pixel.
template <class Body>
__device__ void for_outputs(const Window& s, int pixel, const Body& body) {
  const int P = int(s.P), Q = int(s.Q), H = int(s.H), W = int(s.W), S = int(s.S);
  const int n = pixel / (H * W), h = pixel / W % H, w = pixel % W;
  const int stride_h = int(s.stride_h), stride_w = int(s.stride_w), pad_h = int(s.pad_h), pad_w = int(s.pad_w);
  const Span rows = covering(h, int(s.R), stride_h, pad_h, P), columns = covering(w, S, stride_w, pad_w, Q);
  for (int p = rows.begin; p < rows.end; p++)
    for (int q = columns.begin; q < columns.end; q++)
      body((n * P + p) * Q + q, (h + pad_h - p * stride_h) * S + w + pad_w - q * stride_w);
}

// ---- max ----------------------------------------------------------------------------------------------------------

template <class T>
__global__ void max_pool2d_forward_kernel(T* __restrict__ y, std::int32_t* __restrict__ argmax, const T* __restrict__ x,
                                          Window s) {
  const int pixel = thread_pixel();
  if (pixel >= s.N * s.P * s.Q) return;
  for (i64 c = threadIdx.x; c < s.C; c += blockDim.x) {
    Wide<T> best = 0;
    int at = -1;
    for_inputs(s, pixel, [&](int input, int position) {
      const Wide<T> v = wide(x[input * s.C + c]);
      if (at < 0 || v > best || (v != v && best == best)) {  // the first NaN wins and stays
        best = v;
        at = position;
      }
    });
    y[pixel * s.C + c] = narrow<T>(best);
    argmax[pixel * s.C + c] = at;
  }
}

template <class T>
void max_pool2d_forward(T* y, std::int32_t* argmax, const T* x, const Window& s) {
  check_window("max_pool2d_forward", s);
  launch_pixels("max_pool2d_forward", max_pool2d_forward_kernel<T>, s.N * s.P * s.Q, s.C, y, argmax, x, s);
}

// A position in argmax that is not in the window, or not on the image, is met by no pixel: its dy goes nowhere.
template <class T>
__global__ void max_pool2d_backward_kernel(T* __restrict__ dx, const T* __restrict__ dy,
                                           const std::int32_t* __restrict__ argmax, Window s) {
  const int pixel = thread_pixel();
  if (pixel >= s.N * s.H * s.W) return;
  for (i64 c = threadIdx.x; c < s.C; c += blockDim.x) {
    Wide<T> sum = 0;
    for_outputs(s, pixel, [&](int output, int position) {
      const i64 i = output * s.C + c;
      if (argmax[i] == position) sum += wide(dy[i]);
    });
    dx[pixel * s.C + c] = narrow<T>(sum);
  }
}

template <class T>
void max_pool2d_backward(T* dx, const T* dy, const std::int32_t* argmax, const Window& s) {
  check_window("max_pool2d_backward", s);
  launch_pixels("max_pool2d_backward", max_pool2d_backward_kernel<T>, s.N * s.H * s.W, s.C, dx, dy, argmax, s);
}

// ---- average ------------------------------------------------------------------------------------------------------

template <class T>
__global__ void avg_pool2d_forward_kernel(T* __restrict__ y, const T* __restrict__ x, Window s) {
  const int pixel = thread_pixel();
  if (pixel >= s.N * s.P * s.Q) return;
  for (i64 c = threadIdx.x; c < s.C; c += blockDim.x) {
    Wide<T> sum = 0;
    for_inputs(s, pixel, [&](int input, int) { sum += wide(x[input * s.C + c]); });
    y[pixel * s.C + c] = narrow<T>(sum / Wide<T>(s.R * s.S));
  }
}

template <class T>
void avg_pool2d_forward(T* y, const T* x, const Window& s) {
  check_window("avg_pool2d_forward", s);
  launch_pixels("avg_pool2d_forward", avg_pool2d_forward_kernel<T>, s.N * s.P * s.Q, s.C, y, x, s);
}

template <class T>
__global__ void avg_pool2d_backward_kernel(T* __restrict__ dx, const T* __restrict__ dy, Window s) {
  const int pixel = thread_pixel();
  if (pixel >= s.N * s.H * s.W) return;
  for (i64 c = threadIdx.x; c < s.C; c += blockDim.x) {
    Wide<T> sum = 0;
    for_outputs(s, pixel, [&](int output, int) { sum += wide(dy[output * s.C + c]); });
    dx[pixel * s.C + c] = narrow<T>(sum / Wide<T>(s.R * s.S));
  }
}

template <class T>
void avg_pool2d_backward(T* dx, const T* dy, const Window& s) {
  check_window("avg_pool2d_backward", s);
  launch_pixels("avg_pool2d_backward", avg_pool2d_backward_kernel<T>, s.N * s.H * s.W, s.C, dx, dy, s);
}

// ---- average of the whole image -----------------------------------------------------------------------------------

constexpr int CHANNELS = WARP, ROWS = THREADS / CHANNELS;

// A block averages CHANNELS channels of one image: each of its rows sums every ROWS-th pixel, then the rows are added
// up in a tree. So even small images with few channels give every multiprocessor something to do.
template <class T>
__global__ void global_avg_pool2d_forward_kernel(T* __restrict__ y, const T* __restrict__ x, i64 HW, i64 C) {
  SHARED(partial, Wide<T>[ROWS][CHANNELS]);
  const int groups = int(ceil_div(C, CHANNELS)), row = int(threadIdx.y), lane = int(threadIdx.x);
  const i64 n = int(blockIdx.x) / groups, c = i64(int(blockIdx.x) % groups) * CHANNELS + lane;
  Wide<T> sum = 0;
  if (c < C)
    for (i64 i = row; i < HW; i += ROWS) sum += wide(x[(n * HW + i) * C + c]);
  partial[row][lane] = sum;
  for (int half = ROWS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) partial[row][lane] += partial[row + half][lane];
  }
  if (row == 0 && c < C) y[n * C + c] = narrow<T>(partial[0][lane] / Wide<T>(HW));
}

template <class T>
void global_avg_pool2d_forward(T* y, const T* x, i64 N, i64 HW, i64 C) {
  const i64 blocks = N * ceil_div(C, CHANNELS);
  check_pixels("global_avg_pool2d_forward", N * HW, blocks);
  if (blocks == 0) return;
  launch("global_avg_pool2d_forward", global_avg_pool2d_forward_kernel<T>, dim3(unsigned(blocks)), dim3(CHANNELS, ROWS),
         0, current_stream(), y, x, HW, C);
}

template <class T>
__global__ void global_avg_pool2d_backward_kernel(T* __restrict__ dx, const T* __restrict__ dy, i64 N, i64 HW, i64 C) {
  const int pixel = thread_pixel(), n = pixel / int(HW);
  if (pixel >= N * HW) return;
  for (i64 c = threadIdx.x; c < C; c += blockDim.x) dx[pixel * C + c] = narrow<T>(wide(dy[n * C + c]) / Wide<T>(HW));
}

template <class T>
void global_avg_pool2d_backward(T* dx, const T* dy, i64 N, i64 HW, i64 C) {
  check_pixels("global_avg_pool2d_backward", N * HW, N);
  launch_pixels("global_avg_pool2d_backward", global_avg_pool2d_backward_kernel<T>, N * HW, C, dx, dy, N, HW, C);
}

}  // namespace

template <class T>
void pool_kernels(Kernels<T>& table) {
  table.max_pool2d_forward = max_pool2d_forward<T>;
  table.max_pool2d_backward = max_pool2d_backward<T>;
  table.avg_pool2d_forward = avg_pool2d_forward<T>;
  table.avg_pool2d_backward = avg_pool2d_backward<T>;
  table.global_avg_pool2d_forward = global_avg_pool2d_forward<T>;
  table.global_avg_pool2d_backward = global_avg_pool2d_backward<T>;
}

template void pool_kernels<float>(Kernels<float>&);
template void pool_kernels<double>(Kernels<double>&);
template void pool_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
