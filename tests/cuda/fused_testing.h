// For the tests of the kernels into which batch norm was folded: what batch norm means, in double.
#pragma once

#include "cuda/fused.h"
#include "kernel_testing.h"

namespace tinyres {

constexpr double EPS = 1e-5, MOMENTUM = 0.1;

template <class T>
Doubles doubles(Array<T>& a) {
  Doubles y(std::size_t(a.size()));
  for (int i = 0; i < a.size(); i++) y[std::size_t(i)] = value(a[i]);
  return y;
}

// relu(gamma * (x - mean) * inv_std + beta)
template <class W>
Doubles activation(const Doubles& x, Array<W>& gamma, Array<W>& beta, Array<W>& mean, Array<W>& inv_std) {
  Doubles u(x.size());
  for (std::size_t i = 0; i < x.size(); i++) {
    const int c = int(i % std::size_t(gamma.size()));
    u[i] = std::fmax(0, double(gamma[c]) * (x[i] - double(mean[c])) * double(inv_std[c]) + double(beta[c]));
  }
  return u;
}

// Parameters of a batch norm: exact ones, powers of two and integers, or fractions.
template <class W>
struct Parameters {
  Array<W> gamma, beta, mean, inv_std;

  Parameters(int C, bool exact) : gamma(C), beta(C), mean(C), inv_std(C) {
    for (int c = 0; c < C; c++) {
      gamma[c] = exact ? W(c % 3 == 0 ? -2 : 2) : W(0.8 + 0.05 * (c % 7));
      beta[c] = exact ? W(c % 4 - 1) : W(0.1 * (c % 5) - 0.2);
      mean[c] = exact ? W(c % 2) : W(0.03 * (c % 9) - 0.1);
      inv_std[c] = exact ? W(0.5) : W(1.7 - 0.1 * (c % 6));
    }
  }
  template <class T>
  BatchNorm<T> known() {
    return {gamma.data(), beta.data(), nullptr, 0, mean.data(), inv_std.data(), nullptr, nullptr, MOMENTUM, EPS};
  }
};

template <class T>
void fill_inputs(Array<T>& a, unsigned seed, bool exact) {
  exact ? fill_integers(a, seed) : fill_uniform(a, seed);
}

}  // namespace tinyres
