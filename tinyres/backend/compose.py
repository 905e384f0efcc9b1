"""Fused kernels in terms of the mandatory ones, for devices that have no kernel of their own.

They state what a fused kernel means, and are what the tests hold it to. `self` is the device's kernel table.
"""


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
