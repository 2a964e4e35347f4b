"""Pretraining under random SIGKILLs to its end, and whether it comes to what it comes to in peace.

The same command trains twice: once undisturbed, and once with its processes killed and then started again, as a user
would. Everything is watched from outside (metrics.jsonl, the checkpoints' directory): the run knows nothing of this.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.markup import escape

from clips.common.errors import CommandError, UserError
from clips.common.files import MANIFEST, read_json, write_json
from clips.common.rundir import METRICS, parse_line, read_evaluations, read_metrics
from clips.common.runtime import unused_port
from clips.common.tensors import hash_weights, read_weights
from clips.training.cli import config_from_flags
from clips.training.cli import parser as training_parser
from clips.training.log import MACHINE

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_clips.py"
PLACES = {"step": 6, "save": 5, "validation": 3, "start": 2, "evaluation": 2, "export": 2}
"""Where a run is killed, and how often of 20 times."""
VICTIMS = ("rank", "launcher", "worker", "everything")
LAST_PLANNED = 0.8
"""Share of the run after which no kill of a step, save or validation is planned: later ones might find no moment."""
LONGEST_START = 8.0
"""Seconds in which a kill at the start falls."""
PATIENCE = 180
"""Seconds after a kill in which all other processes of the run must have ended."""


@dataclass(frozen=True)
class Kill:
    place: str
    victim: str
    after: int
    """Samples that the run has seen before this one waits for its moment."""


@dataclass(frozen=True)
class Training:
    """A run, as it is started again and again."""

    flags: Sequence[str]
    """Of scripts/pretrain_clips.py."""
    ranks: int
    run_dir: Path
    samples: int
    eval_every: int

    @property
    def log(self) -> Path:
        return self.run_dir.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(self.ranks)]
        command = [*launcher, "--master_port", str(unused_port()), str(SCRIPT), *self.flags]
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill_test(kills: int, ranks: int, seed: int, output: Path, flags: Sequence[str]) -> None:
    """Train with `flags` of scripts/pretrain_clips.py, in peace and under `kills` SIGKILLs, and compare.

    Writes `output`/kill_test.json and prints its summary last. Raises CommandError where the two runs differ, a kill
    leaves processes that do not end, or a run ends without one; UserError for numbers below one.
    """
    if kills < 1 or ranks < 1:
        raise UserError(f"--kills {kills} --ranks {ranks}: both must be at least 1")
    if output.exists():
        raise UserError(f"{output} is there already: give another --output, or remove it")
    output.mkdir(parents=True)
    peaceful, killed = (_training(flags, ranks, output, name) for name in ("in-peace", "killed"))
    say = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True).print
    say(f"training {peaceful.samples:,} samples on {ranks} ranks in peace (log: {escape(str(peaceful.log))})")
    if code := peaceful.start().wait():
        raise CommandError(f"the run that nobody kills ended with {code}; see {peaceful.log}")
    say(f"training the same under {kills} kills (log: {escape(str(killed.log))})")
    begin = time.monotonic()
    done = []
    for place, victim, seen in train_under(kills_for(killed.samples, kills, seed), killed, seed):
        done.append({"place": place, "victim": victim, "samples": seen})
        say(f"kill {len(done)} of {kills}: {victim}, {place}, after {seen:,} samples")
    differences = compare(peaceful.run_dir, killed.run_dir)
    counted = (", ".join(f"{n} {name}" for name, n in Counter(k[key] for k in done).items()) for key in done[0])
    where, who, _ = counted
    lines = len(read_metrics(peaceful.run_dir, "train"))
    outcome = (
        f"NOT equal to the run in peace: {'; '.join(differences)}"
        if differences
        else f"its trace of {lines} lines, evaluations, checkpoints and exports equal those in peace, bit for bit"
    )
    minutes = (time.monotonic() - begin) / 60
    summary = f"{len(done)} SIGKILLs ({where}; of {who}) on {ranks} ranks in {minutes:.1f} min: {outcome}"
    write_json(output / "kill_test.json", {"kills": done, "differences": differences, "summary": summary})
    print(summary)
    if differences:
        raise CommandError(f"the killed run differs; both are in {output}")
    if len(done) < kills:
        raise CommandError(f"only {len(done)} of {kills} kills found their moment; give more --samples")


def _training(flags: Sequence[str], ranks: int, output: Path, name: str) -> Training:
    # Each step has a line of its own: a stop between two lines, as a lost launcher's, would write one more.
    flags = [*flags, "--set", "train.log_every=1", "--output-dir", str(output), "--name", name]
    run = config_from_flags(training_parser().parse_args(flags))
    return Training(flags, ranks, output / name, run.samples, run.train.eval_every)


def kills_for(samples: int, count: int, seed: int) -> list[Kill]:
    """`count` kills in the order in which a run of `samples` meets them; each victim as often as the others."""
    rng = random.Random(seed)
    places = rng.sample(list(PLACES), min(count, len(PLACES)))  # each once; then as often as PLACES says
    places += rng.choices(list(PLACES), list(PLACES.values()), k=count - len(places))
    victims = [VICTIMS[i % len(VICTIMS)] for i in range(count)]
    rng.shuffle(victims)
    at_the_end = {"evaluation": samples, "export": samples + 1}
    kills = [
        Kill(place, victim, at_the_end.get(place, int(rng.random() * LAST_PLANNED * samples)))
        for place, victim in zip(places, victims, strict=True)
    ]
    kills.sort(key=lambda kill: kill.after)
    # Without its launcher the last rank goes on and ends the run by itself: of these kills, that is the last one's.
    last = [kill for kill in kills if kill.place in at_the_end]
    others = ("rank", "everything")
    ends = [Kill(kill.place, others[i % 2], kill.after) for i, kill in enumerate(last)]
    ends[-1:] = [Kill(kill.place, "launcher", kill.after) for kill in last[-1:]]
    return [kill for kill in kills if kill not in last] + ends


# --------------------------------------------------------------------------------------------------------------- kills
def train_under(kills: Sequence[Kill], training: Training, seed: int) -> Iterator[tuple[str, str, int]]:
    """Run `training` to its end under `kills`, as far as they find their moments.

    Yields of each the place, who was killed, and the samples seen by then.
    """
    rng = random.Random(f"{seed}/moments")
    waiting = list(kills)
    while True:
        process, family = training.start(), []
        start_ends = time.monotonic() + rng.uniform(0, LONGEST_START)
        try:
            kill = None
            while process.poll() is None and kill is None:
                kill = next((one for one in waiting if _is_now(one, training, start_ends)), None)
                time.sleep(0.002)
            if kill is None:
                if process.returncode:
                    raise CommandError(f"the run ended with {process.returncode} by itself; see {training.log}")
                return
            waiting.remove(kill)
            if kill.place not in ("start", "save", "export"):  # which are short
                time.sleep(rng.uniform(0, 0.2))
            family = _family(process)
            seen = samples_seen(training.run_dir)
            victim, targets = _choose(kill.victim, process, family, rng)
            for target in targets:
                target.kill()
            process.wait(PATIENCE)
            _, alive = psutil.wait_procs(family, PATIENCE)
            if alive:
                left = ", ".join(str(other.pid) for other in alive)
                raise CommandError(f"{PATIENCE} s after a kill of {victim} these processes are left: {left}")
            yield kill.place, victim, seen
        finally:
            for other in [*family, *_family(process)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    other.kill()
            process.kill()
            process.wait()


def _family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All that `process` has started, and what that has started; none once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def _is_now(kill: Kill, training: Training, start_ends: float) -> bool:
    """Whether the run is where `kill` is meant for."""
    run_dir, seen = training.run_dir, samples_seen(training.run_dir)
    if kill.place == "start":
        return time.monotonic() > start_ends
    if kill.place == "export":
        return (run_dir / "export.partial").is_dir()
    if seen < kill.after:
        return False
    if kill.place == "save":
        return any((run_dir / "checkpoints").glob("*.partial"))
    if kill.place == "validation":
        is_due = seen == training.samples or (training.eval_every and seen % training.eval_every == 0)
        return bool(is_due) and samples_seen(run_dir, "eval") < seen
    if kill.place == "evaluation":
        return samples_seen(run_dir, "eval") == training.samples
    return True


def samples_seen(run_dir: Path, kind: str = "train") -> int:
    """Of the last line of this kind in metrics.jsonl, which may be written at this moment; 0 without one."""
    path = run_dir / METRICS
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        found = file.read().splitlines()
    of_kind = (line for text in reversed(found) if (line := parse_line(text)) and line.get("kind") == kind)
    return next((line["samples"] for line in of_kind), 0)


def _choose(
    victim: str, launcher: subprocess.Popen[bytes], family: list[psutil.Process], rng: random.Random
) -> tuple[str, list[psutil.Process]]:
    """What is killed for `victim`: its name, a rank where there is no worker at this moment; and the processes."""
    parts: dict[str, list[psutil.Process]] = {"rank": [], "launcher": [psutil.Process(launcher.pid)], "worker": []}
    ranks: set[int] = set()
    for process in family:  # parents come before their children
        is_of_rank = "RANK" in process.environ()
        part = "launcher" if not is_of_rank else "worker" if process.ppid() in ranks else "rank"
        if is_of_rank:
            ranks.add(process.pid)
        parts[part].append(process)
    if victim == "everything":
        return victim, [process for part in parts.values() for process in part]
    found = next(name for name in (victim, "rank", "launcher") if parts[name])
    return found, [rng.choice(parts[found])]


# ------------------------------------------------------------------------------------------------------------- compare
def compare(here: Path, there: Path) -> list[str]:
    """What differs between two finished runs of one configuration, but for their names and how long they took."""
    differences = []
    for kind in ("train", "eval"):
        one, other = ([_without(line, MACHINE) for line in read_metrics(run_dir, kind)] for run_dir in (here, there))
        if one != other:
            first = next((a for a, b in zip(one, other, strict=False) if a != b), (one + other)[-1])
            differences.append(f"{kind} lines from step {first['step']} on ({len(one)} against {len(other)})")
    for what, read in (("checkpoints", _checkpoints), ("evaluations", _figures), ("exports", _exports)):
        ours, theirs = read(here), read(there)
        changed = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        if changed or not ours:
            differences.append(f"{what}: {', '.join(changed) or 'none'}")
    return differences


def _without(line: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in names}


def _checkpoints(run_dir: Path) -> dict[str, Any]:
    return {path.parent.name: read_json(path) for path in (run_dir / "checkpoints").glob(f"step-*/{MANIFEST}")}


def _figures(run_dir: Path) -> dict[str, Any]:
    return {name: content["figures"] for name, content in read_evaluations(run_dir).items()}


def _exports(run_dir: Path) -> dict[str, Any]:
    """Tensors, not files: safetensors writes metadata in no fixed order."""
    files = (run_dir / "export").rglob("*.safetensors")
    return {str(path.relative_to(run_dir)): hash_weights(read_weights(path)).hexdigest() for path in files}
