"""The counted bytes of Inductor's code, on which docs/kernels.md rests, are still true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "offline" / "inductor_bytes.json").read_text())


@pytest.mark.skipif(
    COMMITTED["torch"] != torch.__version__ or torch.cuda.is_available(),
    reason="counted with another torch, or on a machine with a real GPU to ask",
)
def test_counts_are_those_committed(tmp_path: Path) -> None:
    """In a process of its own: it makes torch and Triton believe in a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    out = tmp_path / "bytes.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "inductor_bytes.py"), "--write", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text()) == COMMITTED


def test_what_the_documentation_concludes_from_them() -> None:
    studies = COMMITTED["studies"]
    # No kernel of our own for these: less than a fifth of the floor is lost.
    for name in (
        "normalise and mask the key crops, with the two stem convolutions that read them",
        "momentum update, compiled",
        "SGD, compiled",
    ):
        assert 1 - studies[name]["floor"] / studies[name]["bytes"] < 0.2
    # ∂A stays ordinary operations: a kernel would write it and have it read back.
    without, ordinary, written = (
        studies[f"last block, backward, {how}"]["bytes"]
        for how in ("no attention loss", "∂A as ordinary operations", "∂A from a kernel")
    )
    gradient = 256 * 2048 * 7 * 7 * 2
    assert ordinary - without < 0.3 * gradient
    assert written - ordinary > 2 * gradient
    for name, least in (("gradcam_cosine", 5), ("info_nce", 20)):
        compiled = next(row for study, row in studies.items() if study.startswith(f"{name} reference"))
        operator = next(row for study, row in studies.items() if study.startswith(f"{name} operator"))
        assert compiled["bytes"] > least * operator["bytes"]
