"""A pickle that leaves a mark when it is run, in every form that a checkpoint may have."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Makes the directory `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.mark,)


def write_pickle(path: Path, mark: Path) -> None:
    """A bare pickle."""
    path.write_bytes(pickle.dumps(Bomb(mark)))


def plant(path: Path, mark: Path) -> None:
    """`path` as torch saved it, with a bomb among what it holds; weights stay where they are."""
    content = torch.load(path, weights_only=False) if path.is_file() else {}
    torch.save({**content, "planted": Bomb(mark)}, path)


def works(place: Path) -> None:
    """The bomb is one: both forms of it go off where code is run."""
    for number, write in enumerate((write_pickle, plant)):
        mark, path = place / f"mark-{number}", place / f"bomb-{number}.pt"
        write(path, mark)
        if write is write_pickle:
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert mark.is_dir()
