"""How far a sweep is: a live table of its trials on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from rich.console import Group
from rich.table import Table
from rich.text import Text

from robustscale.reports.frontier_points import finite, trial_name, values_text
from robustscale.reports.progress import Screen, duration, percent

Trial = Mapping[str, Any]

ENDED = ("complete", "stopped", "failed")
STYLES = {"running": "bold", "stopped": "dim", "failed": "red"}
AROUND = 6
"""Lines of the picture that are no trials: the bar, the table's head, how many are not shown, and the cursor's."""
NARROW = 70
"""Columns of a terminal, from which on there is room for what a trial's values are."""


class SweepDisplay(Screen):
    """Shows the records of a sweep:

    {"event": "trial", "id", "number", "state": "running" | "complete" | "stopped" | "failed", "values", "epoch",
    "epochs", "sa", "ra", "rank", "frontier", "reason", "earlier"}, where a later record of the same id adds to the one
    before, and "earlier" says that it ended before this process began;
    {"event": "sweep", "ended", "trials", "hypervolume", "left"}, where `left`, in seconds, may be missing;
    {"event": "note", "message"}; and any record with "done" and "total", as of work before the first trial.
    """

    def __init__(
        self,
        trials: int = 0,
        title: str = "",
        *,
        file: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(title, file, interval, clock)
        self.pace.total = trials
        self.label = ""
        # Replaced, never changed: the picture is drawn by another thread, which must not wait for `update`.
        self.trials: dict[str, Trial] = {}
        self.sweep: Mapping[str, Any] = {}

    def _take(self, record: Mapping[str, Any]) -> None:
        if record["event"] == "trial":
            self._trial(record)
        elif record["event"] == "sweep":
            self.sweep, self.label = record, ""
            self.pace.at("sweep", record["ended"], record["trials"])
            if self._due():
                self._line("  ".join(self._totals()))
        elif "done" in record and "total" in record:
            self.pace.at(record["event"], record["done"], record["total"])
            self.label = "  ".join([record["event"], *([str(record["message"])] if "message" in record else [])])
            if self._due(record["done"] == record["total"]):
                self._line(f"{self.label}  {self.pace.share()}")
        else:
            self._line(str(record.get("message", record["event"])))

    def _trial(self, record: Mapping[str, Any]) -> None:
        before = self.trials.get(record["id"], {})
        # Of a trial whose line in the ledger was damaged, no more is told than how it ended.
        trial = {"number": None, "state": "complete", **before, **record}
        self.trials = {**self.trials, record["id"]: trial}
        if trial["number"] is None or trial.get("earlier"):
            return
        # On a terminal the table says so; but a reason is more than a cell holds.
        if trial["state"] != before.get("state") and (self.live is None or trial["state"] == "failed"):
            self._line("  ".join(_words(trial)))
        elif trial.get("frontier") and not before.get("frontier") and self.live is None:
            self._line("  ".join([f"{trial_name(trial)} is on the frontier", *_shares(trial)]))

    def _totals(self) -> list[str]:
        if not self.sweep:
            return []
        trials, sweep = self.trials.values(), self.sweep
        volume, seconds = finite(sweep.get("hypervolume")), finite(sweep.get("left"))
        left = self.pace.left() if seconds is None else f"{duration(seconds)} left"
        return [
            f"{sweep['ended']}/{sweep['trials']} trials ended",
            f"{sum(trial['state'] == 'running' for trial in trials)} running",
            f"{sum(bool(trial.get('frontier')) for trial in trials)} on the frontier",
            *([] if volume is None else [f"hypervolume {volume:.4g}"]),
            *([left] if left else []),
        ]

    def _picture(self) -> Group:
        bar = self._bar(Text(self.pace.share()), Text(self.label))
        shown = shown_trials(self.trials.values(), self.console.height - AROUND)
        left_out = len(self.trials) - len(shown)
        more = [Text(f"and {left_out} more", style="dim")] if left_out else []
        line = Text("  ".join(self._totals()), style="dim", no_wrap=True, overflow="ellipsis")
        totals = [line] if self.sweep else []
        return Group(bar, *totals, *([_table(shown, self.console.width)] if shown else []), *more)


def shown_trials(trials: Iterable[Trial], room: int) -> list[Trial]:
    """As many as there is room for: first those that run, then the frontier by falling RA, then the newest others."""
    # Of one without a number it is not known what it was.
    every = sorted((t for t in trials if t["number"] is not None), key=lambda trial: -trial["number"])
    running = [trial for trial in every if trial["state"] == "running"]
    on = [trial for trial in every if trial["state"] != "running" and trial.get("frontier")]
    others = [trial for trial in every if trial["state"] != "running" and not trial.get("frontier")]
    on.sort(key=lambda trial: -(finite(trial.get("ra")) or 0.0))
    return [*running, *on, *others][: max(room, 1)]


def _table(trials: Iterable[Trial], width: int) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for name in ("trial", "SA", "RA", "rank", "", "epoch"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    if width >= NARROW:
        table.add_column("values", no_wrap=True, overflow="ellipsis", ratio=1)
    for trial in trials:
        cells = [
            _number(trial, "number"), _share(trial, "sa"), _share(trial, "ra"), _number(trial, "rank"),
            "★" if trial.get("frontier") else "", _epoch(trial), trial["state"],
        ]  # fmt: skip
        cells += [values_text(trial.get("values", {}))] if width >= NARROW else []
        table.add_row(*(Text(cell) for cell in cells), style=STYLES.get(trial["state"], ""))
    return table


def _number(trial: Trial, name: str) -> str:
    return "" if trial.get(name) is None else str(trial[name])


def _share(trial: Trial, name: str) -> str:
    value = finite(trial.get(name))
    return "" if value is None else percent(value)


def _epoch(trial: Trial) -> str:
    epoch, epochs = trial.get("epoch"), trial.get("epochs")
    return "" if epoch is None else f"{epoch}/{epochs}" if epochs else str(epoch)


def _shares(trial: Trial) -> list[str]:
    return [f"{name.upper()} {_share(trial, name)}" for name in ("sa", "ra") if _share(trial, name)]


def _words(trial: Trial) -> list[str]:
    """A line for a log: the state it came to, and what it was."""
    ended = trial["state"] in ENDED
    after = f" after epoch {_epoch(trial)}" if trial["state"] in ("stopped", "failed") and _epoch(trial) else ""
    return [
        f"{trial_name(trial)} {trial['state']}{after}" if ended else f"{trial_name(trial)} starts",
        *(_shares(trial) if ended else []),
        *([f"rank {trial['rank']}"] if trial.get("rank") is not None else []),
        *(["on the frontier"] if trial.get("frontier") else []),
        *([str(trial["reason"])] if trial.get("reason") else []),
        values_text(trial.get("values", {})),
    ]
