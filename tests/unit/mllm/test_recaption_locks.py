"""Locks on shards: one owner at a time, and free as soon as their process is dead."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from clips.common.errors import UserError
from mllm.recaption.manifest import Folder

OWNER = """
import sys, time
from pathlib import Path
from mllm.recaption.manifest import Folder
held = Folder(Path(sys.argv[1])).lock("a")
print(held is not None, flush=True)
time.sleep(600)
"""


def test_one_owner_at_a_time_until_it_is_killed(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    command, environment = [sys.executable, "-c", OWNER, str(tmp_path)], os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "True\n"
        assert folder.lock("a") is None
        owner.send_signal(signal.SIGSTOP)
        assert folder.lock("a") is None
        owner.kill()
        owner.wait()
        held = folder.lock("a")
        assert held is not None
        with held:
            assert folder.lock("a") is None
            other = folder.lock("b")
            assert other is not None
            other.close()
        again = folder.lock("a")
        assert again is not None
        again.close()


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(UserError, match=r"Function not implemented.*name a folder on a file system with locks"):
        Folder(tmp_path).lock("a")
