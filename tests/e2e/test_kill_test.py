"""Pretraining under random SIGKILLs to its end comes to what it comes to in peace, bit for bit.

The same command trains twice: once undisturbed, and once with its processes killed and then started again, as a user
would. Everything is watched from outside (metrics.jsonl, the checkpoints' directory): the run knows nothing of this.
KILLS in the environment gives another number of kills, SEED another choice.
"""

import contextlib
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from launched import SCRIPT, deepspeed, environment, small_data, started, trace

from clips.common.files import MANIFEST, read_json
from clips.common.rundir import METRICS, parse_line, read_evaluations
from clips.common.tensors import hash_weights, read_weights

pytestmark = pytest.mark.slow

PLACES = {"step": 6, "save": 5, "validation": 3, "start": 2, "evaluation": 2, "export": 2}
"""Where a run is killed, and how often of 20 times."""
VICTIMS = ("rank", "launcher", "worker", "everything")
LAST_PLANNED = 0.8
"""Share of the run after which no kill of a step, save or validation is planned: later kills might find no moment."""
LONGEST_START = 3.0
"""Seconds in which a kill at the start falls."""
PATIENCE = 180
"""Seconds after a kill in which all other processes of the run must have ended."""
SAMPLES, EVAL_EVERY, SAVE_EVERY, BATCH = 720, 240, 80, 8
"""Of the whole run, which has three phases."""


@dataclass(frozen=True)
class Kill:
    place: str
    victim: str
    after: int
    """Samples that the run has seen before the kill waits for its moment."""


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


def train_under(kills: Sequence[Kill], run_dir: Path, flags: Sequence[str], seed: int) -> Iterator[Kill]:
    """Train to the end under `kills`, as far as they find their moments; yields each kill that did."""
    rng, waiting = random.Random(f"{seed}/moments"), list(kills)
    log = run_dir.with_suffix(".log")
    while True:
        with started(deepspeed(SCRIPT, *flags), log) as process:
            start_ends = time.monotonic() + rng.uniform(0, LONGEST_START)
            kill = None
            while process.poll() is None and kill is None:
                kill = next((one for one in waiting if is_now(one, run_dir, start_ends)), None)
                time.sleep(0.002)
            if kill is None:
                assert process.returncode == 0, log.read_text()[-3000:]
                return
            waiting.remove(kill)
            if kill.place not in ("start", "export"):  # which are short
                time.sleep(rng.uniform(0, 0.02 if kill.place == "save" else 0.2))
            family = []
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
            for target in chosen(kill.victim, process.pid, family, rng):
                with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended by itself
                    target.kill()
            process.wait(PATIENCE)
            _, alive = psutil.wait_procs(family, PATIENCE)
            for other in alive:
                other.kill()
            assert not alive, f"{PATIENCE} s after a kill of {kill.victim} {len(alive)} processes are left"
            yield kill


def is_now(kill: Kill, run_dir: Path, start_ends: float) -> bool:
    """Whether the run is where `kill` is meant for."""
    seen = samples_seen(run_dir)
    if kill.place == "start":
        return time.monotonic() > start_ends
    if kill.place == "export":
        return (run_dir / "export.partial").is_dir()
    if seen < kill.after:
        return False
    if kill.place == "save":
        # From the line of its step, which is written before, to the moment in which LATEST names it.
        saved = int(read_latest(run_dir).removeprefix("step-") or 0) * BATCH
        return any((run_dir / "checkpoints").glob(".*.tmp")) or (seen % SAVE_EVERY == 0 and saved < seen)
    if kill.place == "validation":
        return seen % EVAL_EVERY == 0 and samples_seen(run_dir, "eval") < seen
    if kill.place == "evaluation":
        return samples_seen(run_dir, "eval") == SAMPLES
    return True


def samples_seen(run_dir: Path, kind: str = "train") -> int:
    """Samples of the last line of this kind in metrics.jsonl, which may be written at this moment; 0 if missing."""
    path = run_dir / METRICS
    texts = path.read_bytes()[-20_000:].splitlines() if path.is_file() else []
    of_kind = (line for text in reversed(texts) if (line := parse_line(text)) and line.get("kind") == kind)
    return next((line["samples"] for line in of_kind), 0)


def read_latest(run_dir: Path) -> str:
    latest = run_dir / "LATEST"
    return latest.read_text().strip() if latest.is_file() else ""


def chosen(victim: str, launcher: int, family: list[psutil.Process], rng: random.Random) -> list[psutil.Process]:
    """The processes that are killed for `victim`: a rank if there is no worker at this moment."""
    parts: dict[str, list[psutil.Process]] = {"rank": [], "launcher": [psutil.Process(launcher)], "worker": []}
    ranks: set[int] = set()
    for process in family:  # parents come before their children
        is_of_rank = "RANK" in environment(process)
        part = "launcher" if not is_of_rank else "worker" if process.ppid() in ranks else "rank"
        if is_of_rank:
            ranks.add(process.pid)
        parts[part].append(process)
    if victim == "everything":
        return [process for part in parts.values() for process in part]
    kind = next(name for name in (victim, "rank", "launcher") if parts[name])
    return [rng.choice(parts[kind])]


def compare(here: Path, there: Path) -> list[str]:
    """What differs between two finished runs of one configuration, except for their names and their times."""
    both = []
    for run_dir in (here, there):
        parts: dict[str, dict[str, Any]] = {kind: dict(enumerate(trace(run_dir, kind))) for kind in ("train", "eval")}
        manifests = (run_dir / "checkpoints").glob(f"step-*/{MANIFEST}")
        parts["checkpoints"] = {path.parent.name: read_json(path) for path in manifests}
        parts["evaluations"] = {name: content["metrics"] for name, content in read_evaluations(run_dir).items()}
        # Tensors, not files: safetensors writes metadata in no fixed order.
        parts["exports"] = {
            str(path.relative_to(run_dir)): hash_weights(read_weights(path)).hexdigest()
            for path in (run_dir / "export").rglob("*.safetensors")
        }
        both.append(parts)
    ours, theirs = both
    return [part for part in ours if not ours[part] or ours[part] != theirs[part]]


def test_a_run_under_kills_equals_the_one_in_peace(tmp_path: Path) -> None:
    # By default a seed whose kills come early: the launcher at the start, a worker in a step, a rank in a save.
    count, seed = int(os.environ.get("KILLS", "3")), int(os.environ.get("SEED", "7120"))
    flags = ["--recipe", "s16", "--debug", "--samples", str(SAMPLES // 3), *small_data(tmp_path / "data")]
    # Each step has a line of its own: a stop between two lines, as a lost launcher's, would write one more.
    flags += ["--output", str(tmp_path), "--set", "train.precision=fp32", f"train.checkpoint_every={SAVE_EVERY}"]
    flags += ["train.log_every=1", f"train.eval_every={EVAL_EVERY}"]
    flags += ["train.accumulation=2", "train.contrastive=global", "--name"]
    peaceful, killed = tmp_path / "in-peace", tmp_path / "killed"
    assert list(train_under([], peaceful, [*flags, peaceful.name], seed)) == []
    kills = kills_for(SAMPLES, count, seed)
    done = list(train_under(kills, killed, [*flags, killed.name], seed))
    print(*done, sep="\n")
    assert compare(peaceful, killed) == []
    assert len(done) == count, "some kills found no moment: give more SAMPLES"

    metrics = killed / METRICS
    whole = metrics.read_text()
    metrics.write_text(whole.replace('"loss": ', '"loss": 9', 1))
    assert compare(peaceful, killed) == ["train"]
    metrics.write_text(whole)
    shutil.rmtree(killed / "export")
    assert compare(peaceful, killed) == ["exports"]
