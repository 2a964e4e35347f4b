"""Which machine this is, told from all others that see the same folders or have ranks of the same run."""

from __future__ import annotations

import os
from pathlib import Path


def this_machine() -> str | None:
    """The same for two processes that see each other by their numbers, and for no others; None where nothing tells.

    It changes with a restart. Names do not tell: those of rented machines and of containers are often the same.
    """
    boot, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not numbers.exists():
        return None
    # Containers of a machine number processes anew.
    return f"{boot.read_text(encoding='utf-8').strip()} {os.readlink(numbers)}"
