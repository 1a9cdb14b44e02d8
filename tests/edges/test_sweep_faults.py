"""Trials that die in every way there is do not stop a sweep, and take nothing from the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.edges.conftest import ROOT
from tests.edges.sabotaged_sweep import sabotage_of
from tune.ledger import Ledger

CAUSES = {
    "raise": "sabotage",
    "kill": "without a word",
    "segfault": "Fatal Python error: Segmentation fault",
    "hang": "hung: no step for 5 s",
    "memory": "MemoryError",
    "nan": "RA nan",
}


def sweep(folder: Path, trials: int, saboteurs: bool) -> dict[str, dict[str, Any]]:
    words = [sys.executable, "-m", "tests.edges.sabotaged_sweep", str(folder), str(trials), str(int(saboteurs))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = Ledger(folder / "ledger.jsonl").records()
    ended = [record for record in records if record["kind"] == "ended"]
    assert len(ended) == len({record["trial"] for record in ended}) == trials
    return {record["trial"]: record for record in ended}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_saboteurs_fail_with_their_cause_and_the_others_end_as_without_them(tmp_path: Path) -> None:
    trials = 200
    clean, sabotaged = (sweep(tmp_path / name, trials, name == "sabotaged") for name in ("clean", "sabotaged"))
    assert clean.keys() == sabotaged.keys()
    for trial, ended in sabotaged.items():
        sabotage = sabotage_of(trial)
        if sabotage is None:
            assert ended["state"] == clean[trial]["state"] == "complete"
            assert [ended[name] for name in ("sa", "ra", "flops")] == [clean[trial][n] for n in ("sa", "ra", "flops")]
        else:
            assert ended["state"] == "failed" and CAUSES[sabotage] in ended["reason"], (sabotage, ended)
    assert {sabotage_of(trial) for trial in sabotaged} == {None, *CAUSES}
