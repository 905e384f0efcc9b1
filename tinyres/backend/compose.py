"""Fused kernels in terms of the mandatory ones, for devices that have no kernel of their own.

They state what a fused kernel means, and are what the tests hold it to. `self` is the device's kernel table.
"""

from tinyres import dtypes
from tinyres.backend import norm as norms


def conv2d_backward(self, dy, x, w, stride, padding, total=None):
    dy = self.contiguous(dy)
    dx = self.conv2d_backward_input(dy, w, x.shape, stride, padding, total)
    return dx, self.conv2d_backward_weight(dy, x, w.shape, stride, padding)


def add_relu(self, a, b):
    return self.relu(self.add(a, b))


def conv2d_bias_forward(self, x, w, b, residual, relu, stride, padding):
    y = self.add(self.conv2d_forward(x, w, stride, padding), b)
    if residual is not None:
        y = self.add(y, residual)
    return self.relu(y) if relu else y


def batch_norm_relu_forward(self, x, gamma, beta, running_mean, running_var, momentum, eps):
    z, mean, inv_std = self.batch_norm_forward(x, gamma, beta, running_mean, running_var, momentum, eps)
    return self.relu(z), mean, inv_std


def batch_norm_relu_backward(self, dy, x, gamma, beta, mean, inv_std, overwrite=False):
    z = self.add(self.mul(self.mul(gamma, self.sub(x, mean)), inv_std), beta)
    return self.batch_norm_backward(self.relu_backward(dy, z), x, gamma, mean, inv_std)


def batch_norm_relu_inference(self, x, gamma, beta, mean, var, eps):
    return self.relu(self.batch_norm_inference(x, gamma, beta, mean, var, eps))


def batch_norm_add_relu_forward(self, x, residual, gamma, beta, running_mean, running_var, momentum, eps):
    z, mean, inv_std = self.batch_norm_forward(x, gamma, beta, running_mean, running_var, momentum, eps)
    return self.add_relu(z, residual), mean, inv_std


def batch_norm_add_relu_backward(self, dy, x, y, gamma, mean, inv_std, overwrite=False):
    dresidual = self.relu_backward(dy, y)
    dx, dgamma, dbeta = self.batch_norm_backward(dresidual, x, gamma, mean, inv_std)
    return dx, dresidual, dgamma, dbeta


def batch_norm_add_relu_inference(self, x, residual, gamma, beta, mean, var, eps):
    return self.add_relu(self.batch_norm_inference(x, gamma, beta, mean, var, eps), residual)


def normed_conv2d_forward(self, x, w, stride, padding):
    return self.conv2d_forward(norms.activation(self, x), w, stride, padding), None


def normed_conv2d_backward_input(self, gradient, w, x, stride, padding, around=None):
    shape = norms.raw(x).shape
    total = norms.shortcut_backward(self, *around, shape) if around else None
    dx = self.conv2d_backward_input(norms.by_output(self, gradient), w, shape, stride, padding, total)
    return self.block_output_backward(dx, x, overwrite=True) if isinstance(x, norms.Norm) else dx


def normed_conv2d_backward_weight(self, gradient, x, w_shape, stride, padding, parts=False):
    dw = self.conv2d_backward_weight(
        norms.by_output(self, gradient), norms.activation(self, x), w_shape, stride, padding
    )
    return dw[None] if parts else dw


def block_output(self, norm, shortcut=None, stride=1, before=0):
    norm.joined = shortcut is not None
    if isinstance(shortcut, norms.Norm):
        shortcut = shortcut.normalise(self)
    elif shortcut is not None:
        shortcut = norms.shortcut(self, shortcut, stride, before, norm.x.shape[3])
    if norm.joined:
        result = self.batch_norm_add_relu_forward(norm.x, shortcut, *norm.parameters())
    else:
        result = self.batch_norm_relu_forward(norm.x, *norm.parameters())
    norm.activation, norm.mean, norm.inv_std = result
    return norm.activation


def block_output_backward(self, dy, norm, overwrite=False):
    x, gamma, statistics = norm.x, norm.gamma, (norm.mean, norm.inv_std)
    if norm.joined:
        kernel = self.batch_norm_add_relu_backward
        dx, dz, *parameters = kernel(dy, x, norm.activation, gamma, *statistics, overwrite=overwrite)
    else:
        dz = None
        dx, *parameters = self.batch_norm_relu_backward(dy, x, gamma, norm.beta, *statistics, overwrite=overwrite)
    return norms.Gradient(norm, dz, None, dx, *parameters)


def classifier(self, x, w, b, labels, smoothing, metrics=None, parts=False):
    to = dtypes.wide(x.dtype)
    features, w = self.global_avg_pool2d_forward(self.cast(x, to)), self.cast(w, to)
    logits = self.add(self.matmul(features, w), self.cast(b, to))
    loss, dlogits = self.cross_entropy(logits, labels, smoothing)
    if metrics is not None:
        metrics += [loss * len(labels), (logits.argmax(1) != labels).sum(), len(labels), 0]
    dx = self.global_avg_pool2d_backward(self.matmul(dlogits, w, transpose_b=True), x.shape)
    dw, db = self.matmul(features, dlogits, transpose_a=True), self.sum(dlogits, (0,), False)
    return loss, self.cast(dx, x.dtype), dw[None] if parts else dw, db[None] if parts else db


def classifier_inference(self, x, w, b, labels, smoothing, metrics=None):
    return self.classifier(x, w, b, labels, smoothing, metrics)[0]
