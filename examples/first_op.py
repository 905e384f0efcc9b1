"""Write an op from Python down to the CUDA thread, check its gradient, train with it. Needs a C++ compiler, and on a
GPU nvcc: python examples/first_op.py"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import tinyres
from tinyres import nn, ops
from tinyres.errors import DeviceError

# y = x s(x) with s the sigmoid (SiLU), and dy/dx = s + x s (1 - s) = s (1 + x (1 - s)); one thread an element
SOURCE = """\
#include "cuda/compat/cuda.h"
using namespace tinyres; using T = TYPE;

__global__ void forward(T* y, const T* x, long n) {
  const long i = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] / (1 + exp(-x[i]));
}
extern "C" void silu_forward(T* y, const T* x, long n, cudaStream_t stream) {
  launch("silu_forward", forward, dim3((n + 255) / 256), dim3(256), 0, stream, y, x, n);
}

__global__ void backward(T* dx, const T* dy, const T* x, long n) {
  const long i = long(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const T s = 1 / (1 + exp(-x[i]));
  dx[i] = dy[i] * s * (1 + x[i] * (1 - s));
}
extern "C" void silu_backward(T* dx, const T* dy, const T* x, long n, cudaStream_t stream) {
  launch("silu_backward", backward, dim3((n + 255) / 256), dim3(256), 0, stream, dx, dy, x, n);
}
"""

try:
    device, compiler = tinyres.backend.get("cuda"), ["nvcc", "-Xcompiler", "-fPIC", "-arch=native"]
except DeviceError:  # the same source for the CPU: slow, exact, and open to a debugger
    device, compiler = tinyres.backend.get("emulated"), ["c++", "-fPIC", "-x", "c++", "-Wno-unknown-pragmas"]
tinyres.backend.use(device)


def build(ctype):
    include = Path(__file__).resolve().parent.parent / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder, "silu.cu")).write_text(SOURCE)
        options = ["-shared", "-O2", "-std=c++17", f"-I{include}", f"-DTYPE={ctype}", "-o", f"{folder}/silu.so"]
        subprocess.run([*compiler, *options, source], check=True)
        return ctypes.CDLL(f"{folder}/silu.so")


LIBRARIES = {np.dtype(np.float32): build("float"), np.dtype(np.float64): build("double")}


def run(name, *arrays):
    """The launcher `name`: addresses, number of elements, stream."""
    host = isinstance(arrays[0], np.ndarray)
    addresses = [ctypes.c_void_p(a.ctypes.data if host else a.data.ptr) for a in arrays]
    stream = ctypes.c_void_p(None if host else device.xp.cuda.get_current_stream().ptr)
    getattr(LIBRARIES[arrays[0].dtype], name)(*addresses, ctypes.c_long(arrays[0].size), stream)


# The op is a Function: forward, and directly below it backward, both on raw arrays.
class SiLU(tinyres.Function):
    def forward(self, x):
        self.saved = self.kernels.contiguous(x)  # kept until the backward sweep has passed
        y = self.kernels.empty(x.shape, x.dtype)
        run("silu_forward", y, self.saved)
        return y

    def backward(self, dy):
        dx = self.kernels.empty(dy.shape, dy.dtype)
        run("silu_backward", dx, self.kernels.contiguous(dy), self.saved)
        return dx


# Is the gradient right? Compare it with finite differences, in float64, on every element.
rng = np.random.default_rng(0)
report = tinyres.gradcheck(SiLU.apply, tinyres.tensor(rng.standard_normal((3, 4)), requires_grad=True))
print(f"{report.checked} derivatives on {device} agree with finite differences, to {report.largest_error:.0e}")


# A network trains through it: which points lie inside of a circle?
tinyres.manual_seed(0)
points = rng.standard_normal((200, 2)).astype(np.float32)
labels = (np.linalg.norm(points, axis=1) > 1.1).astype(np.int64)
layers = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 2))
optimizer = tinyres.optim.SGD(layers.parameters(), lr=0.3, momentum=0.9)
for _ in range(200):
    logits = layers[1](SiLU.apply(layers[0](tinyres.tensor(points))))
    loss = ops.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
error = 100 * np.mean(logits.numpy().argmax(1) != labels)
print(f"a network with it, after 200 steps: loss {loss.item():.3f}, error {error:.1f} %")
