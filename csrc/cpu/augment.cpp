// A batch from uint8 images: picked by index, normalised, flipped, moved. What the shift brings in from outside of the
// image is zero after normalisation, as the papers pad.
#include <math.h>

#include "../random.h"
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

// One row of W pixels: to[w] = (from[w + left] - mean[w + left]) * scale, all three reversed first where `flip`.
// scale is repeated for each pixel of the row, so that the unflipped row is one loop over W * C values.
template <class T>
void augment_row(T* __restrict to, const std::uint8_t* from, const float* mean, const T* scale, i64 left, bool flip,
                 i64 W, i64 C) {
  const i64 begin = left < 0 ? -left : 0, end = left > 0 ? W - left : W;
  if (begin >= end) {
    for (i64 i = 0; i < W * C; i++) to[i] = 0;
    return;
  }
  for (i64 i = 0; i < begin * C; i++) to[i] = 0;
  if (flip) {
    for (i64 w = begin; w < end; w++) {
      const i64 source = (W - 1 - (w + left)) * C;
      for (i64 c = 0; c < C; c++) to[w * C + c] = (T(from[source + c]) - T(mean[source + c])) * scale[c];
    }
  } else {
    for (i64 i = begin * C; i < end * C; i++)
      to[i] = (T(from[left * C + i]) - T(mean[left * C + i])) * scale[i - begin * C];
  }
  for (i64 i = end * C; i < W * C; i++) to[i] = 0;
}

template <class T>
void augment(T* x, const std::uint8_t* images, const i64* index, const std::int32_t* top, const std::int32_t* left,
             const std::uint8_t* flip, const float* mean, const float* scale, i64 N, i64 H, i64 W, i64 C) {
  Scratch<T> scale_row(W * C);
  for (i64 i = 0; i < W * C; i++) scale_row[i] = T(scale[i % C]);
  parallel_ranges(N, items_per_part(H * W * C), [&](i64 begin, i64 end) {
    for (i64 n = begin; n < end; n++) {
      for (i64 h = 0; h < H; h++) {
        T* to = x + (n * H + h) * W * C;
        const i64 source = h + top[n];
        if (source < 0 || source >= H) {
          for (i64 i = 0; i < W * C; i++) to[i] = 0;
        } else {
          const std::uint8_t* from = images + (index[n] * H + source) * W * C;
          augment_row(to, from, mean + source * W * C, scale_row.get(), left[n], flip[n] != 0, W, C);
        }
      }
    }
  });
}

template <class T>
void augment_step(T* x, i64* batch_labels, const std::uint8_t* images, const i64* labels, const i64* order,
                  i64* counter, const float* mean, const float* scale, const BatchPlan& plan, i64 H, i64 W, i64 C) {
  const i64 N = plan.N, step = counter[0];
  const i64* const index = order + step % plan.steps_per_epoch * plan.batch_size;
  Scratch<std::int32_t> top(N), left(N);
  Scratch<std::uint8_t> flip(N);
  const auto draw = [&](i64 i) { return philox::uniform(i, plan.key, std::uint64_t(step)); };
  const auto shift = [&](i64 i) {
    return std::int32_t(::floor(draw(i) * double(2 * plan.padding + 1))) - std::int32_t(plan.padding);
  };
  for (i64 n = 0; n < N; n++) {  // top, left and flip, each for all images of the batch, one behind the other
    top[n] = plan.augment ? shift(n) : 0;
    left[n] = plan.augment ? shift(N + n) : 0;
    flip[n] = plan.augment && draw(2 * N + n) < 0.5;
    batch_labels[n] = labels[index[n]];
  }
  augment(x, images, index, top.get(), left.get(), flip.get(), mean, scale, N, H, W, C);
  counter[0] = i64(std::uint64_t(step) + 1);
}

}  // namespace

template <class T>
void augment_kernels(Kernels<T>& table) {
  table.augment = augment<T>;
  table.augment_step = augment_step<T>;
}

template void augment_kernels<float>(Kernels<float>&);
template void augment_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
