"""The import order of docs/architecture.md: a file imports only from layers below its own, so there are no cycles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyres"

# Lowest first; modules on one line do not import each other.
LAYERS = [
    ["_cpu", "errors", "version"],
    ["dtypes"],
    ["options"],
    ["backend"],
    ["autograd"],
    ["ops", "gradcheck"],
    ["nn"],
    ["anomaly", "models", "optim", "data", "summary", "checkpoint"],
    ["train", "graph", "recipes", "torch_weights", "analysis", "classify"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path):
    """Names such as `tinyres.ops.checks` that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    for name in imports(path):
        assert name != "tinyres", f"{own} must not import the whole package"
        if name.startswith("tinyres."):
            other = name.split(".")[1]
            assert other == own or LEVEL[other] < LEVEL[own], f"{own} must not import {name}"


def test_every_module_has_a_layer():
    assert {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in FILES} <= set(LEVEL)


def test_kernel_tables_match_the_spec():
    """Each device exports the mandatory kernels, and its fused kernels are named in the spec."""
    from tinyres.backend import compose, reference, spec
    from tinyres.backend.adapter import Adapter

    composed = {n for n, f in vars(compose).items() if callable(f)}
    assert composed == set(spec.FUSED)
    for table in (reference, Adapter):
        own = {n for n, f in vars(table).items() if callable(f) and not n.startswith("_")}
        assert set(spec.MANDATORY) <= own
    assert set(spec.FUSED) <= set(vars(Adapter))
    for text in spec.MANDATORY.values():
        assert text.startswith("(")
