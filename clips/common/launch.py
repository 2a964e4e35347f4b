"""Start the ranks of a command on this machine: torchrun, whose own flags it takes, with the exit code of the ranks.

    python -m clips.common.launch --standalone --nproc-per-node 2 scripts/train_llava.py --stage 1

torchrun itself ends with exit code 1 and a traceback of its own whatever a rank ended with, and kills ranks that are
still saving 30 seconds after a signal.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

from clips.common.errors import UserError
from clips.common.signals import STOP_SIGNALS

COUNT = "import torch; print(torch.cuda.device_count())"


def launcher(ranks: int) -> list[str]:
    """Return the words between interpreter and script that start `ranks` processes: none for one process."""
    return ["-m", "clips.common.launch", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []


def count_ranks(wanted: int | None, device: str, name: str) -> int:
    """Return the number of processes that train: `wanted`, or by default one for each GPU that torch sees.

    Raises UserError if there are GPUs, but fewer than `wanted`; `name` is what its message calls that number.
    """
    gpus = 0 if device == "cpu" or wanted == 1 else count_gpus()
    if gpus and wanted and wanted > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
        raise UserError(f"{name} {wanted}: torch sees {gpus} GPU(s) here{shown}; give at most as many")
    return wanted or gpus or 1


def count_gpus() -> int:
    """Return the number of GPUs visible to torch, which depends on CUDA_VISIBLE_DEVICES and MIG.

    A subprocess counts them, so that CUDA is not initialised in this process. Raises UserError if it fails.
    """
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout.strip().isdecimal():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"torch cannot count the GPUs: {last}. Check driver and torch, or give --device cpu")
    return int(done.stdout)


def main() -> int:
    """Run torchrun with the flags of the command line, and return the exit code of the rank that failed first."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # its lines about ranks that have ended, after the ranks' own
    arguments = torchrun.parse_args(sys.argv[1:])
    if arguments.standalone:
        arguments.local_addr = arguments.local_addr or "localhost"  # a machine's name need not lead to its address
    if arguments.nproc_per_node.isdecimal():  # else torchrun sets one thread for each rank
        threads = (os.cpu_count() or 1) // int(arguments.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

    # torchrun's own handlers would kill the ranks after a while, and forget what they ended with.
    arguments.signals_to_handle = "SIGQUIT"
    came = pass_signals_on()
    try:
        torchrun.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0 and not came:
            print(f"\nerror: rank {rank} was ended by {failure.signal_name()}", file=sys.stderr, flush=True)
        return shell_code(failure.exitcode)
    return 0


def pass_signals_on(but: int = 0) -> list[int]:
    """Handle stop signals from now on: pass them on to this process's children, or end if there are none.

    Returns the list of the signals that came. `but` is one that these processes get anyway.
    """
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.Error):  # it has just ended
                if number != but:
                    child.send_signal(number)
        if not children:
            sys.exit(128 + number)

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, pass_on)
    return came


def shell_code(code: int) -> int:
    """Return the exit code that a shell reports for a process: 128 + N after signal N."""
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
