// The convolution kernels, one thread an output and tiled.
#include "conv2d_testing.h"
#include "cuda/conv2d.cu"
#include "cuda/conv2d_mma.cu"

using namespace tinyres;

namespace {

void test_algorithm_for() {
  for (const auto asked : {ConvAlgorithm::naive, ConvAlgorithm::tiled, ConvAlgorithm::mma}) {
    CHECK(algorithm_for<float>(asked) == asked);
    CHECK(algorithm_for<bf16>(asked) == asked);
    CHECK(algorithm_for<double>(asked) == (asked == ConvAlgorithm::mma ? ConvAlgorithm::tiled : asked));
  }
  CHECK(algorithm_for<float>(ConvAlgorithm::automatic) == ConvAlgorithm::tiled);
  CHECK(algorithm_for<double>(ConvAlgorithm::automatic) == ConvAlgorithm::tiled);
  CHECK(algorithm_for<bf16>(ConvAlgorithm::automatic) == ConvAlgorithm::mma);
}

}  // namespace

int main() {
  test_algorithm_for();
  const Algorithms algorithms = {ConvAlgorithm::naive, ConvAlgorithm::tiled};
  test_all<float>(algorithms);
  test_all<double>(algorithms);
  test_all<bf16>(algorithms);
  CHECK(scratch_blocks == 0);
  return report();
}
