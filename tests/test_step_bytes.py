"""The training step compiles as one graph and asks a GPU for no more than the committed table says."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted((ROOT / "benchmarks" / "results" / "static").glob("torch-*.json"))


def step_bytes(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own: it puts an invented GPU in the place of torch's answers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "step_bytes.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_step_is_one_graph_and_no_larger_than_the_table() -> None:
    done = step_bytes("--check", "--only", "resnet18 cast kernels")
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 graph, 0 breaks" in done.stdout


def test_growth_is_found() -> None:
    script = """
import copy, json, sys
import step_bytes
row = json.load(open(sys.argv[1]))["rows"]["resnet18 cast kernels"]
assert step_bytes.worse(row, row) == []
cases = [("forward", "bytes", 1.01), ("backward", "generated", 1.05), ("backward", "nodes", 1.05)]
for part, what, factor in cases:
    grown = copy.deepcopy(row)
    grown[part][what] = int(grown[part][what] * factor)
    (fault,) = step_bytes.worse(grown, row)
    assert fault.startswith(f"{part} {what}"), fault
    shrunk = copy.deepcopy(row)
    shrunk[part][what] = int(shrunk[part][what] / factor)
    assert step_bytes.worse(shrunk, row) == []
assert step_bytes.worse({**row, "graph_breaks": 1}, row) == ["graph_breaks: 1, expected 0"]
assert step_bytes.worse({**row, "saved_bytes": 2 * row["saved_bytes"]}, row)[0].startswith("saved_bytes")
"""
    search = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels", ROOT / "benchmarks"))
    done = subprocess.run(
        [sys.executable, "-c", script, str(TABLES[-1])],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_another_torch_is_said_and_not_compared(tmp_path: Path) -> None:
    table = json.loads(TABLES[-1].read_text())
    other = tmp_path / "torch-0.json"
    other.write_text(json.dumps({**copy.deepcopy(table), "torch": "0.0"}))
    done = step_bytes("--check", "--table", str(other))
    assert done.returncode == 3
    assert "is for 0.0" in done.stdout


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_hold_what_the_documentation_says(path: Path) -> None:
    """One graph everywhere; the gathered pool moves less than the scattered one; CAST costs at most 5/4 of MoCo."""
    rows = json.loads(path.read_text())["rows"]
    assert all(row["graphs"] == 1 and row["graph_breaks"] == 0 for row in rows.values())

    def total(name: str) -> int:
        return rows[name]["forward"]["bytes"] + rows[name]["backward"]["bytes"]

    for name in ("resnet18 cast kernels", "resnet50 trunk"):
        assert total(name) < total(f"{name} scattered")
    assert total("resnet50 cast kernels") < 1.25 * total("resnet50 moco kernels")
