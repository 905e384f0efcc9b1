// Statistics of V channels, and how those of two sets of rows become those of both.
#pragma once

#include "common.h"

namespace tinyres {

// Of n numbers: their mean and M2, the sum of squared deviations from it.
template <class W, int V>
struct Moments {
  W n, mean[V], m2[V];

  // Welford, "Note on a method for calculating corrected sums of squares and products" (1962).
  template <class P>
  __device__ void add(const P& x) {
    n += 1;
    const W weight = 1 / n;
    for (int v = 0; v < V; v++) {
      const W value = wide(x.at[v]), apart = value - mean[v];
      mean[v] += apart * weight;
      m2[v] += apart * (value - mean[v]);
    }
  }
  // Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
  __device__ void merge(const Moments& b) {
    const W both = n + b.n, weight = both > 0 ? b.n / both : W(0);
    for (int v = 0; v < V; v++) {
      const W apart = b.mean[v] - mean[v];
      mean[v] += apart * weight;
      m2[v] += b.m2[v] + apart * apart * n * weight;
    }
    n = both;
  }
  __device__ Moments<W, 1> channel(int v) const { return {n, {mean[v]}, {m2[v]}}; }
};

// Sums of g, the gradient before the ReLU, and of g * (x - mean).
template <class W, int V>
struct Sums {
  W g[V], gx[V];

  __device__ void merge(const Sums& b) {
    for (int v = 0; v < V; v++) {
      g[v] += b.g[v];
      gx[v] += b.gx[v];
    }
  }
  __device__ Sums<W, 1> channel(int v) const { return {{g[v]}, {gx[v]}}; }
};

}  // namespace tinyres
