"""What is shown of a sweep while it runs."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from rich.console import Console

from robustscale.reports.sweep_display import SweepDisplay, shown_trials
from tests.reports.test_progress import Clock


def trial(number: int, state: str = "running", **more: Any) -> dict[str, Any]:
    return {"event": "trial", "id": f"{number:016x}", "number": number, "state": state,
            "values": {"objective.beta": 3.0 + number}, "epochs": 9, **more}  # fmt: skip


def sweep(ended: int, **more: Any) -> dict[str, Any]:
    return {"event": "sweep", "ended": ended, "trials": 40, "hypervolume": 0.31234, **more}


def shown(*records: dict[str, Any], seconds: float = 1.0) -> list[str]:
    out, clock = io.StringIO(), Clock()
    with SweepDisplay(40, title="digits", file=out, clock=clock) as display:
        for record in records:
            clock.now += seconds
            display.update(record)
    return out.getvalue().splitlines()


def picture(*records: dict[str, Any], width: int = 120, height: int = 24) -> str:
    display = SweepDisplay(40, title="digits", file=io.StringIO())
    display.console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True)
    for record in records:
        display.trials = {**display.trials, record["id"]: record} if record["event"] == "trial" else display.trials
        display.sweep = record if record["event"] == "sweep" else display.sweep
    plain = Console(file=io.StringIO(), width=width, height=height)
    plain.print(display._picture())
    return plain.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_lines_tell_of_what_began_and_ended() -> None:
    assert shown(
        {"event": "preparing data", "message": "digits", "done": 1, "total": 1},
        trial(3), trial(3, epoch=1, sa=0.5, ra=0.1),
        trial(3, "complete", epoch=9, sa=0.812, ra=0.4), trial(3, "complete", rank=0, frontier=True),
        trial(4, "failed", epoch=2, reason="diverged at step 3 [x]"),
        trial(5, "stopped", epoch=3, sa=0.5, ra=0.125), {"event": "note", "message": "resumed [at] 50 %"},
    ) == [
        "[digits] preparing data  digits  100 %",
        "[digits] trial 3 starts  beta 6",
        "[digits] trial 3 complete  SA 81.2 %  RA 40.0 %  beta 6",
        "[digits] trial 3 is on the frontier  SA 81.2 %  RA 40.0 %",
        "[digits] trial 4 failed after epoch 2/9  diverged at step 3 [x]  beta 7",
        "[digits] trial 5 stopped after epoch 3/9  SA 50.0 %  RA 12.5 %  beta 8",
        "[digits] resumed [at] 50 %",
    ]  # fmt: skip


def test_totals_have_at_most_one_line_an_interval() -> None:
    lines = shown(trial(1), *(sweep(k) for k in range(1, 22)))
    assert lines[1] == "[digits] 1/40 trials ended  1 running  0 on the frontier  hypervolume 0.3123"
    assert len(lines) == 4 and lines[-1].endswith("19 s left")
    assert shown(sweep(3, left=185.0))[-1].endswith("3:05 min left")


def test_a_rank_may_be_told_of_a_trial_that_nobody_else_told_of() -> None:
    """One whose line in the ledger was damaged."""
    assert shown({"event": "trial", "id": "ab", "rank": 0, "frontier": True}, sweep(7)) == [
        "[digits] 7/40 trials ended  0 running  1 on the frontier  hypervolume 0.3123"
    ]


def test_what_ended_before_is_counted_and_not_told_again() -> None:
    earlier = trial(1, "complete", sa=0.9, ra=0.5, earlier=True)
    assert shown(earlier, {"event": "trial", "id": earlier["id"], "rank": 0, "frontier": True}, sweep(7)) == [
        "[digits] 7/40 trials ended  0 running  1 on the frontier  hypervolume 0.3123"
    ]
    assert "90.0 %" in picture(earlier, sweep(1))


def test_the_running_come_first_then_the_frontier_then_the_newest() -> None:
    trials = [trial(k, "complete", ra=k / 10, frontier=k in (2, 3)) for k in range(6)] + [trial(6), trial(7)]
    trials.append({"event": "trial", "id": "ab", "number": None, "state": "complete", "rank": 0, "frontier": True})
    assert [each["number"] for each in shown_trials(trials, 6)] == [7, 6, 3, 2, 5, 4]


@pytest.mark.parametrize("width, height", [(120, 24), (80, 24), (60, 10), (50, 7)])
def test_the_picture_fits_the_terminal(width: int, height: int) -> None:
    trials = [trial(k, "complete", sa=0.9, ra=k / 100, rank=k, frontier=not k, epoch=9) for k in range(50)]
    lines = picture(*trials, sweep(50, left=60.0), width=width, height=height).splitlines()
    assert len(lines) < max(height, 8) and max(map(len, lines)) <= width
    assert "★" in "\n".join(lines) and "more" in lines[-1]
    assert ("beta 3" in "\n".join(lines)) == (width >= 70)


def test_records_from_several_threads() -> None:
    out = io.StringIO()
    with SweepDisplay(40, file=out) as display:
        threads = [
            threading.Thread(target=lambda k=k: [display.update(trial(100 * k + i)) for i in range(50)])  # type: ignore[misc]
            for k in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(display.trials) == 400 and len(out.getvalue().splitlines()) == 400
