"""Our figures beside the published ones, and how far a plan is."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from robustscale.engine.folder import RunFolder
from robustscale.experiments.base import (
    SCALES,
    Cell,
    Experiment,
    Figure,
    Found,
    Measured,
    Plot,
    Reading,
    Training,
    Verdict,
    compared,
    looks,
    result,
    sa_and_ra,
    snapshots,
)
from robustscale.reports.experiment import (
    draw_experiment,
    finish_experiment,
    percent,
    print_experiment,
    scale_words,
    table_md,
    table_rows,
    verdict_of,
    verdict_words,
)
from robustscale.reports.grid_display import GridDisplay
from robustscale.run import Checkpoints, Evaluation, Run

READ = Training(Run())
TABLE = Experiment(
    title="TRADES against PGD-AT",
    report="Thesis, table 4.1",
    claim="TRADES is the more robust.",
    figures=(*sa_and_ra("TRADES | 5", READ, (0.816, 0.527)), *sa_and_ra("AT", READ, (0.829, 0.48))),
    verdict=lambda found: compared(found, [(("TRADES | 5", "RA"), ("AT", "RA"))]),
    notes=("On fewer images.",),
)
FOUND: Found = {
    ("TRADES | 5", "SA"): Measured((0.8, 0.82), 1000),
    ("TRADES | 5", "RA"): Measured((0.51, 0.53), 1000),
    ("AT", "SA"): Measured((0.83,), 1000),
    ("AT", "RA"): Measured((0.4, 0.42), 1000),
}


def test_a_table_has_ours_with_spread_and_the_published() -> None:
    assert table_rows(TABLE, FOUND, {}) == [
        ("", "SA", "RA"),
        ("TRADES | 5", "81.0 ± 1.4 (81.6)", "52.0 ± 1.4 (52.7)"),
        ("AT", "83.0 (82.9)", "41.0 ± 1.4 (48.0)"),
    ]
    text = table_md(TABLE, SCALES["medium"], FOUND, {}, verdict_of(TABLE, FOUND, {}))
    assert "**The trend holds: 1 of 1 comparisons are told as claimed" in text
    assert "| TRADES / 5 | 81.0 ± 1.4 (81.6) | 52.0 ± 1.4 (52.7) |" in text and "On fewer images." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {4}


def test_what_is_missing_is_said_and_leaves_the_verdict_open() -> None:
    part = {cell: FOUND[cell] for cell in FOUND if cell != ("AT", "RA")}
    missing: Mapping[Cell, str] = {("AT", "RA"): "AT, seed 0 failed: diverged", ("AT", "SA"): "hung"}
    verdict = verdict_of(TABLE, part, {})
    assert verdict == Verdict(None, "1 of 4 figures are missing")
    text = table_md(TABLE, SCALES["small"], part, missing, verdict)
    assert "| AT | 83.0 * (82.9) | failed (48.0) |" in text and "without the seeds that failed" in text
    assert "- AT, RA: AT, seed 0 failed: diverged" in text and "**Open: 1 of 4" in text


def test_seeds_that_are_left_give_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    missing: Mapping[Cell, str] = {("AT", "RA"): "AT, seed 2 failed: diverged"}
    verdict = verdict_of(TABLE, FOUND, missing)
    assert verdict == Verdict(None, "1 of 4 figures are missing, or lack a seed")
    print_experiment(TABLE, FOUND, missing, verdict)
    out = capsys.readouterr().out
    assert "41.0 ± 1.4 * (48.0)" in out and "without the seeds that failed" in out


def test_the_published_figure_stands_as_it_was_published() -> None:
    assert [percent(share) for share in (0.5575, 0.8625, 0.48, 0.829)] == ["55.75", "86.25", "48.0", "82.9"]


LAST = Training(dataclasses.replace(Run(), evaluation=Evaluation(report="last")))
TUNED = Training(dataclasses.replace(Run(), checkpoints=Checkpoints(snapshots=1)), READ)


@pytest.mark.parametrize(
    "reading, words",
    [
        (result(READ), "Weights are chosen on held-out training images; the test set is read"),
        (result(LAST), "The last weights are reported; the test set is read"),
        (looks(READ), "on held-out training images; the test set is read for none"),
        (snapshots(TUNED), "Of each epoch's weights; nothing is chosen"),
    ],
    ids=["best", "last", "looks", "snapshots"],
)
def test_a_table_says_how_its_weights_were_chosen(reading: Reading, words: str) -> None:
    experiment = dataclasses.replace(TABLE, figures=(Figure("a", "b", reading),))
    assert words in table_md(experiment, SCALES["full"], {}, {}, Verdict(None, ""))


def test_a_report_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(tmp_path / "x")
    finish_experiment(folder, "thesis_4_1", TABLE, SCALES["smoke"], FOUND, {}, {"total": 4})
    written = json.loads((folder.path / "experiment.json").read_text())
    assert (
        written["verdict"]["holds"] is True and written["scale"]["name"] == "smoke" and written["nodes"]["total"] == 4
    )
    (ours,) = [f for f in written["figures"] if (f["row"], f["column"]) == ("TRADES | 5", "RA")]
    assert ours["values"] == [0.51, 0.53] and ours["published"] == 0.527 and ours["mean"] == pytest.approx(0.52)
    assert (folder.path / "table.md").read_text().startswith("# TRADES against PGD-AT\n")
    assert not (folder.path / "experiment.png").exists()
    out = capsys.readouterr().out
    assert "The trend holds" in out and "52.0 ± 1.4 (52.7)" in out and out.startswith("TRADES against PGD-AT (Thesis")


def test_a_verdict_in_words() -> None:
    assert verdict_words(Verdict(False, "why")) == "The trend does not hold: why."
    out = io.StringIO()
    print_experiment(TABLE, {}, {}, verdict_of(TABLE, {}, {}), out)
    assert "Open: 4 of 4 figures are missing." in out.getvalue() and "– (48.0)" in out.getvalue()


def test_a_scale_in_words() -> None:
    assert scale_words(SCALES["full"]) == "Scale full: as published; mean ± standard deviation over 3 seeds."
    small = dataclasses.replace(SCALES["small"], target="cifar10")
    assert scale_words(small) == (
        "Scale small: target set cifar10, 0.1 of the training images, narrow networks, 0.1 times the epochs; "
        "one seed, so without a spread."
    )


def pixels(path: Path) -> np.ndarray:
    import matplotlib.image

    return matplotlib.image.imread(path)


LINES = tuple(Figure(row, column, result(READ), "ra", 0.3) for row in ("RA, _rob", "SA $") for column in ("1", "10"))
CURVE = Experiment(title="t", report="r", claim="c", figures=LINES, verdict=lambda found: Verdict(True, ""))


@pytest.mark.parametrize(
    "experiment, plot",
    [(CURVE, Plot("epoch", "accuracy, %")), (TABLE, Plot("RA, %", "SA, %", "frontier"))],
    ids=["lines", "frontier"],
)
def test_a_picture_shows_ours_and_the_published(experiment: Experiment, plot: Plot, tmp_path: Path) -> None:
    found = FOUND if experiment is TABLE else {f.cell: Measured((0.5, 0.6)) for f in LINES}
    for name, ours in (("both", found), ("theirs", {})):
        draw_experiment(experiment, plot, ours, tmp_path / f"{name}.png")
    both, theirs = (pixels(tmp_path / f"{name}.png") for name in ("both", "theirs"))
    assert both.shape[0] > 300 and (both != theirs).any() and (theirs[..., :3] != theirs[0, 0, :3]).any()


def test_the_display_tells_each_change_and_counts() -> None:
    out, now = io.StringIO(), [0.0]
    display = GridDisplay("thesis", file=out, clock=lambda: now[0])
    display.update({"event": "node", "key": "a", "name": "rob, seed 0", "state": "runs"})
    display.update({"event": "grid", "states": {"a": "runs", "b": "waits", "c": "done"}})
    display.update({"event": "progress", "key": "a", "epoch": 3, "epochs": 9})
    now[0] = 1.0
    display.update({"event": "progress", "key": "a", "epoch": 4, "epochs": 9})  # too soon for another line
    display.update({"event": "node", "key": "a", "name": "rob, seed 0", "state": "failed", "reason": "diverged"})
    display.update({"event": "note", "message": "a word"})
    assert out.getvalue().splitlines() == [
        "[thesis] rob, seed 0  starts",
        "[thesis] 1 done, 1 running, 1 waiting",
        "[thesis] rob, seed 0  failed: diverged",
        "[thesis] a word",
    ]


def test_the_picture_of_a_terminal_has_what_runs() -> None:
    from rich.console import Console

    display = GridDisplay("thesis", file=io.StringIO())
    for k in range(14):
        display.update({"event": "node", "key": str(k), "name": f"node {k}", "state": "runs"})
    display.update({"event": "progress", "key": "3", "epoch": 4, "epochs": 9})
    display.update({"event": "node", "key": "0", "name": "node 0", "state": "done"})
    display.update({"event": "grid", "states": {str(k): "done" if k == 0 else "runs" for k in range(14)}})
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(display._picture())
    shown = console.export_text()
    assert "node 3   epoch 4/9" in shown and "node 0 " not in shown and "and 1 more" in shown
    assert "1 done, 13 running" in shown
