"""Facts about the ranks and every collective; all of it is the identity at world size one.

torchrun sets ``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE``; without them a process is rank 0 of 1.
"""

from __future__ import annotations

import dataclasses
import os

from cast_fast.errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """Where this process stands among the ranks."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes metrics and prints."""
        return self.rank == 0


def world_from_environment() -> World:
    """Reads torchrun's variables.

    Raises:
        UserError: a variable is no integer, or rank and world size contradict each other.
    """
    values = {}
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        try:
            values[name] = int(text)
        except ValueError:
            raise UserError(f"environment variable {name}: got {text!r}, expected torchrun's integer") from None
    if not 0 <= values["RANK"] < values["WORLD_SIZE"]:
        raise UserError(f"RANK={values['RANK']} and WORLD_SIZE={values['WORLD_SIZE']}: expected 0 <= RANK < WORLD_SIZE")
    return World(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"])
