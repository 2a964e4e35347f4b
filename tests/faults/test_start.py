"""Row 32: one rank has found something else than the others: all ranks end with the fact, or go on with rank 0's.

Two ranks without a launcher above them, which would end one rank when the other fails. Each fact is of rank 1, or of
rank 0 where its value is to count for both.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny_llava
from conftest import ROOT
from launched import ENV, lines
from tiny_llava import ALIGN, INSTRUCT, START

from clips.common.runtime import unused_port

place = tiny_llava.place  # a fixture
pytestmark = pytest.mark.slow

SECONDS = 60
WORKER = str(ROOT / "tests" / "odd_rank.py")
FIRST = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


def two_ranks(
    cwd: Path, facts: tuple[str, str], *words: str, env: tuple[dict[str, str], dict[str, str]] = ({}, {}),
    own: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
) -> list[tuple[int, str]]:  # fmt: skip
    """(exit code, output) of each of two ranks of one run, which `SECONDS` are enough for. `own`: words of each."""
    meeting = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    ranks = []
    try:
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), **env[rank]}
            ranks.append(subprocess.Popen(
                [sys.executable, WORKER, facts[rank], *words, *own[rank]], cwd=cwd, env=ENV | meeting | place,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            ))  # fmt: skip
        outputs = ["", ""]
        for rank in sorted(range(2), key=lambda rank: facts[rank].startswith("SIGSTOP")):
            ranks[rank].send_signal(signal.SIGCONT)  # a rank that is stopped goes on once the other has ended
            outputs[rank] = ranks[rank].communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        for process in ranks:
            process.send_signal(signal.SIGABRT)
        pytest.fail("\n".join(process.communicate()[0] for process in ranks))
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


def refused_alone(env: dict[str, str], *words: str) -> str:
    """What one rank with these variables, and no other, says when it refuses to begin."""
    command = [sys.executable, WORKER, "nothing", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=ENV | env, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 2, done.stderr
    return done.stderr


def assert_ended(ranks: list[tuple[int, str]], *words: str) -> None:
    """Every rank ends with code 2, one error and these words in it."""
    for code, output in ranks:
        assert code == 2, output
        assert output.count("error: ") == 1, output
        assert "Traceback" not in output
        for word in words:
            assert word in output.partition("error: ")[2], output


def assert_done(ranks: list[tuple[int, str]]) -> None:
    for code, output in ranks:
        assert code == 0, output


def pretraining(out: Path, shards: tuple[str, ...], *flags: str) -> tuple[str, ...]:
    return ("pretrain", "--debug", "--name", "r", "--output", str(out), *shards, *flags)


@pytest.fixture(scope="module")
def trained(shards: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT/r is a finished run of two ranks."""
    out = tmp_path_factory.mktemp("trained")
    assert_done(two_ranks(ROOT, ("nothing", "nothing"), *pretraining(out, shards)))
    return out


FAILURES = ("device", "group", "run directory", "data", "tokenizer", "model", "engine", "lock")


@pytest.mark.parametrize(("odd", "part"), [(i % 2, part) for i, part in enumerate(FAILURES)])
def test_row_32_an_error_of_one_rank_ends_both(part: str, odd: int, shards: tuple[str, ...], tmp_path: Path) -> None:
    facts = facts_of(f"fails at the {part}", 0 if part in ("data", "lock") else odd)  # which rank 0 opens and holds
    assert_ended(two_ranks(ROOT, facts, *pretraining(tmp_path, shards)), "this rank alone fails")


@pytest.mark.parametrize(
    ("fact", "words"),
    [
        ("a version", ("ranks do not agree on accelerate", "rank 1: 1.0", "torch", "rank 1: 9.9")),
        ("fewer samples", ("the training data", "rank 0: 64 samples", "rank 1: 63 samples")),
    ],
)
def test_row_32_a_fact_that_must_be_equal_is_named_with_both_values(fact, words, shards, tmp_path):
    ranks = two_ranks(ROOT, ("nothing", fact), *pretraining(tmp_path, shards))
    assert_ended(ranks, *words)
    assert not lines(tmp_path / "r")


def test_another_checkpoint_is_named(trained: Path, shards: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(trained / "r", tmp_path / "r")
    ranks = two_ranks(ROOT, ("nothing", "no checkpoint"), *pretraining(tmp_path, shards))
    assert_ended(ranks, "the checkpoint to go on from", "rank 0: step-", "rank 1: none")


def test_another_variable_of_the_environment_is_named(shards: tuple[str, ...], tmp_path: Path) -> None:
    env = ({}, {"ATEN_CPU_CAPABILITY": "default"})
    ranks = two_ranks(ROOT, ("nothing", "nothing"), *pretraining(tmp_path, shards), env=env)
    assert_ended(ranks, "ATEN_CPU_CAPABILITY", "rank 1: default")


@pytest.mark.parametrize("facts", [("bf16 here", "nothing"), ("nothing", "no config.json"), ("nothing", "finished")])
def test_a_fact_of_one_rank_does_not_part_them(facts: tuple[str, str], shards: tuple[str, ...], tmp_path: Path) -> None:
    """A precision that one of them lacks, a listing that is late, a run that seems finished to rank 1 alone."""
    assert_done(two_ranks(ROOT, facts, *pretraining(tmp_path, shards)))
    assert lines(tmp_path / "r")


def test_rank_0_says_whether_the_run_is_finished(trained: Path, shards: tuple[str, ...]) -> None:
    before = lines(trained / "r")
    assert_done(two_ranks(ROOT, ("finished", "no config.json"), *pretraining(trained, shards)))
    assert lines(trained / "r") == before


@pytest.mark.parametrize(("left_over", "word"), [({"RANK": "0"}, "WORLD_SIZE"), ({"WORLD_SIZE": "2"}, "RANK")])
def test_variables_of_a_launcher_that_is_gone_are_named(left_over, word, shards, tmp_path):
    text = refused_alone(left_over, *pretraining(tmp_path, shards))
    assert f"no {word}" in text or f", {word}" in text


def test_a_port_that_is_taken_is_one_sentence(shards: tuple[str, ...], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        env = FIRST | {"MASTER_PORT": str(taken.getsockname()[1])}
        assert "--master_port" in refused_alone(env, *pretraining(tmp_path, shards))


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "zero"), ("RANK", "2"), ("WORLD_SIZE", "0"), ("MASTER_PORT", "abc")]
)
def test_variables_of_a_launcher_that_are_wrong_are_named(name: str, value: str) -> None:
    assert f"{name}={value}" in refused_alone(FIRST | {"MASTER_PORT": "29500"} | {name: value}, "start")


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(minutes: str) -> None:
    text = refused_alone({}, "pretrain", "--timeout-minutes", minutes)
    assert f"--timeout-minutes {minutes}: " in text or f"--timeout-minutes: {minutes} must be a finite number" in text


PARTS = ("the beginning", "the connection", "the comparison", "the group", "the collective", "the work")
HOW = ("SIGKILL", "SIGSTOP", "SIGINT", "os._exit")
TRAININGS = (("the engine", "SIGKILL", 1), ("the data", "SIGSTOP", 0))
Ranks = list[tuple[int, str]]


@pytest.fixture(scope="module")
def lost(shards, tmp_path_factory):
    """(part, how, rank that is lost there) → what two ranks end with. Most of the time all of them only wait."""
    cases = {(part, how, odd): ("start",) for part in PARTS for how in HOW for odd in (0, 1)}
    for case in TRAININGS:
        cases[case] = pretraining(tmp_path_factory.mktemp("lost"), shards, "--timeout-minutes", "0.1")
    with ThreadPoolExecutor(16) as pool:
        yield {
            (part, how, odd): pool.submit(two_ranks, ROOT, facts_of(f"{how} at {part}", odd), *words)
            for (part, how, odd), words in cases.items()
        }


def facts_of(fact: str, odd: int) -> tuple[str, str]:
    return (fact, "nothing") if odd == 0 else ("nothing", fact)


def test_a_rank_alone_ends_with_its_sentence_and_no_frames_of_c_plus_plus(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts/pretrain_clips.py", "--debug", "--device", "cpu", "--name", "r"]
    env = ENV | FIRST | {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": str(unused_port())}
    words = ["--output", str(tmp_path), "--timeout-minutes", "0.05"]
    done = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "error: rank 0 of 2 has not begun" in done.stderr
    assert "frame #" not in done.stderr


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("part", PARTS)
def test_row_32_a_rank_that_is_lost_in_the_start_ends_the_other_with_its_name(part, how, lost):
    for odd in (0, 1):
        ranks = lost[part, how, odd].result()
        assert_named(ranks, 1 - odd, code=130 if how == "SIGINT" and part not in PARTS[:2] else 1)
        if how == "SIGSTOP":  # it goes on when the other has ended
            assert_named(ranks, odd)
    if part == "the beginning":  # as where RANK and WORLD_SIZE are left over in the environment of a single process
        assert "has not begun (for one process unset RANK" in ranks[0][1].partition("error: rank 1 of 2 ")[2]


def test_a_rank_0_that_is_stopped_for_less_than_the_timeout_ends_nobody() -> None:
    """The requests of rank 1 to its store take longer than the store's own time limit."""
    assert_done(two_ranks(ROOT, ("nothing", "nothing"), "pause"))


def test_rank_0_leaves_the_start_after_the_others_have_read_its_last_decision() -> None:
    assert_done(two_ranks(ROOT, ("nothing", "nothing"), "leave"))


@pytest.mark.parametrize("case", TRAININGS)
def test_row_32_a_rank_that_is_lost_before_a_training_is_named(case, lost):
    assert_named(lost[case].result(), 1 - case[2])


def assert_named(ranks: Ranks, rank: int, code: int = 1) -> None:
    """`rank` ends with one error that names the other."""
    assert ranks[rank][0] == code, ranks[rank][1]
    assert ranks[rank][1].count("error: ") == 1, ranks[rank][1]
    assert f"rank {1 - rank} " in ranks[rank][1].partition("error: ")[2], ranks[rank][1]
    assert "Traceback" not in ranks[rank][1]


STAGES = {
    1: ("llava", *ALIGN, "--mm_projector_init", "captions", "--max_steps", "2"),
    2: ("llava", *INSTRUCT, *START, "--max_steps", "2"),
}
OF_BOTH = ("device", "flags", "parts", "features", "trainer")
ODD = [(1 + i % 2, f"fails at the {part}", ["this rank alone fails"]) for i, part in enumerate(OF_BOTH)]
ODD += [(1, "fails at the projector's start", ["this rank alone fails"])]
ODD += [(stage, "fewer conversations", ["the training data", "rank 1: 7 samples"]) for stage in STAGES]
ODD += [(stage, "a version", ["ranks do not agree on", "rank 1: 9.9"]) for stage in STAGES]


@pytest.mark.parametrize(("stage", "fact", "words"), ODD)
def test_an_error_or_another_fact_of_one_rank_ends_a_stage_of_both(stage, fact, words, place, tmp_path):
    flags = ("--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache"))
    assert_ended(two_ranks(place, ("nothing", fact), *STAGES[stage], *flags), *words)


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_of_rank_0_at_the_end_ends_both_in_words(stage: int, place: Path) -> None:
    ranks = two_ranks(
        place, ("a full disk at the end", "nothing"), *STAGES[stage], "--output_dir", f"runs/{stage}-full"
    )
    for (code, output), words in zip(ranks, ("the results cannot be written", "sign of life from rank 0"), strict=True):
        assert code == 1, output
        assert words in output.partition("error: ")[2], output
        assert "Traceback" not in output


@pytest.mark.parametrize("stage", STAGES)
def test_flags_of_one_rank_are_named(stage: int, place: Path) -> None:
    """Its --seed, which the others do not have."""
    flags = ("--output_dir", f"runs/{stage}-flags")
    seeds = (("--seed", "0"), ("--seed", "1"))
    ranks = two_ranks(place, ("nothing", "nothing"), *STAGES[stage], *flags, own=seeds)
    assert_ended(ranks, "flags.seed", "rank 0: 0", "rank 1: 1")


@pytest.mark.parametrize("stage", STAGES)
def test_rank_0_decides_what_is_finished_and_each_rank_fills_its_own_cache(stage: int, place: Path) -> None:
    """Rank 1 has another folder of features; later it does not see that the stage is done."""
    flags = ("--output_dir", f"runs/{stage}-done")
    caches = ({}, {"CLIPS_MLLM_CACHE": str(place / f"cache-of-1-{stage}")})
    words = [word for word in STAGES[stage] if word not in ("--cache_dir", "cache")]
    assert_done(two_ranks(place, ("nothing", "nothing"), *words, *flags, env=caches))
    name = "align" if stage == 1 else "instruct"
    before = (place / flags[1] / name / "done.json").read_bytes()
    assert_done(two_ranks(place, ("nothing", "no done.json"), *words, *flags, env=caches))
    assert (place / flags[1] / name / "done.json").read_bytes() == before
