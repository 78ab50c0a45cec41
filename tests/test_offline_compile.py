"""The kernels compile for GPUs that are not there, spill no registers, load widely, and the committed table is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def offline(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own: Triton decides at import whether to interpret or to compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "benchmarks" / "offline_compile.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_spills_wide_loads_and_a_true_table(capability: int) -> None:
    done = offline("--check", "--capability", str(capability))
    assert done.returncode == 0, done.stderr


def test_faults_are_found() -> None:
    """A program with a spill, narrow loads or another number of registers than the table says must fail the check."""
    script = """
import json, sys
import offline_compile as oc
case = next(iter(oc.cases(90)))
good = {"local": 0, "loads": {"128": 14, "32": 5}}
assert oc.faults(case, good) == []
assert "spilled" in oc.faults(case, {**good, "local": 3})[0]
assert "narrowly" in oc.faults(case, {**good, "loads": {"128": 1, "32": 90}})[0]
assert "narrowly" in oc.faults(case, {**good, "loads": {"128": 14, "16": 1}})[0]
table = {"a": {"sm_90": {"registers": 97}}}
assert oc.differences(table, table) == []
assert "now" in oc.differences(table, {"a": {"sm_90": {"registers": 98}}})[0]
assert "not in the committed" in oc.differences(table, {})[0]
assert "no longer" in oc.differences({}, table)[0]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_sizes_of_one_compile() -> None:
    """Triton makes a constant of a run-time argument that is 1, and a constant has no methods."""
    script = """
import torch, offline_compile as oc
for case in oc._batch_norm(torch.float32, samples=1, channels=1, side=1):
    assert any(isinstance(argument, int) and argument == 1 for argument in case.launch.arguments), case.name
    oc.compile_case(case, 90)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT / "kernels"), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_committed_table_is_free_of_spills() -> None:
    tables = sorted((ROOT / "benchmarks" / "results" / "offline").glob("triton-*.json"))
    assert tables
    for path in tables:
        cases = json.loads(path.read_text())["cases"]
        assert {column for rows in cases.values() for column in rows} == {"sm_80", "sm_90", "sm_100"}
        assert [name for name, rows in cases.items() for row in rows.values() if row["local"]] == []
