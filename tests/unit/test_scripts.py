"""What every script keeps to: flags, output, what is the newest; launchers; the installer."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT, run_group, script_parser
from launched import started, wait_for

from clips.common.files import write_json
from clips.common.flags import Parser, add_options, at_least, from_flags, given, option, share
from clips.common.launch import launcher
from clips.recipes import debug_twin, recipe
from clips.weights.load import _newest_run, newest_export
from mllm.training.config import flags_of_stage
from mllm.training.config import parser as train_parser

PYTHON_SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
HEAVY = {"torch", "transformers", "deepspeed", "open_clip", "numpy", "PIL", "gradio", "fastapi", "matplotlib"}
HELP = f"""
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
    assert not {HEAVY} & sys.modules.keys(), script
"""


def test_help_imports_nothing_heavy() -> None:
    """`--help`, and so a wrong flag, answers without importing what takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", HELP, *PYTHON_SCRIPTS],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("usage:") == len(PYTHON_SCRIPTS)


def test_no_file_names_a_machine_or_a_registry() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    machine = r"(?<![\w.}])/(?:home|Users)/\w+/|(?<![\w.}])/root/\.|(?<![\w.}])/work/|/opt/wheels"
    registry = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url|:\d+/simple\b"
    names = []
    for name in listing.splitlines():
        path = ROOT / name
        if path != Path(__file__) and path.is_file():
            text = path.read_text(errors="replace")
            names += [f"{name}: {match.group()}" for match in re.finditer(f"{machine}|{registry}", text)]
    assert not names


def sourced(command: str, path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a function of install.sh with the programs of `path` before others."""
    text = f'set -euo pipefail; . "{ROOT}/scripts/install.sh"; {command}'
    whole = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "PIP_NO_INDEX": "1"} | env
    return subprocess.run(["bash", "-c", text], env=whole, cwd="/", capture_output=True, text=True, timeout=120)


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_install_names_what_a_machine_lacks(tmp_path: Path) -> None:
    old = program(tmp_path / "bin" / "python3", "exit 1")
    done = sourced("install demo", old.parent, VENV=str(tmp_path / "venv"), PYTHON=str(old))
    assert (done.returncode, "PYTHON=EXE" in done.stderr) == (2, True), done.stderr
    done = sourced("install demo", old.parent, VENV=str(old.parent), PYTHON=sys.executable)
    assert (done.returncode, "VENV=DIR" in done.stderr) == (2, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize(
    ("body", "code"),
    [("echo '| CUDA Version: 13.0 |'", 0), ("echo '| CUDA Version: 12.4 |'", 2), ("echo mismatch; exit 9", 2)],
)
def test_a_driver_that_pips_torch_does_not_fit_needs_an_index(tmp_path: Path, body: str, code: int) -> None:
    program(tmp_path / "nvidia-smi", body)
    done = sourced("install_torch", tmp_path, TORCH_INDEX="")
    assert done.returncode == code, done.stderr
    assert code == 0 or "TORCH_INDEX" in done.stderr


def test_the_quickstart_runs_under_a_path_with_a_space(tmp_path: Path) -> None:
    """pip wrote the path into the first line of deepspeed, and the kernel took what is before the space."""
    place = tmp_path / "my venv"
    script = f'echo "$@" >>"{tmp_path}/calls"; if [[ "$2" == *device_count* ]]; then echo 0; fi'
    for name in ("python", "pip"):
        program(place / "bin" / name, script)
    env = os.environ | {"VENV": str(place), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        ["bash", ROOT / "scripts/quickstart.sh"], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[-1])[-4:-3] == ["&&"]
    calls = (tmp_path / "calls").read_text()
    assert "-m clips.common.launch --standalone --nproc-per-node 2 scripts/pretrain_clips" in calls
    subprocess.run([place / "bin" / "deepspeed", "a b"], check=True)
    assert (tmp_path / "calls").read_text().endswith("-m deepspeed.launcher.runner a b\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_the_quickstart_passes_signals_on_and_waits(number: int, code: int, tmp_path: Path) -> None:
    """The step went on as an orphan, and the same command was refused."""
    step = f"""echo "$@" >>"{tmp_path}/calls"
if [[ "$*" == *device_count* ]]; then echo 0; fi
if [[ "$*" == *pretrain* ]]; then
  for name in TERM HUP INT; do trap "sleep 0.3; echo saved $name >>{tmp_path}/calls; exit {code}" $name; done
  while :; do touch {tmp_path}/ready; sleep 0.05; done
fi"""
    for name in ("python", "pip"):
        program(tmp_path / "bin" / name, step)
    command = ["bash", str(ROOT / "scripts/quickstart.sh")]
    env = {"VENV": str(tmp_path), "OMP_NUM_THREADS": "2"}
    with started(command, tmp_path / "log", env) as quickstart:
        wait_for((tmp_path / "ready").exists, quickstart, tmp_path / "log")
        quickstart.send_signal(number)
        assert quickstart.wait(20) == code
    calls = (tmp_path / "calls").read_text()
    assert calls.endswith(f"saved {signal.Signals(number).name[3:]}\n"), calls


TORCH = """
import os
class cuda:
    def device_count():
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        return 1 / 0 if visible == "broken" else len(visible.split(",")) if visible else 0
"""


@pytest.mark.parametrize(
    ("visible", "number", "words", "expected"),
    [
        ("2,3", "", "", 2),
        ("2,3", "2", "", 2),
        ("2,3", "1", "", 1),
        ("2,3", "3", "", "error: NUM_GPUS 3: torch sees 2 GPU(s) here with CUDA_VISIBLE_DEVICES=2,3; "),
        ("2,3", "3", "--device cpu", 3),
        ("MIG-GPU-5f/1/0,MIG-GPU-5f/2/0", "", "", 2),
        ("", "", "", 1),
        ("", "3", "", 3),
        ("", "0", "", "error: NUM_GPUS=0 must be a number of GPUs"),
        ("broken", "", "", "error: torch cannot count the GPUs: ZeroDivisionError: division by zero. "),
        ("broken", "", "--device cpu", 1),
    ],
)
def test_a_rank_for_each_gpu_that_torch_sees(visible, number, words, expected, tmp_path):
    """CUDA_VISIBLE_DEVICES was ignored, and nvidia-smi counted a line for each slice of MIG."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH)
    python = program(tmp_path / "python", f'if [ "$2" = --launch ]; then exec {sys.executable} "$@"; fi; echo "$@"')
    command = [
        "bash",
        ROOT / "scripts/train_llava.sh",
        "--vision",
        "random",
        "--stage",
        "1",
        "--batch_size",
        "12",
        *words.split(),
    ]
    env = {"PYTHON": str(python), "NUM_GPUS": number, "CUDA_VISIBLE_DEVICES": visible}
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    if isinstance(expected, str):
        assert (done.returncode, expected in done.stderr, done.stdout) == (2, True, ""), done.stderr
        return
    ranks = re.findall(r"-m clips.common.launch --standalone --nproc-per-node (\d+) \S+/train_llava.py", done.stdout)
    assert ranks == ([str(expected)] if expected > 1 else []), done.stderr
    assert "scripts/train_llava.py" in done.stdout


RANK = """
import os, signal, sys, time
rank, what = os.environ["RANK"], sys.argv[1]
print(f"rank {rank} sees {os.environ['CUDA_VISIBLE_DEVICES']}", flush=True)
if what == "fails" and rank == "1":
    sys.exit(4)
if what == "is killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what in dir(signal):
    number, ready = getattr(signal, what), __file__ + ".ready"
    signal.signal(number, lambda *_: (time.sleep(0.3), print("saved", flush=True), sys.exit(128 + number)))
    if rank == "0":
        open(ready, "w").close()
    while not os.path.exists(ready):
        time.sleep(0.01)
    if rank == "1":
        os.kill(os.getppid(), number)
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("what", "code"),
    [("ends", 0), ("fails", 4), ("is killed", 137), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)],
)
def test_ranks_see_the_variable_and_end_with_their_own_code(what: str, code: int, tmp_path: Path) -> None:
    """torchrun ends with 1 and a traceback, whatever its ranks ended with."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, *launcher(2), str(tmp_path / "rank.py"), what]
    done = run_group(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "MIG-a,MIG-b"}, timeout=60)
    assert done.returncode == code, done.stderr
    assert [f"rank {rank} sees MIG-a,MIG-b" in done.stdout for rank in (0, 1)] == [True, True]
    assert done.stdout.count("saved") == (2 if what.startswith("SIG") else 0)
    assert done.stderr.strip() == ("error: rank 1 was ended by SIGKILL" if what == "is killed" else "")


@dataclass(frozen=True)
class Sizes:
    batch_size: int = option(8, "samples of a step")
    limit: int | None = option(None, "only so many", "--at-most")
    kind: Literal["a", "b"] = option("a", "which kind")
    words: tuple[str, ...] = option(("x", "y"), "which words")
    cache: bool = option(True, "compute everything again")
    lora_enable: bool = option(False, "as LLaVA spells it", underscores=True)
    own: str = "not a flag"


def parser() -> Parser:
    p = Parser("A command.")
    p.add_argument("--model", help="which model (default: the newest)")
    p.add_argument("--count", type=at_least(4), help="how many (default: none)")
    p.add_argument("--rate", type=float, default=1.0, help="a float")
    p.add_argument("--part", type=share, default=1.0, help="a share")
    add_options(p, Sizes)
    return p


def test_the_fields_of_a_dataclass_are_flags() -> None:
    def read(*words: str) -> Sizes:
        return from_flags(Sizes, parser().parse_args(words))

    assert read() == Sizes()
    assert read("--batch-size", "2", "--at-most=3", "--kind", "b") == Sizes(2, 3, "b")
    assert read("--words", "p", "--words", "q", "r").words == ("p", "q", "r")
    assert read("--batch_size=2", "--no_cache", "--lora-enable") == Sizes(2, cache=False, lora_enable=True)
    assert read("--lora_enable", "False").lora_enable is False
    assert given(parser(), ["--batch-size", "8", "--at-most", "3"]) == {"batch_size", "limit"}


def test_every_command_has_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["claims", "--version"]):
        with pytest.raises(SystemExit) as stop:
            script_parser("compare_pretraining").parse_args(words)
        assert stop.value.code == 0
        assert re.fullmatch(r"clips-mllm \d+\.\d+.*\n", capsys.readouterr().out)
    assert train_parser().parse_args(["--version", "v1"]).version == "v1", "LLaVA's flag of this name"


def test_the_packages_say_that_they_have_types() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in ("clips", "mllm"))
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text()


def test_every_flag_of_train_llava_has_both_spellings() -> None:
    p = train_parser()
    for action in p._actions[1:]:
        for name in action.option_strings:
            value = [] if action.nargs in (0, "?") else [str(next(iter(action.choices or ()), 1))]
            for spelling in (name[2:].replace("_", "-"), name[2:].replace("-", "_")):
                for form in ([f"--{spelling}", *value], [f"--align.{spelling}", *value]):
                    flags = p.parse_args(flags_of_stage(form, "align"))
                    assert getattr(flags, action.dest) not in (None, False), form


@pytest.mark.parametrize(
    ("word", "hint"),
    {"--batches": "--batch-size", "--pretrained": "--model", "--zzz": "", "--count": "least 4"}.items(),
)
def test_a_flag_that_is_not_known_ends_with_2(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([word, "3"])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert word in text
    assert hint in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("--rate", "nan"), "--rate: nan must be a finite number"),
        (("--rate", "inf"), "--rate: inf must be a finite number"),
        (("--rate", "fast"), "--rate: invalid float value: 'fast'"),
        (("--part", "2"), "--part: 2 must be a share from 0 to 1"),
        (("--part", "nan"), "--part: nan must be"),
    ],
)
def test_a_number_that_is_none_ends_with_2(words: tuple[str, str], hint: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args([*words])
    assert hint in capsys.readouterr().err


@pytest.mark.slow
def test_the_package_brings_its_templates(tmp_path: Path) -> None:
    """As `pip install .` puts it somewhere without the repository."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("clips", "mllm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    installed = run_group([*map(str, pip), str(source)], timeout=300)
    assert installed.returncode == 0, installed.stderr
    templates = [path.relative_to(ROOT) for part in ("clips", "mllm") for path in (ROOT / part).rglob("templates/*")]
    assert templates
    assert [path for path in templates if not (target / path).is_file()] == []


PRINTS = """
import sys
from clips.common.errors import run_command
def main():
    for _ in range(100_000):
        print("a line of a table")
sys.exit(run_command(main))
"""


def test_a_reader_that_ends_early_is_no_traceback() -> None:
    """As in `| head -c 1`."""
    command = subprocess.Popen(
        [sys.executable, "-c", PRINTS], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with command:
        command.stdout.read(1)
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait(60) in (0, 128 + signal.SIGPIPE)


def test_a_debug_run_is_never_the_newest_encoder(tmp_path: Path) -> None:
    """Its configuration says so; the name says nothing."""
    for name, run, time in (("my-debug", recipe("demo"), 1), ("twin", debug_twin(recipe("demo")), 2)):
        (tmp_path / name / "export" / "hf_vit").mkdir(parents=True)
        run.save(tmp_path / name / "config.json")
        for file in ("LATEST", "export/hf_vit/config.json"):
            write_json(tmp_path / name / file, {})
            os.utime(tmp_path / name / file, (time, time))
    assert _newest_run(tmp_path) == tmp_path / "my-debug"
    assert newest_export(tmp_path, "clips") == tmp_path / "my-debug" / "export"
