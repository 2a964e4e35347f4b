"""Python processes that need no imports: a parent that has imported everything forks them.

Importing torch, DeepSpeed and transformers takes 6 s of a processor, and the tests start several hundred processes.
With `subprocess.Popen = warm.Popen` (tests/conftest.py) each `python script.py …`, torchrun and `deepspeed` is a fork
of one process that only imported. The fork has its own arguments, environment, directory, streams, session and signals.
The processes that it starts are forked as well; torchrun and `deepspeed` fork themselves, so that their ranks are their
children. Five things differ: all other forks are children of the forking process, all share one seed of `hash`, a fork
computes in one thread, ends without taking its interpreter down, and its charts are one empty pixel, for drawing would
take four fifths of a tiny run. Mark a test `draws` if the last one matters to it.
CLIPS_TESTS_COLD=1 makes all tests cold.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
ADDRESS = "CLIPS_TESTS_WARM"
"""Environment variable: the socket of the forking process."""
AS_PYTHON = "python"
COLD = "CLIPS_TESTS_COLD"
DRAWS = "CLIPS_TESTS_DRAW"
READ_BY_IMPORTS = ("HF_", "TRANSFORMERS_", "OMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_", "PYTHON")
"""Prefixes of variables that act while a process starts. A command that changes such a variable starts cold."""
NOT_READ = ("PYTHONPATH", "PYTHON", "OMP_NUM_THREADS")
"""Of these a fork sets `sys.path`, the scripts for a shell start `$PYTHON`, and every fork computes in one thread."""
PROGRAMS = ("deepspeed", "torchrun")
MODULES = (
    *("clips.common.launch", "torch.distributed.run"),
    *("deepspeed.launcher.runner", "deepspeed.launcher.launch"),
)
SPACE = 1 << 15
"""Bytes for the arguments, and for the environment, that /proc shows of a forked process."""
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
MORE = (
    *("deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run", "torch._dynamo"),
    *("torch.utils.tensorboard", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "sklearn.linear_model"),
    *("scipy.optimize", "scipy.stats", "transformers.models.llama.modeling_llama", "open_clip"),
    *("fsspec.implementations.http", "transformers.models.vit.image_processing_vit", "torch.profiler"),
    *("transformers.models.llava.modeling_llava", "transformers.models.clip.modeling_clip", "transformers.trainer"),
    *("transformers.models.vit.modeling_vit", "transformers.models.siglip.modeling_siglip", "peft", "accelerate"),
)
"""What the commands import late."""


# ---------------------------------------------------------------------------------------------- who asks


def script_of(command: Any) -> list[str] | None:
    """The words after `python` of a command that can be forked: a script or `-m module`, then its arguments."""
    if not isinstance(command, list | tuple) or not command:
        return None
    program, *words = [os.fspath(word) for word in command]
    if Path(program).parent == Path(sys.executable).parent and Path(program).name in PROGRAMS:
        return [program, *words]
    if program != sys.executable:
        return None
    words = words[1:] if words[:1] == ["-u"] else words
    is_script = bool(words) and not words[0].startswith("-")
    is_module = words[:1] == ["-m"] and words[1] in MODULES
    return words if is_script or is_module else None


def acts_at_the_start(env: dict[str, str]) -> dict[str, str]:
    return {name: env[name] for name in env if name.startswith(READ_BY_IMPORTS) and name not in NOT_READ}


class Popen(subprocess.Popen):
    """`subprocess.Popen`, forked where it can be."""

    connection: socket.socket | None = None
    forks_itself = False
    """In torchrun and `deepspeed`, which then have their ranks as children, as in a cold start."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, *rest: Any) -> None:  # fmt: skip
        *_, start_new_session = rest[:6]
        wanted = {str(k): str(v) for k, v in (os.environ if env is None else env).items()}
        words = None if executable or preexec_fn or shell else script_of(args)
        is_cold = not words or COLD in wanted or COLD in os.environ or not os.path.isdir(cwd or ".")
        address = None if is_cold else address_of(wanted)
        if address is None:
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest,
            )  # fmt: skip
        request = {
            "words": words,
            "env": wanted | {name: os.environ[name] for name in (ADDRESS, DRAWS) if name in os.environ},
            "cwd": os.fspath(cwd or os.getcwd()),
            "session": bool(start_new_session),
            "group": os.getpgrp(),
        }
        streams = [own if own != -1 else default for default, own in enumerate((p2cread, c2pwrite, errwrite))]
        if self.forks_itself:
            self.pid = os.fork()
            if not self.pid:
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                nothing = os.open(os.devnull, os.O_RDWR)
                for other in map(int, os.listdir("/proc/self/fd")):
                    if other > 2 and other != nothing:  # kept, for objects of the launcher still close their numbers
                        with contextlib.suppress(OSError):
                            os.fstat(other)
                            os.dup2(nothing, other, inheritable=False)
                live(request | {"streams": []})
        else:
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(address)
            data = json.dumps(request).encode()
            socket.send_fds(self.connection, [len(data).to_bytes(4, "big")], [*streams, *pass_fds])
            self.connection.sendall(data)
            self.pid = int.from_bytes(self.connection.recv(4, socket.MSG_WAITALL), "big")
            UNFINISHED.add(self)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        return None

    def _status(self, flags: int) -> int | None:
        """How it ended, as of `os.waitpid`; None while it runs."""
        try:
            answer = self.connection.recv(4, flags | socket.MSG_WAITALL)
        except BlockingIOError:
            return None
        self.connection.close()
        UNFINISHED.discard(self)
        return int.from_bytes(answer, "big") if answer else int(signal.SIGKILL)

    def _internal_poll(self, _deadstate: int | None = None, **names: Any) -> int | None:
        if self.connection is None:
            return super()._internal_poll(_deadstate, **names)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None and (status := self._status(socket.MSG_DONTWAIT)) is not None:
                    self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self.connection is None:
            return super()._try_wait(wait_flags)
        status = self._status(socket.MSG_DONTWAIT if wait_flags else 0)
        return (0, 0) if status is None else (self.pid, status)


UNFINISHED: set[Popen] = set()
"""Kept, for the forking process ends what nobody waits for any more."""


def program(folder: Path) -> Path:
    """Write a program for shell scripts that takes the place of python."""
    path = folder / "warm-python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {AS_PYTHON} "$@"\n')
    path.chmod(0o755)
    return path


def address_of(env: dict[str, str]) -> str | None:
    """The forking process's socket; None if the environment needs a cold start."""
    name, at_its_start = start().split("\n", 1)
    return f"\0{name}" if json.loads(at_its_start) == acts_at_the_start(env) else None


@functools.cache
def start() -> str:
    """Start the forking process if none serves yet; returns its name and what acted at its start.

    The forking process ends with this process.
    """
    if ADDRESS in os.environ:
        return os.environ[ADDRESS]
    name = f"clips-tests-{os.getpid()}-{os.urandom(4).hex()}"
    address = f"{name}\n{json.dumps(acts_at_the_start(dict(os.environ)))}"
    env = os.environ | {ADDRESS: address, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "SPACE": " " * SPACE}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(64)
        os.environ[ADDRESS] = address  # not before: another thread would connect to nothing
        command = [sys.executable, __file__, str(listener.fileno()), " " * SPACE]
        cold = {"executable": sys.executable}  # named, so that `Popen` does not look for a process to fork it
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env, pass_fds=[listener.fileno()], **cold)
    atexit.register(process.stdin.close)
    return address


# ---------------------------------------------------------------------------------------------- who forks


def import_everything() -> None:
    from clips.common.runtime import import_deepspeed

    import_deepspeed()
    for package in ("clips", "mllm"):
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}."):
            with contextlib.suppress(ImportError):  # of a package that only some commands need
                importlib.import_module(module.name)
    for name in MORE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError, AttributeError):  # transformers builds it at the first model that it loads
        importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("vit")
    with contextlib.suppress(ImportError):  # torchrun looks through the files of all modules for a name of its log
        rendezvous = importlib.import_module("torch.distributed.elastic.rendezvous.dynamic_rendezvous")
        rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    gc.collect()
    gc.freeze()  # else the first collection of each fork would copy all pages


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request until standard input ends. Returns in each fork, with the request."""
    waking, woken = socket.socketpair()
    for end in (waking, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(woken.fileno())
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        for source in (listener, waking, sys.stdin):
            ready.register(source, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj is sys.stdin:
                    sys.exit()
                elif key.fileobj is waking:
                    waking.recv(4096)
                    report_ended(children, ready)
                elif key.fileobj is listener:
                    connection, _ = listener.accept()
                    head, streams, _, _ = socket.recv_fds(connection, 4, 8)
                    request = json.loads(connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL))
                    pid = os.fork()
                    if not pid:
                        signal.set_wakeup_fd(-1)
                        for other in (waking, woken, listener, connection, *children.values()):
                            other.close()
                        return request | {"streams": streams}
                    for stream in streams:
                        os.close(stream)
                    children[pid] = connection
                    if len(streams) == 3:  # else a lock was passed on to it, to hold when the process that asks is gone
                        ready.register(connection, selectors.EVENT_READ, pid)
                    with contextlib.suppress(OSError):  # the process that asked is gone already
                        connection.send(pid.to_bytes(4, "big"))
                elif key.data in children:  # the process that asked is gone
                    ready.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)


def report_ended(children: dict[int, socket.socket], ready: selectors.BaseSelector) -> None:
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            connection = children.pop(pid)
            with contextlib.suppress(KeyError):
                ready.unregister(connection)
            with contextlib.suppress(OSError):  # the process that asked is gone
                connection.send(status.to_bytes(4, "big"))
            connection.close()


def become(asked: dict[str, Any]) -> None:
    """Streams, session, directory, environment and arguments of this process are those of a fresh one."""
    own = asked["streams"][:3]  # further ones were passed on: they stay open, under numbers of their own
    for number, stream in enumerate(own):
        os.dup2(stream, number)
    for stream in own:
        if stream > 2:
            os.close(stream)
    for name, number, buffering in (("stdout", 1, -1), ("stderr", 2, 1)):  # the old ones may take a pipe for a file
        old = getattr(sys, name)
        new = open(number, "w", buffering, old.encoding, old.errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, new)
    if asked["session"]:
        os.setsid()
    else:
        with contextlib.suppress(OSError):  # of another session
            os.setpgid(0, asked["group"])
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    Popen.forks_itself = asked["words"][0] == "-m" or Path(asked["words"][0]).name in PROGRAMS
    show([sys.executable, *asked["words"]], 48)
    show([f"{name}={value}" for name, value in asked["env"].items()], 50)
    first, *rest = asked["words"]
    sys.argv = rest if first == "-m" else [first, *rest]
    own = asked["cwd"] if first == "-m" else os.path.dirname(os.path.abspath(first))
    sys.path = [own, *filter(None, asked["env"].get("PYTHONPATH", "").split(":")), *sys.path]
    signals = sys.modules["clips.common.signals"]
    signals.LAUNCHERS = signals.launchers()
    if DRAWS not in os.environ:
        draw_nothing()


def draw_nothing() -> None:
    """Replace each chart of a report by one pixel."""
    from clips.common import page

    page.png = lambda *_, **__: PIXEL
    for name in ("clips.common.report", "mllm.training.finish"):
        module = sys.modules[name]
        for plot in [it for it in vars(module) if it.endswith("_plot") and it != "save_plot"]:
            setattr(module, plot, lambda *_, **__: None)


def show(words: list[str], field: int) -> None:
    """Let /proc/PID/cmdline (`field` 48 of proc(5)) or /proc/PID/environ (50) hold `words`."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    begin, end = (int(fields[number - 3]) for number in (field, field + 1))
    text = ("\0".join(words) + "\0").encode(errors="surrogateescape")[: end - begin - 1]
    ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)


def main() -> None:
    if sys.argv[1] == AS_PYTHON:
        process = Popen([sys.executable, *sys.argv[2:]])
        for passed_on in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            signal.signal(passed_on, lambda number, _: process.send_signal(number))
        code = process.wait()
        sys.exit(code if code >= 0 else 128 - code)
    listener = socket.socket(fileno=int(sys.argv[1]))
    sys.path = [path for path in sys.path if path not in (str(ROOT), str(Path(__file__).parent))]
    sys.path.insert(0, str(ROOT))
    subprocess.Popen = Popen  # before anything binds the name
    import_everything()
    sys.path.remove(str(ROOT))
    live(serve(listener))


def live(asked: dict[str, Any]) -> NoReturn:
    """From here on be the process that is asked for."""
    become(asked)
    code = 0
    try:
        run(asked["words"][0])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and end.code is not code:
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    end_here(code)


def run(first: str) -> None:
    if first == "-m":
        sys.modules.pop(sys.argv[0], None)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        return
    module = types.ModuleType("__main__")
    module.__file__ = first
    sys.modules["__main__"] = module
    exec(compile(Path(first).read_bytes(), first, "exec"), module.__dict__)


def end_here(code: int) -> NoReturn:
    """End as an interpreter does, but for taking its modules down, which would copy the pages of all imports."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    sys.modules["warm"] = sys.modules["__main__"]
    main()
