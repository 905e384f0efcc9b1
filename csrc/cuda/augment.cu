// A batch from uint8 images: picked by index, normalised, flipped, moved, in one pass. What the shift brings in from
// outside of the image is zero after normalisation, as the papers pad.
//
// One thread per element of x, so that the writes, which are most of the traffic, are coalesced whatever C is. Where
// the kernel draws the moves itself, a block makes an image, and so draws them once.
#include "common.h"
#include "random.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;

struct Move {
  std::int32_t top, left;
  bool flip;
};

// Element `at` of an image (H, W, C) after its move. Any shift will do, since only what it leaves inside of the image
// is read.
template <class T>
__device__ T moved(const std::uint8_t* __restrict__ image, const float* __restrict__ mean,
                   const float* __restrict__ scale, u32 at, const Move& move, u32 H, u32 W, u32 C) {
  const u32 pixel = at / C, c = at % C, w = pixel % W, h = pixel / W;
  const i64 row = i64(h) + move.top, column = i64(w) + move.left;  // of the flipped image
  Wide<T> value = 0;
  if (row >= 0 && row < H && column >= 0 && column < W) {
    const i64 from = (row * W + (move.flip ? W - 1 - column : column)) * C + c;
    value = (Wide<T>(image[from]) - Wide<T>(mean[from])) * Wide<T>(scale[c]);
  }
  return narrow<T>(value);
}

// index is trusted: a kernel does not know how many images there are. The caller has checked it on the host, where it
// was drawn.
template <class T>
__global__ void normalise_and_move(T* x, const std::uint8_t* __restrict__ images, const i64* __restrict__ index,
                                   const std::int32_t* __restrict__ top, const std::int32_t* __restrict__ left,
                                   const std::uint8_t* __restrict__ flip, const float* __restrict__ mean,
                                   const float* __restrict__ scale, u32 size, u32 H, u32 W, u32 C) {
  const u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= size) return;
  const u32 n = i / C / W / H;
  const Move move{top[n], left[n], flip[n] != 0};
  x[i] = moved<T>(images + index[n] * (i64(H) * W * C), mean, scale, i - n * (H * W * C), move, H, W, C);
}

template <class T>
void augment(T* x, const std::uint8_t* images, const i64* index, const std::int32_t* top, const std::int32_t* left,
             const std::uint8_t* flip, const float* mean, const float* scale, i64 N, i64 H, i64 W, i64 C) {
  const i64 size = N * H * W * C;
  if (size > INT32_MAX)
    throw std::invalid_argument("[augment] x must have fewer than 2**31 elements; got " + std::to_string(size));
  if (size == 0) return;
  launch("augment", normalise_and_move<T>, dim3(u32(ceil_div(size, THREADS))), THREADS, 0, current_stream(), x, images,
         index, top, left, flip, mean, scale, u32(size), u32(H), u32(W), u32(C));
}

// One image a block. order is trusted, as index is above.
template <class T>
__global__ void __launch_bounds__(THREADS)
    make_batch(T* __restrict__ x, i64* __restrict__ batch_labels, const std::uint8_t* __restrict__ images,
               const i64* __restrict__ labels, const i64* __restrict__ order, i64* counter,
               const float* __restrict__ mean, const float* __restrict__ scale, const __grid_constant__ BatchPlan plan,
               u32 H, u32 W, u32 C) {
  SHARED(draws, int[3]);
  const int thread = int(threadIdx.x), n = int(blockIdx.x);
  const i64 step = counter[0], index = order[step % plan.steps_per_epoch * plan.batch_size + n];
  if (thread < 3) {  // top, left and flip, each for all images of the batch, one behind the other
    const double draw = plan.augment ? philox::uniform(thread * plan.N + n, plan.key, u64(step)) : 0;
    const int shift = plan.augment ? int(floor(draw * double(2 * plan.padding + 1))) - int(plan.padding) : 0;
    draws[thread] = thread < 2 ? shift : plan.augment && draw < 0.5;
  }
  __syncthreads();
  const Move move{draws[0], draws[1], draws[2] != 0};
  const u32 size = H * W * C;
  T* const to = x + i64(n) * size;
#pragma unroll 4
  for (u32 at = threadIdx.x; at < size; at += THREADS)
    to[at] = moved<T>(images + index * size, mean, scale, at, move, H, W, C);
  if (thread != 0) return;
  batch_labels[n] = labels[index];

  // Every thread of this block has read the step: there was a barrier since. The last block to say so moves it on.
  unsigned* const ticket = reinterpret_cast<unsigned*>(counter + 1);
  __threadfence();
  if (atomicAdd(ticket, 1u) != gridDim.x - 1) return;
  __threadfence();
  atomicExch(ticket, 0u);
  counter[0] = i64(u64(step) + 1);
}

template <class T>
void augment_step(T* x, i64* batch_labels, const std::uint8_t* images, const i64* labels, const i64* order,
                  i64* counter, const float* mean, const float* scale, const BatchPlan& plan, i64 H, i64 W, i64 C) {
  if (H * W * C > INT32_MAX)
    throw std::invalid_argument("[augment_step] an image must have fewer than 2**31 elements; got " +
                                std::to_string(H * W * C));
  launch("augment_step", make_batch<T>, dim3(u32(plan.N)), dim3(THREADS), 0, current_stream(), x, batch_labels, images,
         labels, order, counter, mean, scale, plan, u32(H), u32(W), u32(C));
}

}  // namespace

template <class T>
void augment_kernels(Kernels<T>& table) {
  table.augment = augment<T>;
  table.augment_step = augment_step<T>;
}

template void augment_kernels<float>(Kernels<float>&);
template void augment_kernels<double>(Kernels<double>&);
template void augment_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
