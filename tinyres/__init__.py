"""tinyres: a small deep-learning engine with hand-written kernels, made to be read.

import tinyres
from tinyres import nn

model = tinyres.models.cifar_resnet(20)
loss = tinyres.ops.cross_entropy(model(tinyres.tensor(images)), labels)
loss.backward()
"""

from tinyres import backend, models, nn, ops, optim
from tinyres.anomaly import detect_anomaly
from tinyres.autograd import Function, Tensor, grad, no_grad, tensor
from tinyres.backend.random import manual_seed
from tinyres.checkpoint import load, save
from tinyres.gradcheck import gradcheck
from tinyres.nn.fuse import fold_batch_norm, fuse
from tinyres.options import options
from tinyres.summary import summary
from tinyres.version import __version__

__all__ = [
    "Function", "Tensor", "backend", "detect_anomaly", "fold_batch_norm", "fuse", "grad", "gradcheck", "load",
    "manual_seed", "models", "nn", "no_grad", "ops", "optim", "options", "save", "summary", "tensor", "__version__",
]  # fmt: skip
