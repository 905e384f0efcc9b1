// A batch from uint8 images: picked by index, normalised, flipped, moved, in one pass. What the shift brings in from
// outside of the image is zero after normalisation, as the papers pad.
//
// One thread per element of x, so that the writes, which are most of the traffic, are coalesced whatever C is.
#include "common.h"

namespace tinyres {
namespace {

constexpr int THREADS = 256;

// index is trusted: a kernel does not know how many images there are. The caller has checked it on the host, where it
// was drawn. Any shift will do, since only what it leaves inside of the image is read.
template <class T>
__global__ void normalise_and_move(T* x, const std::uint8_t* __restrict__ images, const i64* __restrict__ index,
                                   const std::int32_t* __restrict__ top, const std::int32_t* __restrict__ left,
                                   const std::uint8_t* __restrict__ flip, const float* __restrict__ mean,
                                   const float* __restrict__ scale, u32 size, u32 H, u32 W, u32 C) {
  const u32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= size) return;
  const u32 pixel = i / C, c = i % C, w = pixel % W, h = pixel / W % H, n = pixel / W / H;
  const i64 row = i64(h) + top[n], column = i64(w) + left[n];  // of the flipped image
  Wide<T> value = 0;
  if (row >= 0 && row < H && column >= 0 && column < W) {
    const i64 from = (row * W + (flip[n] ? W - 1 - column : column)) * C + c;
    const std::uint8_t* image = images + index[n] * (i64(H) * W * C);
    value = (Wide<T>(image[from]) - Wide<T>(mean[from])) * Wide<T>(scale[c]);
  }
  x[i] = narrow<T>(value);
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

}  // namespace

template <class T>
void augment_kernels(Kernels<T>& table) {
  table.augment = augment<T>;
}

template void augment_kernels<float>(Kernels<float>&);
template void augment_kernels<double>(Kernels<double>&);
template void augment_kernels<bf16>(Kernels<bf16>&);

}  // namespace tinyres
