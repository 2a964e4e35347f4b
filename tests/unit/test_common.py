"""The ground floor's small helpers: which machine this is, and a hash over some files of a directory."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from clips.common.files import digest_of
from clips.common.machine import this_machine

TELL = "from clips.common.machine import this_machine; print(this_machine())"


def test_processes_of_one_machine_agree_on_it() -> None:
    done = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(this_machine())


def test_a_digest_is_of_names_and_contents_whatever_the_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    for path in (a, b):
        path.write_text(f"content of {path.name}")
    whole = digest_of([a, b])
    lines = "".join(f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in (a, b))
    assert whole == hashlib.sha256(lines.encode()).hexdigest(), "figures and manifests of older runs hold such digests"
    assert whole == digest_of(iter([b, a, a]))
    assert digest_of([]) != digest_of([a]) != whole
    b.rename(c)
    assert digest_of([a, c]) != whole
    c.rename(b)
    b.write_text("another")
    assert digest_of([a, b]) != whole
