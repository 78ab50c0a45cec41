"""The examples are short, run as written, and their attention loss can be learned."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cast_fast.data.synthetic import write_dataset

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "demo"
    write_dataset(folder, 16, 0, size=(160, 120), workers=1)
    return folder


def test_both_methods_have_one():
    assert {"simclr_cast.py", "moco_v2_cast.py"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_is_short(path: Path, scenes: Path):
    assert len(path.read_text().splitlines()) < 100
    flags = ["--arch", "resnet18", "--size", "96", "--batch", "16", "--steps", "48"]
    if "moco" in path.name:
        pytest.importorskip("nvidia.dali")
        flags += ["--queue-size", "50"]
    done = subprocess.run(
        [sys.executable, str(path), "--images", str(scenes / "images"), "--saliency", str(scenes / "saliency"), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^step (\d+): contrastive (\d+\.\d+), attention (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in found] == list(range(48))
    attention = [float(value) for _, _, value in found]
    assert all(0 <= value <= 1 for value in attention)
    assert sum(attention[-12:]) / 12 < sum(attention[:12]) / 12 - 0.05
