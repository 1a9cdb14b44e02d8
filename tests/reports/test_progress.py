from __future__ import annotations

import io
import os
import pty
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from robustscale.reports.progress import Display, duration


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "step", "epoch": (number - 1) // 10, "step": number, "total_steps": 30, "loss": 1.5, "lr": 0.1,
            "images_per_second": 1234.5, "wait": 0.031, **more}  # fmt: skip


def epoch(number: int, **more: Any) -> dict[str, Any]:
    return {"event": "epoch", "epoch": number, "step": 10 * number, "train_loss": 1.25, **more}


def shown(*records: dict[str, Any], seconds: float = 1.0, title: str = "digits") -> list[str]:
    out, clock = io.StringIO(), Clock()
    with Display(3, title=title, file=out, clock=clock) as display:
        for record in records:
            clock.now += seconds
            display.update(record)
    return out.getvalue().splitlines()


def test_a_line_has_everything() -> None:
    lines = shown(step(1), *(step(n) for n in range(2, 12)))
    assert lines == [
        "[digits] epoch 1/3  step 1/30  loss 1.5000  lr 0.1  1,234 images/s  waiting for data 3 %",
        "[digits] epoch 2/3  step 11/30  loss 1.5000  lr 0.1  1,234 images/s  waiting for data 3 %  19 s left",
    ]


@pytest.mark.parametrize("seconds, count", [(1.0, 3), (4.0, 10), (60.0, 30)])
def test_steps_have_at_most_one_line_an_interval(seconds: float, count: int) -> None:
    assert len(shown(*(step(n) for n in range(1, 31)), seconds=seconds)) == count


def test_every_epoch_has_one_line_even_when_it_comes_again() -> None:
    records = [epoch(1, sa=0.812, ra=0.4), epoch(2, seconds=65.0), epoch(1), epoch(2), epoch(3)]
    assert shown(*records) == [
        "[digits] epoch 1/3 done  loss 1.2500  held out: SA 81.2 %, RA 40.0 %",
        "[digits] epoch 2/3 done  loss 1.2500  1:05 min",
        "[digits] epoch 3/3 done  loss 1.2500",
    ]


def test_time_left_counts_from_where_a_run_resumed() -> None:
    """20 steps are done, but not by this process: one step took 10 s, so that 9 take 90 s, not 5."""
    lines = shown(step(20), step(21), seconds=10.0)
    assert lines[1].endswith("1:30 min left")
    assert "left" not in lines[0]


def test_a_restart_goes_back() -> None:
    lines = shown(step(20), step(21), step(11), step(12), seconds=20.0)
    assert "left" not in lines[2]
    assert lines[3].endswith("6:00 min left")


def test_evaluation_shows_its_first_and_its_last() -> None:
    records = [{"event": "judge", "attack": "pgd-20 linf 8/255", "done": k, "total": 8} for k in range(1, 9)]
    assert shown(*records, title="") == ["evaluating 12 %  pgd-20 linf 8/255", "evaluating 100 %  pgd-20 linf 8/255"]


def test_notes_are_shown_as_they_are() -> None:
    assert shown({"event": "note", "message": "resumed at [step 3] 50 %"}) == ["[digits] resumed at [step 3] 50 %"]


@pytest.mark.parametrize(
    "seconds, text", [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (3599, "59:59 min"), (7384, "2:03 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_arrive_at_once(tmp_path: Path) -> None:
    """A file is buffered unless flushed; a person tails it."""
    with (tmp_path / "log").open("w") as out, Display(3, file=out) as display:
        display.update(epoch(1))
        assert (tmp_path / "log").read_text() == "epoch 1/3 done  loss 1.2500\n"


def test_a_terminal_shows_a_live_bar_and_keeps_the_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    ours, theirs = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(ours, 4096):
                received.append(chunk)
        except OSError:  # The other side is closed: Linux says so with EIO.
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as out, Display(3, title="digits", file=out) as display:
        display.update(step(5))
        display.update(epoch(1, sa=0.812, ra=0.4))
        display.update(step(15))
        display.live.refresh()  # type: ignore[union-attr]
    reader.join(10)
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(received).decode())
    assert text.count("epoch 1/3 done  loss 1.2500  held out: SA 81.2 %, RA 40.0 %") == 1
    assert "epoch 2/3" in text
    assert "50 %" in text
    assert "1,234 images/s  waiting for data 3 %  held out SA 81.2 %, RA 40.0 %" in text
    assert not any(line.startswith("[digits] epoch 2/3  step") for line in text.splitlines())
