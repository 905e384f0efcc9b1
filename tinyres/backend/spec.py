"""The kernel table: the one list of what a device must be able to do.

A device is a namespace of functions with these names. They take and return raw arrays of the device (never
Tensors), check nothing (the op has), never write to an input unless the contract says "in place", and return
fresh dense arrays. Inputs may be views with any strides; the device's adapter makes them dense where its kernels
need it. Letters: N batch, H W input size, C channels, K filters, R S window, P Q output size; activations are
NHWC, convolution weights RSCK, linear weights (in, out). Pairs such as `stride` are (height, width).

Kernels take bfloat16 arrays too: they compute in float32 or better and round each result once. What a contract calls
gamma, beta, mean, var, running_mean and running_var is float32 then, and so are the results named in `WIDE`.

`MANDATORY` is what every device exports; a device may leave out anything in `FUSED`, and then the composition of
the same name in `compose.py` takes its place.
"""

MANDATORY = {
    # elementwise, with NumPy's broadcasting; an operand may be a NumPy scalar array () on every device
    "add": "(a, b) -> a + b",
    "sub": "(a, b) -> a - b",
    "mul": "(a, b) -> a * b",
    "div": "(a, b) -> a / b",
    "pow": "(a, b) -> a ** b",
    "maximum": "(a, b) -> the larger; NaN where either is NaN",
    "pow_backward": "(dy, a, b, y) -> da, db, in dy's shape; a, b, y broadcast to it. db is 0 where a is 0",
    "maximum_backward": "(dy, a, b) -> da, db, in dy's shape; a tie gives each half, NaN neither",
    "accumulate": "(total, x) -> total, with x, which may broadcast to it, added to it in place",
    "neg": "(x) -> -x",
    "exp": "(x) -> e ** x",
    "log": "(x) -> natural logarithm",
    "sqrt": "(x) -> square root",
    "sigmoid": "(x) -> 1 / (1 + e ** -x), without overflow",
    "tanh": "(x) -> hyperbolic tangent",
    "relu": "(x) -> max(x, 0); NaN stays NaN",
    "sqrt_backward": "(dy, y) -> dy / (2 y)",
    "sigmoid_backward": "(dy, y) -> dy y (1 - y)",
    "tanh_backward": "(dy, y) -> dy (1 - y y)",
    "relu_backward": "(dy, y) -> dy where y > 0, else 0",
    "dropout": "(x, p, key) -> x / (1 - p) where kept, else 0; the same call on dy is its backward. "
    "key is (stream key, draw number) of backend/random.py: element i is kept where uniform i of that draw is >= p",
    "cast": "(x, dtype) -> x rounded to dtype, of float32 and bfloat16; x itself where it has it",
    # shape
    "contiguous": "(x) -> x, or a dense copy of it if it is a strided view",
    "broadcast_to": "(x, shape) -> dense array of that shape; x may be a NumPy scalar",
    "sum_to": "(x, shape) -> x summed over the axes along which `shape` was broadcast to x.shape",
    "pad": "(x, widths, value) -> x within a border; widths ((before, after), ...) per axis",
    "concatenate": "(arrays, axis) -> joined",
    "scatter": "(dy, shape, index) -> zeros of `shape` with dy at [index] (basic slicing): getitem's backward",
    # reductions; axes is a sorted tuple of non-negative ints. Sums run in float64
    "sum": "(x, axes, keepdims) -> sum",
    "max": "(x, axes, keepdims) -> maximum",
    "max_backward": "(dy, x, y, axes) -> dx; dy and y with kept axes; ties share equally",
    # linear algebra
    "matmul": "(a, b, transpose_a=False, transpose_b=False) -> a @ b of (..., M, K) and (..., K, N), leading axes "
    "broadcast; the flags swap the last two axes first",
    # convolution: x (N, H, W, C), w (R, S, C, K), y (N, P, Q, K)
    "conv2d_forward": "(x, w, stride, padding) -> y",
    "conv2d_backward_input": "(dy, w, x_shape, stride, padding, total=None) -> dx, or total with dx added to it",
    "conv2d_backward_weight": "(dy, x, w_shape, stride, padding) -> dw",
    # batch norm over the last axis; gamma, beta, mean, var (C,)
    "batch_norm_forward": "(x, gamma, beta, running_mean, running_var, momentum, eps) -> y, mean, inv_std; "
    "running statistics (None or (C,)) are updated in place: mean, and the unbiased variance, with share momentum",
    "batch_norm_backward": "(dy, x, gamma, mean, inv_std, overwrite=False) -> dx, dgamma, dbeta; dx may lie over dy "
    "if overwrite",
    "batch_norm_inference": "(x, gamma, beta, mean, var, eps) -> y",
    "batch_norm_inference_backward": "(dy, x, gamma, mean, var, eps) -> dx, dgamma, dbeta",
    # pooling: window, stride, padding pairs; x (N, H, W, C), y (N, P, Q, C)
    "max_pool2d_forward": "(x, window, stride, padding) -> y, argmax (int32: r * S + s of the first largest)",
    "max_pool2d_backward": "(dy, argmax, x_shape, window, stride, padding) -> dx",
    "avg_pool2d_forward": "(x, window, stride, padding) -> y; padding counts as zeros, the divisor is R * S",
    "avg_pool2d_backward": "(dy, x_shape, window, stride, padding) -> dx",
    "global_avg_pool2d_forward": "(x) -> y (N, C)",
    "global_avg_pool2d_backward": "(dy, x_shape) -> dx",
    # loss
    "cross_entropy": "(logits (N, K), labels (N,) int64, smoothing) -> mean loss (), dlogits (N, K)",
    # training
    "sgd": "(weights, velocities, gradients, decays, lr, momentum, nesterov, copies=None): lists of arrays, velocities "
    "None where momentum is 0; in place: v = momentum v + (dw + decay w); w -= lr (nesterov: dw + decay w + momentum "
    "v, else v). A gradient dw has its weight's shape, or (parts, *shape): parts to be added up. lr is a float, or a "
    "float64 array () of the device, read when the kernel runs. copies: for each weight, which is float32, None or a "
    "bfloat16 array of its shape that gets the new weight",
    "augment": "(images (L, H, W, C) uint8, index (N,) int64, top, left (N,) int32, flip (N,) uint8, mean (H, W, C) "
    "float32, scale (C,) float32) -> x (N, H, W, C) float32: (image - mean) * scale, flipped left to right where "
    "flip, then moved: x[h, w] = image[h + top, w + left], zero outside",
    "augment_step": "(images, labels (L,) int64, order int64, counter (2,) int64, mean, scale, key, batch_size, "
    "steps_per_epoch, n, dtype, padding) -> x (n, H, W, C) float32 or bfloat16, labels (n,): of step s = counter[0], "
    "which is counted on in place; counter[1] is 0. The images are order[s % steps_per_epoch * batch_size + i], i < n. "
    "With padding an int, not None, draw s under key makes top and left floor(u (2 padding + 1)) - padding and flip "
    "u < 0.5, as data.Loader draws",
}

FUSED = {
    "conv2d_backward": "(dy, x, w, stride, padding, total=None) -> dx, dw; dx as in conv2d_backward_input",
    "add_relu": "(a, b) -> relu(a + b), same shapes; its backward is relu_backward",
    "conv2d_bias_forward": "(x, w, b, residual, relu, stride, padding) -> conv2d_forward + b, plus residual (None or "
    "in y's shape), through relu where `relu`",
    "batch_norm_relu_forward": "(x, gamma, beta, running_mean, running_var, momentum, eps) -> y, mean, inv_std",
    "batch_norm_relu_backward": "(dy, x, gamma, beta, mean, inv_std, overwrite=False) -> dx, dgamma, dbeta",
    "batch_norm_relu_inference": "(x, gamma, beta, mean, var, eps) -> y",
    "batch_norm_add_relu_forward": "(x, residual, gamma, beta, running_mean, running_var, momentum, eps) -> y, mean, "
    "inv_std: relu(batch_norm(x) + residual)",
    "batch_norm_add_relu_backward": "(dy, x, y, gamma, mean, inv_std, overwrite=False) -> dx, dresidual, dgamma, "
    "dbeta; dresidual may lie over dy if overwrite",
    "batch_norm_add_relu_inference": "(x, residual, gamma, beta, mean, var, eps) -> y",
    # residual blocks. x may be a Norm (norm.py), whose activation is meant; Norms and Gradients are completed in place
    "normed_conv2d_forward": "(x, w, stride, padding) -> y, rows: conv2d_forward, and partial sums of y for its Norm, "
    "or None",
    "normed_conv2d_backward_input": "(gradient, w, x, stride, padding, around=None) -> Gradient of x, or dx where x "
    "is an array, from the Gradient of y, or dy where no batch norm is behind; around is (dy, stride, before), what "
    "came along a shortcut from x that block_output took with these, and may be added to",
    "normed_conv2d_backward_weight": "(gradient, x, w_shape, stride, padding, parts=False) -> dw; or (parts, R, S, C, "
    "K), of which it is the sum over the first axis",
    "block_output": "(norm, shortcut=None, stride=1, before=0) -> norm's activation, to which shortcut is added before "
    "the ReLU: a Norm, without a ReLU of its own; or an array, of it every stride-th pixel, with `before` channels of "
    "zeros before its own and others behind",
    "block_output_backward": "(dy, norm, overwrite=False) -> Gradient of norm, from the gradient by its activation; dz "
    "may lie over dy if overwrite",
    "classifier": "(x (N, H, W, C), w (C, K), b (K,), labels, smoothing, metrics=None, parts=False) -> loss, dx, dw, "
    "db: cross_entropy of global_avg_pool2d_forward(x) @ w + b, and its gradients; where `parts`, dw and db have an "
    "axis of parts before their own, to be added up. metrics (4,) float64, updated in place: + losses of all images, "
    "+ images whose argmax is not the label, + images; the last stays 0",
    "classifier_inference": "(x, w, b, labels, smoothing, metrics=None) -> loss",
}

# Those that take Norms, and compose kernels that round by themselves.
NORMED = tuple(name for name in FUSED if name.startswith(("normed", "block")))

# By kernel, the positions of the results that are float32 beside bfloat16 arguments; all others are bfloat16.
WIDE = {
    "conv2d_backward_weight": (0,),
    "conv2d_backward": (1,),
    **dict.fromkeys(("batch_norm_forward", "batch_norm_relu_forward", "batch_norm_add_relu_forward"), (1, 2)),
    **dict.fromkeys(("batch_norm_backward", "batch_norm_relu_backward", "batch_norm_inference_backward"), (1, 2)),
    "batch_norm_add_relu_backward": (2, 3),
    **dict.fromkeys(("cross_entropy", "classifier_inference"), (0,)),
    "classifier": (0, 2, 3),
}
