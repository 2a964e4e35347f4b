"""A study as data: its runs, the commands of each run, and the plan that was fixed before the first run.

A run is a variant at a seed. The engine (`clips.lab.run`) knows commands, files and times; it knows no model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips.common.files import read_json, sha256, write_json
from clips.common.rundir import changed

RECORD, COST = "run.json", "cost.json"


@dataclass(frozen=True, eq=False)
class Step:
    """A command of a run, started as a process of its own."""

    name: str
    """Printed when it begins; the key of the step's seconds in cost.json."""
    command: tuple[str, ...]
    is_done: Callable[[], bool]
    """Returns True if the files that the command leaves exist. A step that is done is never run again."""
    folder: Path | None = None
    """A folder for only this step, emptied before each attempt, with its log. Without one it uses the run's log."""
    may_fail: bool = False
    """True if the run continues although the command failed. The study reports such steps at its end."""

    @property
    def log(self) -> Path | None:
        """File of the step's output, or None if it has no folder."""
        return self.folder / "log.txt" if self.folder else None


@dataclass(frozen=True, eq=False)
class Run:
    """A variant at a seed: a directory, and the steps that fill it."""

    variant: str
    """Row of the table."""
    seed: str
    """Column of the table, in words, such as "seed 0"."""
    directory: Path
    steps: tuple[Step, ...]
    check: Callable[[], None] = lambda: None
    """Raises UserError if the directory holds a run with other settings."""
    about: str = ""
    """Recipe and settings in words, for the plan."""
    record: Mapping[str, Any] | None = None
    """What run.json holds in addition to the commands. If None, the directory has no run.json and no cost.json."""
    result: Callable[[], str] = lambda: ""
    """Returns a metric of the finished run in words, for the table."""

    @property
    def name(self) -> str:
        """Name of the run, which is that of its directory."""
        return self.directory.name

    @property
    def log(self) -> Path:
        """File of the run's output, next to its directory."""
        return self.directory.parent / f"{self.name}.log"

    def is_done(self) -> bool:
        """Return True if every step is done."""
        return all(step.is_done() for step in self.steps)


# ------------------------------------------------------------------------------------------- the plan
def fix(path: Path, plan: Mapping[str, Any], begun: int) -> None:
    """Write `plan` to `path`, with the number of runs that have started already.

    Once a run has started, the plan stays as it is.
    """
    if not begun or not path.is_file():
        write_json(path, {**plan, "runs_begun": begun})


def what_was_fixed(path: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Compare `plan`, by which the metrics were made, with the plan in `path`.

    Returns `sha256` of the file, `kept` (True if they are the same), and `differs`, a line for each difference.
    """
    before = read_json(path)
    begun = before.pop("runs_begun", None)
    differs = changed(before, plan)
    if begun != 0:
        differs.append(f"{path.name} was written when {begun} run(s) had begun already")
    return {"sha256": sha256(path), "kept": not differs, "differs": differs}
