"""A pickle that leaves a mark when it is run."""

import os
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Makes the directory `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def plant(path: Path, mark: Path) -> None:
    """`path` as torch saved it, with a bomb among what it holds; weights stay where they are."""
    content = torch.load(path, weights_only=False) if path.is_file() else {}
    torch.save({**content, "planted": Bomb(mark)}, path)
