"""detect_anomaly: name the op, and the line of the program, where numbers stop being finite or saved arrays change."""

from __future__ import annotations

import linecache
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np

from tinyres.autograd import Function, Tensor, observed
from tinyres.backend import Array, Device
from tinyres.backend.norm import Norm
from tinyres.dtypes import is_bfloat16
from tinyres.errors import GraphError, NonFiniteError, fail
from tinyres.nn import Module

PACKAGE = os.path.dirname(__file__) + os.sep


class detect_anomaly(observed):
    """Within this block (or decorated function) the first op that goes wrong raises an error that names it.

        with tinyres.detect_anomaly():
            loss = ops.cross_entropy(model(x), labels)
            loss.backward()

    The error says which op it was, which array and which element, the line of the program that called it (in the
    innermost frame outside of tinyres), and in a model the layer.

    NonFiniteError  forward, also within `no_grad`, or backward gave a NaN or an infinity. Where the op was given one
                    (in a leaf, in running statistics, by a hook or with the loss's gradient) the error says so. An
                    infinity that an op takes and does not pass on, as relu does with -inf, is no error
    GraphError      an array that forward saved was changed in place before backward, whose result would be wrong

    Both forward and backward belong into the block; it is of this thread only. When it raises in a sweep, no `grad`
    has changed. Every array is looked at, saved ones twice, and on a GPU each look waits: for a search, not for a run.
    """

    def after_forward(
        self, node: Function, inputs: tuple[Tensor | None, ...], attributes: dict[str, Any], out: Any
    ) -> None:
        call, device = _Call(sys._getframe(2)), node.device
        results, kept = dict(_arrays(device, "result", out)), dict(_arrays(device, "", attributes))
        given = dict(_arrays(device, "input", tuple(x if x is None else x.data for x in inputs))) | kept
        for name, array in (results | kept).items():
            if wrong := _not_finite(device, array):
                broken = {source: _not_finite(device, value) for source, value in given.items()}
                for i, x in enumerate(inputs):
                    if x is not None and x._node is None and broken[f"input[{i}]"]:
                        broken[f"input[{i}]"] += f" (leaf{call.name_of(x)})"
                broken = {source: text for source, text in broken.items() if text}
                rule = "the result of forward must be finite"
                if broken:
                    rule = "what the op is given, or keeps a running average in, must be finite"
                fail(type(node).__name__, rule, NonFiniteError, **(broken or {name: wrong}) | {"called": call})
        if True in node.needs:
            names = {id(array): name for name, array in reversed((given | results).items())}
            saved = [(names.get(id(a), name), _checksum(device, a)) for name, a in _arrays(device, "saved", node.saved)]
            node.note = call, saved

    def before_backward(self, node: Function, dys: Sequence[Array]) -> None:
        call, saved = node.note or (_UNKNOWN, [])
        arrays = [array for _, array in _arrays(node.device, "saved", node.saved)]
        for (name, before), array in zip(saved, arrays, strict=False):
            if _checksum(node.device, array) != before:
                rule = "an array that forward saved must not be changed before backward"
                fail(type(node).__name__, rule, GraphError, changed=f"{name} {array.shape}", called=call)
        for dy in dys:
            if wrong := _not_finite(node.device, dy):
                rule = "the gradient that arrives (of the loss, from a hook, or a sum) must be finite"
                fail(type(node).__name__, rule, NonFiniteError, gradient=wrong, called=call)

    def after_backward(self, node: Function, dxs: tuple) -> None:
        for i, (parent, dx) in enumerate(zip(node.parents, dxs, strict=False)):
            if parent is not None and node.device.owns(dx) and (wrong := _not_finite(node.device, dx)):
                got = {f"gradient of input[{i}]": wrong, "called": node.note[0] if node.note else _UNKNOWN}
                fail(type(node).__name__, "the result of backward must be finite", NonFiniteError, **got)

    def after_sweep(self, leaf: Tensor, gradient: Array) -> None:
        if wrong := _not_finite(leaf.device, gradient):
            rule = "a leaf's whole gradient (hooks, and what its grad held, included) must be finite"
            fail("backward", rule, NonFiniteError, gradient=wrong)


_UNKNOWN = "outside of detect_anomaly"


class _Call:
    """Where an op was called: the line of the program, and the modules whose forward it is part of."""

    def __init__(self, frame: FrameType | None) -> None:
        self.line: tuple[str, int] | None = None
        self.modules: list[Module] = []  # the innermost first
        while frame is not None:
            code = frame.f_code
            if code is Module.__call__.__code__:
                self.modules.append(frame.f_locals["self"])
            elif self.line is None and not code.co_filename.startswith(PACKAGE):
                self.line = code.co_filename, frame.f_lineno
            frame = frame.f_back

    def name_of(self, leaf: Tensor) -> str:
        """The leaf's name in the model, as ` conv1.weight`; nothing if it is not the model's."""
        named = self.modules[-1].named_parameters() if self.modules else ()
        return next((f" {name}" for name, parameter in named if parameter is leaf), "")

    def __str__(self) -> str:
        text = "from an unknown line"
        if self.line:
            file, number = self.line
            source = linecache.getline(file, number).strip()
            text = f'from File "{file}", line {number}' + (f": {source}" if source else "")
        if self.modules:
            inner, outer = self.modules[0], self.modules[-1]
            path = next((name for name, module in outer.named_modules() if module is inner), "")
            text = f"by {path or 'the model'} ({type(inner).__name__}) {text}"
        return text


def _arrays(device: Device, name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """The arrays in a value or a nest of tuples, lists and dicts, named by their places in it."""
    if device.owns(value) or isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _arrays(device, f"{name}[{i}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _arrays(device, f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, Norm):
        yield from _arrays(device, name, value.kept())


def _not_finite(device: Device, array: Array) -> str:
    """Where `array` is not finite, in words; nothing where it is."""
    if is_bfloat16(array.dtype):
        array = array.astype(np.float32)
    if array.dtype.kind not in "fc" or bool(np.isfinite(array).all()):  # which runs on a GPU for arrays that lie there
        return ""
    host = device.numpy(array)
    broken = np.argwhere(~np.isfinite(host))
    first = tuple(broken[0].tolist())
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return f"{host[first]} at {first}{more} in {array.shape}"


def _checksum(device: Device, array: Array) -> int:
    """A fingerprint of the elements, wherever they lie."""
    if array.dtype.hasobject:
        return 0
    return zlib.crc32(np.ascontiguousarray(device.numpy(array)).reshape(-1).view(np.uint8).data)
