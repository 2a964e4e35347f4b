"""What a rank outlives, and what it stops for."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from clips.common.signals import STOP_SIGNALS, StopSignal, stopped_by


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_gives_the_exit_code(number: signal.Signals) -> None:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    stop = StopSignal()
    try:
        assert stop.requested == 0
        os.kill(os.getpid(), number)
        assert stop.requested == number
        assert stopped_by(stop.requested).exit_code == 128 + number
    finally:
        stop.restore()
    assert signal.getsignal(number) == stop.before[number]


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == 0
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_was_killed_before_its_rank_began_is_missed() -> None:
    """`deepspeed` ends at once; its own launcher, which init adopts, then starts the rank."""
    rank = "from clips.common.signals import LAUNCHERS, has_lost; print(has_lost(LAUNCHERS))"
    launcher = 'while [ "$(ps -o ppid= $$)" -eq "$3" ]; do sleep 0.01; done; "$0" -c "$1"; exit'
    words = [launcher, sys.executable, rank, "deepspeed.launcher.launch"]
    env = os.environ | {"CROSS_SIZE": "1", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", 'bash -c "$@" $$ &', "deepspeed", *words]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_run_goes_on_when_nobody_reads_its_output() -> None:
    code = (
        "import sys; from clips.common.signals import StopSignal; stop = StopSignal()\n"
        "print('ready', flush=True); input(); stop.requested\n"
        "print('a step', file=sys.stderr, flush=True); sys.exit(7)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.communicate("\n")
    assert process.returncode == 7
