"""Write an op, check its gradient, train with it: a tour of the engine in one page.

python examples/first_op.py
"""

import numpy as np

import tinyres
from tinyres import nn, ops
from tinyres.errors import GradcheckError


# An op is a Function: forward, and directly below it backward, both on raw arrays. This one is SiLU,
# y = x s(x) with s the sigmoid, so dy/dx = s + x s (1 - s) = s (1 + x - y).
class SiLU(tinyres.Function):
    def forward(self, x):
        s = self.kernels.sigmoid(x)  # the kernel table of x's device
        y = self.kernels.mul(x, s)
        self.saved = x, s, y  # kept until the backward sweep has passed
        return y

    def backward(self, dy):
        x, s, y = self.saved
        return dy * s * (1 + x - y)


# Is the gradient right? Compare it with finite differences, in float64, on every element.
x = tinyres.tensor(np.random.default_rng(0).standard_normal((3, 4)), requires_grad=True)
report = tinyres.gradcheck(SiLU.apply, x)
print(f"{report.checked} derivatives agree with finite differences, to {report.largest_error:.0e}")


# And would the check notice a mistake? Forget a term, and see.
class WrongSiLU(SiLU):
    def backward(self, dy):
        _, s, _ = self.saved
        return dy * s


try:
    tinyres.gradcheck(WrongSiLU.apply, x)
except GradcheckError as error:
    print(f"a forgotten term is caught: {error}")
else:
    raise SystemExit("the wrong gradient passed")


# A layer calls the op; a network trains through it.
class SiLULayer(nn.Module):
    def forward(self, x):
        return SiLU.apply(x)


tinyres.manual_seed(0)
rng = np.random.default_rng(0)
points = rng.standard_normal((200, 2)).astype(np.float32)
labels = (np.linalg.norm(points, axis=1) > 1.1).astype(np.int64)  # inside or outside of a circle
model = nn.Sequential(nn.Linear(2, 16), SiLULayer(), nn.Linear(16, 2))
optimizer = tinyres.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
for step in range(201):
    logits = model(tinyres.tensor(points))
    loss = ops.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        error = 100 * np.mean(logits.numpy().argmax(1) != labels)
        print(f"step {step:3}: loss {loss.item():.3f}, error {error:.1f} %")
