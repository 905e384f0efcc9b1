// The end of a residual block: y = relu(batch norm of x + shortcut), the one pass over memory that batch norm still
// takes where the convolutions around it do the rest (conv3x3.cu), and the gradient before it where none of them can.
//
// The shortcut is a tensor, a raw output of a convolution with its own batch norm, or option A of He et al. 2015,
// section 3.3: every second pixel, and zeros for new channels. That is an index here, not a kernel.
#include "fused.h"

namespace tinyres {
namespace {

// A thread keeps to its channels, a pack of them, and takes every so many pixels.
template <class T>
struct PixelWalk {
  int channel, pixel, stride;
  __device__ explicit PixelWalk(int C) {
    const int packs = C / V<T>, t = int(threadIdx.x);
    channel = t % packs * V<T>;
    pixel = int(blockIdx.x) * (THREADS / packs) + t / packs;
    stride = int(gridDim.x) * (THREADS / packs);
  }
};

template <class T>
__global__ void __launch_bounds__(THREADS)
    block_output_forward(T* __restrict__ y, const T* __restrict__ x, const __grid_constant__ BatchNorm<T> bn,
                         const __grid_constant__ Shortcut<T> shortcut, const __grid_constant__ BatchNorm<T> shortcut_bn,
                         int H, int W, int C, int pixels) {
  using Number = Wide<T>;
  SmemArena arena;
  Number* coefficients = arena.take<Number>(4 * C);
  load_batch_norm(coefficients, coefficients + C, bn, C, 0, C, blockIdx.x == 0);
  if (shortcut_bn.gamma)
    load_batch_norm(coefficients + 2 * C, coefficients + 3 * C, shortcut_bn, C, 0, C, blockIdx.x == 0);
  __syncthreads();
  const PixelWalk<T> walk(C);
  Number scale[V<T>], shift[V<T>], shortcut_scale[V<T>], shortcut_shift[V<T>];
#pragma unroll
  for (int v = 0; v < V<T>; v++) {
    const int c = walk.channel + v;
    scale[v] = coefficients[c], shift[v] = coefficients[C + c];
    shortcut_scale[v] = shortcut_bn.gamma ? coefficients[2 * C + c] : 1;
    shortcut_shift[v] = shortcut_bn.gamma ? coefficients[3 * C + c] : 0;
  }
  const int from = walk.channel - int(shortcut.before), stride = int(shortcut.stride);
  const bool round = shortcut.x && within(from, int(shortcut.C));
#pragma unroll 4
  for (int pixel = walk.pixel; pixel < pixels; pixel += walk.stride) {
    const i64 at = i64(pixel) * C + walk.channel;
    const auto in = pack_at<Pack<T, V<T>>>(x + at);
    Pack<T, V<T>> more{}, out;
    if (round) {
      i64 there = pixel;
      if (stride > 1) {
        const int n = pixel / W / H, h = pixel / W % H, v = pixel % W;
        there = (i64(n) * shortcut.H + h * stride) * shortcut.W + v * stride;
      }
      more = pack_at<Pack<T, V<T>>>(shortcut.x + there * shortcut.C + from);
    }
#pragma unroll
    for (int v = 0; v < V<T>; v++) {
      Number sum = affine(wide(in.at[v]), scale[v], shift[v]);
      if (round) sum += affine(wide(more.at[v]), shortcut_scale[v], shortcut_shift[v]);
      out.at[v] = narrow<T>(relu(sum));
    }
    pack_at<Pack<T, V<T>>>(y + at) = out;
  }
}

void expect_channels(const char* op, i64 C, std::initializer_list<const void*> arrays) {
  if (C < 16 || C > THREADS || (C & (C - 1)))
    throw std::invalid_argument("[" + std::string(op) + "] C must be a power of two from 16 to 256; got " +
                                std::to_string(C));
  expect_aligned(op, arrays);
}

template <class T>
i64 block_output_rows(i64 M, i64 C) {
  return min(most_rows(C), ceil_div(M * C / V<T>, THREADS));
}

template <class T>
void block_output(T* y, const T* x, const BatchNorm<T>& batch_norm, const Shortcut<T>& shortcut,
                  const BatchNorm<T>& shortcut_batch_norm, i64 N, i64 H, i64 W, i64 C) {
  expect_channels("block_output", C, {y, x, shortcut.x});
  if (N * H * W == 0) return;
  launch("block_output", block_output_forward<T>, dim3(unsigned(block_output_rows<T>(N * H * W, C))), dim3(THREADS),
         std::size_t(4 * C) * sizeof(Wide<T>), current_stream(), y, x, batch_norm, shortcut, shortcut_batch_norm,
         int(H), int(W), int(C), int(N * H * W));
}

template <class T, class W = Wide<T>>
__global__ void __launch_bounds__(THREADS)
    mask_and_sum(T* __restrict__ dz, W* __restrict__ rows, const T* __restrict__ dy, const T* __restrict__ output,
                 const T* __restrict__ y, const W* __restrict__ mean, int C, int M) {
  using P = Pack<T, V<T>>;
  const PixelWalk<T> walk(C);
  W middle[V<T>];
#pragma unroll
  for (int v = 0; v < V<T>; v++) middle[v] = mean[walk.channel + v];
  Sums<W, V<T>> total{};
#pragma unroll 4
  for (int pixel = walk.pixel; pixel < M; pixel += walk.stride) {
    const i64 at = i64(pixel) * C + walk.channel;
    const P above = pack_at<P>(output + at), raw = pack_at<P>(y + at);
    P out = pack_at<P>(dy + at);
#pragma unroll
    for (int v = 0; v < V<T>; v++) {
      if (!(wide(above.at[v]) > 0)) out.at[v] = T{};
      total.g[v] += wide(out.at[v]);
      total.gx[v] = fma(wide(out.at[v]), wide(raw.at[v]) - middle[v], total.gx[v]);
    }
    pack_at<P>(dz + at) = out;
  }
  const int packs = C / V<T>;
  total = join_threads(total, packs, THREADS / packs, [](Sums<W, V<T>> a, const Sums<W, V<T>>& b) {
    a.merge(b);
    return a;
  });
  if (int(threadIdx.x) >= packs) return;
#pragma unroll
  for (int v = 0; v < V<T>; v++) {
    rows[2 * i64(blockIdx.x) * C + walk.channel + v] = total.g[v];
    rows[(2 * i64(blockIdx.x) + 1) * C + walk.channel + v] = total.gx[v];
  }
}

template <class T>
void block_output_backward(T* dz, Wide<T>* rows, const T* dy, const T* output, const T* y, const Wide<T>* mean, i64 M,
                           i64 C) {
  expect_channels("block_output_backward", C, {dz, dy, output, y});
  if (M == 0) return;
  launch("block_output_backward", mask_and_sum<T>, dim3(unsigned(block_output_rows<T>(M, C))), dim3(THREADS), 0,
         current_stream(), dz, rows, dy, output, y, mean, int(C), int(M));
}

}  // namespace

template <class T>
void block_output_kernels(Kernels<T>& table) {
  table.block_output = block_output<T>;
  table.block_output_rows = block_output_rows<T>;
  table.block_output_backward = block_output_backward<T>;
}
template void block_output_kernels<float>(Kernels<float>&);
template void block_output_kernels<double>(Kernels<double>&);
template void block_output_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
