// Pooling over windows of NHWC images, channels in vectors. A window is cut to the part of it that lies on the image.
// Forward goes in parallel over output rows; backward over images, because windows may overlap and add up.
#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

// The part [begin, end) of a window along one axis that lies on the image, for a window starting at `start`.
struct Span {
  i64 begin, end;
};

inline Span clip(i64 start, i64 window, i64 size) {
  return {start < 0 ? -start : 0, start + window > size ? size - start : window};
}

// Runs body(pixel, h, w, rows, columns) for the outputs of the rows [begin, end) out of N * P: `pixel` counts output
// pixels, (h, w) is the window's corner on the image, perhaps outside.
template <class F>
inline void for_windows(const Window& s, i64 begin, i64 end, const F& body) {
  for (i64 row = begin; row < end; row++) {
    const i64 h = row % s.P * s.stride_h - s.pad_h;
    const Span rows = clip(h, s.R, s.H);
    for (i64 q = 0; q < s.Q; q++) {
      const i64 w = q * s.stride_w - s.pad_w;
      body(row * s.Q + q, h, w, rows, clip(w, s.S, s.W));
    }
  }
}

template <class T>
void zero(T* p, i64 n) {
  for (i64 i = 0; i < n; i++) p[i] = 0;
}

// ---- max ----------------------------------------------------------------------------------------------------------

// As many positions as Vec<T> has lanes.
template <class T>
struct PositionsOf {
  typedef std::int32_t type __attribute__((vector_size(LANES<T> * sizeof(std::int32_t))));
};
template <class T>
using Positions = typename PositionsOf<T>::type;

template <class T>
void max_pool2d_forward(T* y, std::int32_t* argmax, const T* x, const Window& s) {
  parallel_ranges(s.N * s.P, items_per_part(s.Q * s.R * s.S * s.C), [&](i64 begin, i64 end) {
    for_windows(s, begin, end, [&](i64 pixel, i64 h, i64 w, Span rows, Span columns) {
      const T* image = x + pixel / (s.P * s.Q) * s.H * s.W * s.C;
      for_vectors<T>(s.C, [&](i64 c, i64 lanes) {
        // Positions are kept as T, selected by the same mask as the values: exact up to 2^24, the limit of the op.
        Vec<T> best = splat(T(-__builtin_inf())), at = splat(T(rows.begin * s.S + columns.begin));
        for (i64 r = rows.begin; r < rows.end; r++) {
          for (i64 t = columns.begin; t < columns.end; t++) {
            const Vec<T> v = load_first(image + ((h + r) * s.W + w + t) * s.C + c, lanes);
            const auto take = (v > best) | ((v != v) & (best == best));  // the first NaN wins and stays
            best = take ? v : best;
            at = take ? splat(T(r * s.S + t)) : at;
          }
        }
        store_first(y + pixel * s.C + c, best, lanes);
        const auto positions = __builtin_convertvector(at, Positions<T>);
        __builtin_memcpy(argmax + pixel * s.C + c, &positions, std::size_t(lanes) * sizeof(std::int32_t));
      });
    });
  });
}

template <class T>
void max_pool2d_backward(T* dx, const T* dy, const std::int32_t* argmax, const Window& s) {
  parallel_for(s.N, [&](i64 n) {
    T* image = dx + n * s.H * s.W * s.C;
    zero(image, s.H * s.W * s.C);
    for_windows(s, n * s.P, (n + 1) * s.P, [&](i64 pixel, i64 h, i64 w, Span rows, Span columns) {
      for_vectors<T>(s.C, [&](i64 c, i64 lanes) {
        const Vec<T> g = load_first(dy + pixel * s.C + c, lanes);
        Positions<T> positions{};
        __builtin_memcpy(&positions, argmax + pixel * s.C + c, std::size_t(lanes) * sizeof(std::int32_t));
        const auto at = __builtin_convertvector(positions, Vec<T>);
        // Every pixel of the window looks for itself in argmax: no scattered stores.
        for (i64 r = rows.begin; r < rows.end; r++) {
          for (i64 t = columns.begin; t < columns.end; t++) {
            T* const to = image + ((h + r) * s.W + w + t) * s.C + c;
            store_first(to, load_first(to, lanes) + (at == splat(T(r * s.S + t)) ? g : Vec<T>{}), lanes);
          }
        }
      });
    });
  });
}

// ---- average ------------------------------------------------------------------------------------------------------

template <class T>
void avg_pool2d_forward(T* y, const T* x, const Window& s) {
  const T area = T(s.R * s.S);
  parallel_ranges(s.N * s.P, items_per_part(s.Q * s.R * s.S * s.C), [&](i64 begin, i64 end) {
    for_windows(s, begin, end, [&](i64 pixel, i64 h, i64 w, Span rows, Span columns) {
      const T* image = x + pixel / (s.P * s.Q) * s.H * s.W * s.C;
      for_vectors<T>(s.C, [&](i64 c, i64 lanes) {
        Vec<T> sum{};
        for (i64 r = rows.begin; r < rows.end; r++)
          for (i64 t = columns.begin; t < columns.end; t++)
            sum += load_first(image + ((h + r) * s.W + w + t) * s.C + c, lanes);
        store_first(y + pixel * s.C + c, sum / area, lanes);
      });
    });
  });
}

template <class T>
void avg_pool2d_backward(T* dx, const T* dy, const Window& s) {
  const T area = T(s.R * s.S);
  parallel_for(s.N, [&](i64 n) {
    T* image = dx + n * s.H * s.W * s.C;
    zero(image, s.H * s.W * s.C);
    for_windows(s, n * s.P, (n + 1) * s.P, [&](i64 pixel, i64 h, i64 w, Span rows, Span columns) {
      for_vectors<T>(s.C, [&](i64 c, i64 lanes) {
        const Vec<T> g = load_first(dy + pixel * s.C + c, lanes) / area;
        for (i64 r = rows.begin; r < rows.end; r++) {
          for (i64 t = columns.begin; t < columns.end; t++) {
            T* to = image + ((h + r) * s.W + w + t) * s.C + c;
            store_first(to, load_first(to, lanes) + g, lanes);
          }
        }
      });
    });
  });
}

// ---- average of the whole image -----------------------------------------------------------------------------------

template <class T>
void global_avg_pool2d_forward(T* y, const T* x, i64 N, i64 HW, i64 C) {
  parallel_ranges(N, items_per_part(HW * C), [&](i64 begin, i64 end) {
    for (i64 n = begin; n < end; n++) {
      const T* image = x + n * HW * C;
      for_vectors<T>(C, [&](i64 c, i64 lanes) {
        Vec<T> sum[4] = {};  // four chains: an addition need not wait for the one before
        i64 i = 0;
        for (; i + 4 <= HW; i += 4)
          for (i64 j = 0; j < 4; j++) sum[j] += load_first(image + (i + j) * C + c, lanes);
        for (; i < HW; i++) sum[0] += load_first(image + i * C + c, lanes);
        store_first(y + n * C + c, ((sum[0] + sum[1]) + (sum[2] + sum[3])) / T(HW), lanes);
      });
    }
  });
}

template <class T>
void global_avg_pool2d_backward(T* dx, const T* dy, i64 N, i64 HW, i64 C) {
  parallel_ranges(N, items_per_part(HW * C), [&](i64 begin, i64 end) {
    for (i64 n = begin; n < end; n++) {
      for_vectors<T>(C, [&](i64 c, i64 lanes) {
        const Vec<T> g = load_first(dy + n * C + c, lanes) / T(HW);
        for (i64 i = 0; i < HW; i++) store_first(dx + (n * HW + i) * C + c, g, lanes);
      });
    }
  });
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

}  // namespace tinyres::TINYRES_TARGET
