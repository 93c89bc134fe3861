"""The environment variables by which a launcher describes this process. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cmbench.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process among those that a launcher (torchrun, srun) has started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> Launch:
        """Read ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE``.

        Raises:
            UserError: they are not whole numbers, or contradict each other.
        """
        values: dict[str, int] = {}
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
            text = os.environ.get(name, str(default))
            low, high = (1, 10**6) if name == "WORLD_SIZE" else (0, values["WORLD_SIZE"] - 1)
            if not text.isdecimal() or not low <= int(text) <= high:
                raise UserError(
                    f"environment variable {name}",
                    repr(text),
                    allowed=f"{low} to {high}",
                    remedy="start with torchrun, or unset it for one process",
                )
            values[name] = int(text)
        if values["WORLD_SIZE"] > 1 and "RANK" not in os.environ:
            raise UserError(
                "environment variable WORLD_SIZE",
                f"{values['WORLD_SIZE']} without RANK",
                remedy="start with torchrun, or unset it for one process",
            )
        if values["WORLD_SIZE"] > 1 and "LOCAL_RANK" not in os.environ:
            raise UserError(
                "environment variable LOCAL_RANK",
                f"missing for process "
                f"{values['RANK']} of {values['WORLD_SIZE']}: all of a machine would "
                "take its first GPU",
                allowed="the process's number on its machine",
                remedy="start with torchrun, or set it (Slurm: to $SLURM_LOCALID)",
            )
        local = os.environ.get("LOCAL_WORLD_SIZE", "1")
        local_size = max(int(local), 1) if local.isdecimal() else 1
        return cls(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], local_size)
