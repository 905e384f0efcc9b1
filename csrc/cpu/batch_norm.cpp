// Batch normalisation over the rows of x (M, C) and its fusions with a residual sum and ReLU. Two passes over memory
// each way: one for two sums a channel, one that writes the result.
//
// Rows are cut into parts by M and C alone. A part sums in registers; parts are merged in their order, in double.
#include <math.h>

#include "vec.h"

namespace tinyres::TINYRES_TARGET {
namespace {

// ---- channels in registers ----------------------------------------------------------------------------------------

// A block of channels, `first` and on: VECS whole vectors, or (WHOLE false) one vector of `count` lanes, of a row that
// is shorter than that. Such a row is read and written as a whole vector all the same, up to the last row of a part:
// the lanes that stand out mean nothing, and are written anew with the next row.
template <class T, int V, bool WHOLE>
struct Channels {
  static constexpr int VECS = V;
  i64 first, count, end;  // end: of the part, in elements

  // Of the row that begins at element `at`.
  Vec<T> load(const T* x, i64 at, int v) const {
    const T* p = x + at + first + v * LANES<T>;
    return load_first(p, WHOLE || at + LANES<T> <= end ? i64(LANES<T>) : count);
  }
  void store(T* y, i64 at, int v, Vec<T> value) const {
    T* p = y + at + first + v * LANES<T>;
    store_first(p, value, WHOLE || at + LANES<T> <= end ? i64(LANES<T>) : count);
  }
  // Of an array with one row.
  Vec<T> load(const T* x, int v) const { return load_first(x + first + v * LANES<T>, WHOLE ? i64(LANES<T>) : count); }
};

// Wide blocks first: a row is then read in long runs. A rest is taken as the last whole vector of the row, and
// the channels that it shares with the block before are computed again. `end` is the end of the part, in elements.
// `body` should hold its variables by value: one that it reaches through a reference is read anew after every store.
template <class T, class F>
inline void for_channels(i64 C, i64 end, const F& body) {
  constexpr i64 L = LANES<T>;
  i64 c = 0;
  for (; c + 4 * L <= C; c += 4 * L) body(Channels<T, 4, true>{c, 4 * L, end});
  for (; c + 2 * L <= C; c += 2 * L) body(Channels<T, 2, true>{c, 2 * L, end});
  for (; c + L <= C; c += L) body(Channels<T, 1, true>{c, L, end});
  if (c < C && C > L) body(Channels<T, 1, true>{C - L, L, end});
  if (C < L) body(Channels<T, 1, false>{0, C, end});
}

// ---- passes over the rows -----------------------------------------------------------------------------------------

// A part leaves two sums a channel behind: at least 64 rows, so that these stay small beside the rows themselves.
inline i64 part_rows(i64 C) {
  const i64 rows = items_per_part(C);
  return rows > 64 ? rows : 64;
}

inline i64 part_count(i64 M, i64 C) { return (M + part_rows(C) - 1) / part_rows(C); }

// Two sums over the rows of every part, sums (parts, 2, C): term(channels, begin, row, v, first, second) adds the
// contribution of vector v of a row, in a part that starts at row `begin`.
template <class T, class F>
void sum_parts(double* sums, i64 M, i64 C, const F& term) {
  parallel_ranges(M, part_rows(C), [&](i64 begin, i64 end) {
    double* part = sums + begin / part_rows(C) * 2 * C;
    for_channels<T>(C, end * C, [=](auto channels) {
      // Several rows at once where a block has few vectors: an addition takes four cycles, two can start in each.
      constexpr int VECS = decltype(channels)::VECS, ROWS = 4 / VECS;
      Vec<T> first[ROWS][VECS] = {}, second[ROWS][VECS] = {};
      i64 row = begin;
      for (; row + ROWS <= end; row += ROWS)
        for (int r = 0; r < ROWS; r++)
          for (int v = 0; v < VECS; v++) term(channels, begin, row + r, v, first[r][v], second[r][v]);
      for (; row < end; row++)
        for (int v = 0; v < VECS; v++) term(channels, begin, row, v, first[0][v], second[0][v]);
      for (int r = 1; r < ROWS; r++) {
        for (int v = 0; v < VECS; v++) {
          first[0][v] += first[r][v];
          second[0][v] += second[r][v];
        }
      }
      for (i64 c = 0; c < channels.count; c++) {
        part[channels.first + c] = double(first[0][c / LANES<T>][c % LANES<T>]);
        part[C + channels.first + c] = double(second[0][c / LANES<T>][c % LANES<T>]);
      }
    });
  });
}

// y = (x - mean) * scale + offset, plus residual if given, through ReLU if asked. Subtracting first loses nothing
// where the mean is large beside the deviation; x * scale + (offset - mean * scale) would.
template <class T>
void normalise(T* y, const T* x, const T* mean, const T* scale, const T* offset, const T* residual, bool relu, i64 M,
               i64 C) {
  parallel_ranges(M, part_rows(C), [&](i64 begin, i64 end) {
    for_channels<T>(C, end * C, [=](auto channels) {
      constexpr int VECS = decltype(channels)::VECS;
      Vec<T> m[VECS], k[VECS], o[VECS];
      for (int v = 0; v < VECS; v++) {
        m[v] = channels.load(mean, v);
        k[v] = channels.load(scale, v);
        o[v] = channels.load(offset, v);
      }
      for (i64 row = begin; row < end; row++) {
        for (int v = 0; v < VECS; v++) {
          Vec<T> value = (channels.load(x, row * C, v) - m[v]) * k[v] + o[v];
          if (residual) value += channels.load(residual, row * C, v);
          if (relu) value = larger<T>(Vec<T>{}, value);
          channels.store(y, row * C, v, value);
        }
      }
    });
  });
}

// scale = gamma / sqrt(var + eps)
template <class T>
void inference_scale(T* scale, const T* gamma, const T* var, double eps, i64 C) {
  for (i64 c = 0; c < C; c++) scale[c] = T(double(gamma[c]) / ::sqrt(double(var[c]) + eps));
}

// ---- training -----------------------------------------------------------------------------------------------------

// Mean and M2 (the sum of squared deviations from it) of each channel. A part sums x - shift and its square, the
// shift being the part's first row: x itself may have a mean so large that its squares swallow the variance. Parts
// are merged as in Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm ..." (1979).
template <class T>
void moments(double* mean, double* m2, const T* x, i64 M, i64 C) {
  const i64 parts = part_count(M, C), rows = part_rows(C);
  Scratch<double> sums(parts * 2 * C);
  sum_parts<T>(sums.get(), M, C, [=](auto channels, i64 begin, i64 row, int v, Vec<T>& sum, Vec<T>& squares) {
    const Vec<T> d = channels.load(x, row * C, v) - channels.load(x, begin * C, v);
    sum += d;
    squares += d * d;
  });
  for (i64 c = 0; c < C; c++) mean[c] = m2[c] = 0;
  for (i64 part = 0; part < parts; part++) {
    const i64 begin = part * rows, count = begin + rows < M ? rows : M - begin;
    const double *sum = sums.get() + part * 2 * C, *squares = sum + C;
    const double share = double(count) / double(begin + count);
    for (i64 c = 0; c < C; c++) {
      const double of_part = sum[c] / double(count);
      const double apart = double(x[begin * C + c]) + of_part - mean[c];
      mean[c] += apart * share;
      m2[c] += squares[c] - sum[c] * of_part + apart * apart * double(begin) * share;
    }
  }
}

template <class T>
void batch_norm_forward(T* y, T* mean, T* inv_std, T* running_mean, T* running_var, const T* x, const T* gamma,
                        const T* beta, const T* residual, bool relu, double momentum, double eps, i64 M, i64 C) {
  Scratch<double> mean64(C), m2(C);
  Scratch<T> scale(C);
  moments(mean64.get(), m2.get(), x, M, C);
  for (i64 c = 0; c < C; c++) {
    const double var = (m2[c] > 0 || m2[c] != m2[c] ? m2[c] : 0) / double(M);  // rounding may leave a little under 0
    const double inverse = 1 / ::sqrt(var + eps);
    mean[c] = T(mean64[c]);
    inv_std[c] = T(inverse);
    scale[c] = T(double(gamma[c]) * double(inv_std[c]));  // as in the backward pass, which repeats y from x
    const double unbiased = M > 1 ? var * (double(M) / double(M - 1)) : var;
    if (running_mean) running_mean[c] = T((1 - momentum) * double(running_mean[c]) + momentum * mean64[c]);
    if (running_var) running_var[c] = T((1 - momentum) * double(running_var[c]) + momentum * unbiased);
  }
  normalise(y, x, mean, scale.get(), beta, residual, relu, M, C);
}

// Where a gradient passes the ReLU: (channels, at, v, x - mean) -> a value that is positive there.
template <class T>
struct Everywhere {  // no ReLU
  static constexpr bool MASKS = false;
};
template <class T>
struct WhereY {
  static constexpr bool MASKS = true;
  const T* y;
  template <class Block>
  Vec<T> operator()(const Block& channels, i64 at, int v, Vec<T>) const {
    return channels.load(y, at, v);
  }
};
// Without a residual, y follows from x, which is read anyway: the same operations as in `normalise`, the same bits.
template <class T>
struct WhereNormalised {
  static constexpr bool MASKS = true;
  const T *scale, *offset;
  template <class Block>
  Vec<T> operator()(const Block& channels, i64, int v, Vec<T> deviation) const {
    return deviation * channels.load(scale, v) + channels.load(offset, v);
  }
};

// The gradient that arrives in front of the ReLU.
template <class T, class Block, class Mask>
inline Vec<T> masked(const Block& channels, const T* dy, i64 at, int v, Vec<T> deviation, const Mask& mask) {
  const Vec<T> g = channels.load(dy, at, v);
  if constexpr (Mask::MASKS)
    return mask(channels, at, v, deviation) > T(0) ? g : Vec<T>{};
  else
    return g;
}

// sum_g = sum of g and sum_gx = sum of g * (x - mean) over the rows, g the masked dy, which dresidual receives.
template <class T, class Mask>
void gradient_sums(double* sum_g, double* sum_gx, T* dresidual, const T* dy, const T* x, const Mask& mask,
                   const T* mean, i64 M, i64 C) {
  const i64 parts = part_count(M, C);
  Scratch<double> sums(parts * 2 * C);
  sum_parts<T>(sums.get(), M, C, [=](auto channels, i64, i64 row, int v, Vec<T>& first, Vec<T>& second) {
    const Vec<T> deviation = channels.load(x, row * C, v) - channels.load(mean, v);
    const Vec<T> g = masked(channels, dy, row * C, v, deviation, mask);
    if (dresidual) channels.store(dresidual, row * C, v, g);
    first += g;
    second += g * deviation;
  });
  for (i64 c = 0; c < C; c++) sum_g[c] = sum_gx[c] = 0;
  for (i64 part = 0; part < parts; part++) {
    for (i64 c = 0; c < C; c++) {
      sum_g[c] += sums[part * 2 * C + c];
      sum_gx[c] += sums[part * 2 * C + C + c];
    }
  }
}

// The gradient, for one channel (Ioffe and Szegedy 2015, section 3, in closed form). With i over the M rows,
//     mu = sum x_i / M,  var = sum (x_i - mu)^2 / M,  s = 1 / sqrt(var + eps),  n_i = (x_i - mu) s,
//     y_i = gamma n_i + beta,
// and g_i the gradient at y_i:
//     dbeta = sum g_i,  dgamma = sum g_i n_i = s sum g_i (x_i - mu).
// x_j reaches y_i in three ways: directly, by mu, and by s. As dmu/dx_j = 1/M and ds/dx_j = -s^3 (x_j - mu) / M
// (mu's own share in var vanishes, because sum (x_i - mu) = 0),
//     dn_i/dx_j = s [i = j] - s / M + (x_i - mu) ds/dx_j = s ([i = j] - 1/M - n_i n_j / M),
//     dx_j = gamma sum_i g_i dn_i/dx_j = gamma s (g_j - dbeta / M - n_j dgamma / M).
// The second pass writes this as dx = k0 ((g - mean_g) - (x - mu) k1), with k0 = gamma s, mean_g = dbeta / M and
// k1 = s dgamma / M: both brackets are differences of numbers of one size, which keeps float32 accurate.
template <class T, class Mask>
void input_gradient(T* dx, const T* dy, const T* x, const Mask& mask, const T* mean, const T* k0, const T* k1,
                    const T* mean_g, i64 M, i64 C) {
  parallel_ranges(M, part_rows(C), [&](i64 begin, i64 end) {
    for_channels<T>(C, end * C, [=](auto channels) {
      constexpr int VECS = decltype(channels)::VECS;
      Vec<T> k[VECS], n[VECS], m[VECS], mg[VECS];
      for (int v = 0; v < VECS; v++) {
        k[v] = channels.load(k0, v);
        n[v] = channels.load(k1, v);
        m[v] = channels.load(mean, v);
        mg[v] = channels.load(mean_g, v);
      }
      for (i64 row = begin; row < end; row++) {
        for (int v = 0; v < VECS; v++) {
          const Vec<T> deviation = channels.load(x, row * C, v) - m[v];
          const Vec<T> g = masked(channels, dy, row * C, v, deviation, mask);
          channels.store(dx, row * C, v, k[v] * ((g - mg[v]) - deviation * n[v]));
        }
      }
    });
  });
}

template <class T>
void batch_norm_backward(T* dx, T* dresidual, T* dgamma, T* dbeta, const T* dy, const T* x, const T* y, const T* gamma,
                         const T* beta, const T* mean, const T* inv_std, i64 M, i64 C) {
  Scratch<double> sum_g(C), sum_gx(C);
  Scratch<T> k0(C), k1(C), mean_g(C);
  for (i64 c = 0; c < C; c++) k0[c] = T(double(gamma[c]) * double(inv_std[c]));
  const auto with_mask = [&](const auto& mask) {
    gradient_sums(sum_g.get(), sum_gx.get(), dresidual, dy, x, mask, mean, M, C);
    for (i64 c = 0; c < C; c++) {
      const double s = double(inv_std[c]);
      dbeta[c] = T(sum_g[c]);
      dgamma[c] = T(s * sum_gx[c]);
      k1[c] = T(s * s * sum_gx[c] / double(M));
      mean_g[c] = T(sum_g[c] / double(M));
    }
    // dresidual holds g already: one array to read where there would be two.
    if (dresidual)
      input_gradient(dx, dresidual, x, Everywhere<T>{}, mean, k0.get(), k1.get(), mean_g.get(), M, C);
    else
      input_gradient(dx, dy, x, mask, mean, k0.get(), k1.get(), mean_g.get(), M, C);
  };
  if (y)
    with_mask(WhereY<T>{y});
  else if (beta)
    with_mask(WhereNormalised<T>{k0.get(), beta});
  else
    with_mask(Everywhere<T>{});
}

// ---- inference: mean and var are constants ------------------------------------------------------------------------

template <class T>
void batch_norm_inference(T* y, const T* x, const T* gamma, const T* beta, const T* mean, const T* var,
                          const T* residual, bool relu, double eps, i64 M, i64 C) {
  Scratch<T> scale(C);
  inference_scale(scale.get(), gamma, var, eps, C);
  normalise(y, x, mean, scale.get(), beta, residual, relu, M, C);
}

template <class T>
void batch_norm_inference_backward(T* dx, T* dgamma, T* dbeta, const T* dy, const T* x, const T* gamma, const T* mean,
                                   const T* var, double eps, i64 M, i64 C) {
  Scratch<double> sum_g(C), sum_gx(C);
  Scratch<T> scale(C), zero(C);
  gradient_sums<T>(sum_g.get(), sum_gx.get(), nullptr, dy, x, Everywhere<T>{}, mean, M, C);
  inference_scale(scale.get(), gamma, var, eps, C);
  for (i64 c = 0; c < C; c++) {
    dbeta[c] = T(sum_g[c]);
    dgamma[c] = T(sum_gx[c] / ::sqrt(double(var[c]) + eps));
    zero[c] = 0;
  }
  normalise<T>(dx, dy, zero.get(), scale.get(), zero.get(), nullptr, false, M, C);
}

}  // namespace

template <class T>
void batch_norm_kernels(Kernels<T>& table) {
  table.batch_norm_forward = batch_norm_forward<T>;
  table.batch_norm_backward = batch_norm_backward<T>;
  table.batch_norm_inference = batch_norm_inference<T>;
  table.batch_norm_inference_backward = batch_norm_inference_backward<T>;
}

template void batch_norm_kernels<float>(Kernels<float>&);
template void batch_norm_kernels<double>(Kernels<double>&);

}  // namespace tinyres::TINYRES_TARGET
