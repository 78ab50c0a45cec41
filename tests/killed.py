"""Commands that are killed in the middle, by the system and not by an exception: no ``finally`` runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

_PROGRAM = """
import os, signal, sys
from cast_fast import cli

at, renamed, rename = int(sys.argv[1]), 0, os.replace

def replace(*paths):
    global renamed
    renamed += 1
    if renamed == at:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)

os.replace = replace
sys.exit(cli.main(sys.argv[2:]))
"""


def environment() -> dict[str, str]:
    """For a process that finds the modules that this one finds."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def killed_at_rename(number: int, *command: object) -> bool:
    """Runs ``cast-fast`` in a process that gets SIGKILL in place of its rename of this number, from 1 on.

    Returns:
        False where the command ended, in success, before it came to that.
    """
    arguments = [sys.executable, "-c", _PROGRAM, str(number), *map(str, command)]
    result = subprocess.run(arguments, capture_output=True, text=True, env=environment())
    assert result.returncode in (0, -signal.SIGKILL), result.stderr
    return result.returncode != 0
