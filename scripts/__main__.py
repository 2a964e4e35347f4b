#!/usr/bin/env python
"""One command for all scripts: `clips COMMAND FLAGS` runs the script of that command, with the same flags."""

import difflib
import os
import runpy
import sys

from clips.common import flags
from clips.common.errors import UserError, run_command
from clips.common.paths import SCRIPTS

QUOTES = '"# '
COMMANDS = {
    "train": "pretrain_clips.py",
    "llava": "train_llava.sh",
    "chat": "chat.py",
    "serve": "serve.py",
    "eval": "evaluate_clips.py",
    "eval-llava": "evaluate_llava.py",
    "search": "search.py",
    "export": "export_clips.py",
    "convert": "convert.py",
    "push": "push_to_hub.py",
    "demo": "build_demo_data.py",
    "check": "check_data.py",
    "index": "index_data.py",
    "recaption": "recaption.py",
    "plan": "plan_run.py",
    "compare": "compare_encoders.py",
    "compare-pretraining": "compare_pretraining.py",
}


def usage() -> str:
    """Each command with the first line of its script."""
    lines = ["usage: clips COMMAND [flags]      (clips COMMAND --help lists them; NUM_GPUS=N trains on N GPUs)", ""]
    for name, script in COMMANDS.items():
        first = (SCRIPTS / script).read_text(encoding="utf-8").splitlines()[1]
        lines.append(f"  {name:21}{first.strip(QUOTES)}")
    return "\n".join(lines)


def run() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        close = difflib.get_close_matches(name.lower(), COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "clips --help lists the commands"
        raise UserError(f"{name!r} is no command: {hint}")
    script = str(SCRIPTS / COMMANDS[name])
    gpus = os.environ.get("NUM_GPUS", "1")
    if script.endswith(".sh"):
        os.execvpe("bash", ["bash", script, *words], {"PYTHON": sys.executable, **os.environ})
    if name == "train" and gpus != "1":
        from clips.common.runtime import unused_port

        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", gpus]
        launcher += ["--master_port", str(unused_port())]  # deepspeed's own may be taken
        os.execv(sys.executable, [*launcher, script, *words])
    flags.COMMAND = f"clips {name}"
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """The entry point `clips` of pyproject.toml."""
    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
