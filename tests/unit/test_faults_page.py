"""docs/faults.md lists every row with its tests, and no test that is not there."""

from __future__ import annotations

import re

from conftest import ROOT

ROW = re.compile(r"^\| (\d+) \|.*\|(.*)\|$", re.MULTILINE)


def test_all_28_rows_are_tests_and_listed() -> None:
    listed = {
        int(number): set(re.findall(r"`(test_row_\w+)`", tests))
        for number, tests in ROW.findall((ROOT / "docs" / "faults.md").read_text())
    }
    found: dict[int, set[str]] = {}
    for file in (ROOT / "tests" / "faults").glob("test_*.py"):
        for name, number in re.findall(r"^def (test_row_(\d+)_\w+)\(", file.read_text(), re.MULTILINE):
            found.setdefault(int(number), set()).add(name)
    assert sorted(listed) == list(range(1, 29))
    assert listed == found
