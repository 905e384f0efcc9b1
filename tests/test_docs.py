"""What README and docs show works, and the files they name exist."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tinyres
from tinyres import ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def indented_block(text, heading):
    """The first indented block below a heading, dedented."""
    after = text[text.index(heading) :].split("\n\n")
    block = next(part for part in after if part.startswith("    "))
    start = after.index(block)
    lines = []
    for part in after[start:]:
        if not part.startswith("    "):
            break
        lines += [line[4:] for line in part.splitlines()] + [""]
    return "\n".join(lines)


def test_the_ten_lines_train():
    rng = np.random.default_rng(0)
    names = {"images": rng.standard_normal((8, 8, 8, 3)).astype(np.float32), "labels": np.arange(8)}
    code = indented_block(README, "## A residual network in ten lines")
    exec(code, names)
    first = names["loss"].item()
    for _ in range(20):
        names["optimizer"].zero_grad()
        loss = ops.cross_entropy(names["model"](tinyres.tensor(names["images"])), names["labels"])
        loss.backward()
        names["optimizer"].step()
    assert loss.item() < first / 2


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/determinism.md", "docs/winograd.md"])
def test_named_files_exist(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"\b(?:tinyres|csrc|examples|benchmarks|tests|docs)/[\w./]+\.(?:py|cpp|h|md)\b", text)
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_every_op_is_documented_and_public():
    for name in ops.__all__:
        assert getattr(ops, name).__doc__, name
    for name in tinyres.__all__:
        assert hasattr(tinyres, name), name


def test_first_op_checks_itself():
    example = ROOT / "examples/first_op.py"
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    checked = re.search(r"(\d+) derivatives on (emulated|cuda) agree with finite differences", done.stdout)
    assert checked and int(checked[1]) >= 12, done.stdout
    assert float(re.search(r"error (\S+) %", done.stdout)[1]) < 10, done.stdout
    assert len(example.read_text().splitlines()) < 100


def test_the_check_of_first_op_can_fail():
    text = (ROOT / "examples/first_op.py").read_text()
    wrong = text.replace("dy[i] * s * (1 + x[i] * (1 - s))", "dy[i] * s")
    assert wrong != text
    command = [sys.executable, "-c", wrong.replace("__file__", repr(str(ROOT / "examples/first_op.py")))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "GradcheckError" in done.stderr, done.stderr
