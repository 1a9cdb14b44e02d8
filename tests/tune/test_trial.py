"""What is left of a trial's process, by how it ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tune.trial import DYING, last_words

ROOT = Path(__file__).parents[2]
GUARDED = """
import ctypes, sys, threading, time
from pathlib import Path
from tune.trial import watchdog

def segfault():
    ctypes.string_at(0)

def hang():
    time.sleep(100)

def leave():
    raise SystemExit  # as Tune ends the thread of a trial that is stopped

def guarded():
    with watchdog(Path(sys.argv[1]), 1.0) as alive:
        alive()
        {how}()

thread = threading.Thread(target=guarded)
thread.start()
thread.join()
time.sleep({rest})
"""


def end(folder: Path, how: str, rest: float = 0) -> int:
    script = GUARDED.replace("{how}", how).replace("{rest}", str(rest))
    words = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(words, cwd=ROOT, stderr=subprocess.DEVNULL, timeout=100, check=False).returncode


@pytest.mark.parametrize(
    "how, words", [("segfault", "Fatal Python error: Segmentation fault"), ("hang", "hung: no step for 1 s")]
)
def test_the_stacks_of_a_process_that_died_say_why(tmp_path: Path, how: str, words: str) -> None:
    assert end(tmp_path, how) != 0
    assert (last_words(tmp_path, 1.0) or "").startswith(words)
    assert f"in {how}" in (tmp_path / DYING).read_text()


def test_a_stopped_trial_leaves_no_stacks_and_its_process_lives_on(tmp_path: Path) -> None:
    assert end(tmp_path, "leave", rest=1.5) == 0
    assert list(tmp_path.iterdir()) == [] and last_words(tmp_path, 1.0) is None
