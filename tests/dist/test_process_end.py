"""How a process of a group ends: with its own exit code, whatever its last collectives still do."""

import subprocess
import sys

from conftest import ROOT

COLLECTIVES_UNDER_WAY = """
import sys
import torch, torch.distributed as dist
from clips.common.runtime import init_distributed
init_distributed(torch.device("cpu"))
for _ in range(2000):
    dist.all_reduce(torch.zeros(100_000), async_op=True)
sys.exit(7)
"""


def test_a_process_that_ends_amid_collectives_has_its_own_exit_code() -> None:
    """gloo's threads let go of tensors when Python has ended, and torch then aborts: 134, and a run counts as lost."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECTIVES_UNDER_WAY], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
