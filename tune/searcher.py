"""The study as Ray Tune's search algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ray.tune.search import Searcher

from robustscale.config import encode
from robustscale.run import Run
from tune.ledger import Ledger
from tune.study import Proposal, Study

FIGURES = ("epoch", "sa", "ra", "n", "flops", "seconds")


class FrontierSearcher(Searcher):
    """Hands the study's proposals to Ray Tune, and what came of them to the ledger.

    A trial's configuration is {"id", "number", "values", "run"}: the ledger's ID and number, the searched fields, and
    the whole Run as JSON. Its reports are {"epoch", "sa", "ra", "flops", "seconds", "finished"}, or {"failed": reason}.

    Trials that an earlier driver asked for come first. Then, while fewer than `num_trials` have ended or run, counted
    over the whole life of the sweep, those that the study proposes. A trial is complete if its last report says that it
    is finished; Ray's own OptunaSearch takes whatever came last for the result of a trial that was stopped or died.

    `reason_of` is given the ledger's ID of a trial whose process died, and says in one line why.

    Tune's snapshots of a searcher are neither written nor read: the ledger has it all.
    """

    def __init__(self, study: Study, ledger: Ledger, num_trials: int, reason_of: Callable[[str], str]) -> None:
        super().__init__()
        self._study, self._ledger = study, ledger
        self._num_trials, self._reason_of = num_trials, reason_of
        self._waiting = study.pending
        self._running: dict[str, str] = {}
        """The ledger's ID by Tune's."""
        self._last: dict[str, dict[str, Any]] = {}
        """The figures of each trial's last look at the held-out part."""
        for record in ledger.records():
            if record["kind"] == "rung":
                self._last[record["trial"]] = _figures(record)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Metrics and space are the study's: TuneConfig need not name any."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """A configuration, or FINISHED."""
        while self._study.num_ended + len(self._running) < self._num_trials:
            proposal = self._waiting.pop(0) if self._waiting else self._study.ask()
            if proposal is None:
                break
            if proposal.run is not None:
                self._running[trial_id] = proposal.id
                return _config(proposal, proposal.run)
            self._study.tell({"trial": proposal.id, "state": "failed", "reason": proposal.reason})
        return self.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._running:
            self._note(self._running[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id, None)
        if trial is None:
            return
        result = result or {}
        self._note(trial, result)  # where the scheduler ended it, no on_trial_result came
        figures = self._last.pop(trial, _figures({}))
        state, reason = self._end(trial, figures, result, error)
        self._study.tell({"trial": trial, "state": state, "reason": reason, **figures})

    def _end(
        self, trial: str, figures: Mapping[str, Any], result: Mapping[str, Any], error: bool
    ) -> tuple[str, str | None]:
        if result.get("failed"):
            return "failed", str(result["failed"])
        if error:
            return "failed", self._reason_of(trial)
        if figures["epoch"] is None:
            return "failed", "it ended without a report"
        if figures["sa"] is None or figures["ra"] is None:
            return "failed", f"SA is {result.get('sa')}, RA {result.get('ra')} after epoch {figures['epoch']}"
        if result.get("finished"):
            return "complete", None
        return "stopped", f"stopped early, after epoch {figures['epoch']}"

    def _note(self, trial: str, result: Mapping[str, Any]) -> None:
        """Record a look at the held-out part; one that a retried trial repeats is not recorded again."""
        figures = _figures(result)
        last = self._last.get(trial, {}).get("epoch")
        if figures["epoch"] is not None and (last is None or figures["epoch"] > last):
            self._last[trial] = figures
            self._ledger.append({"kind": "rung", "trial": trial, **figures})

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a snapshot that is not read."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: Tune asks for it every few seconds."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed search is a new one on the same ledger."""


def _config(proposal: Proposal, run: Run) -> dict[str, Any]:
    return {"id": proposal.id, "number": proposal.number, "values": proposal.values, "run": encode(run)}


def _figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a report that are numbers."""
    found = {name: result.get(name) for name in FIGURES}
    return {name: v if isinstance(v, (int, float)) and math.isfinite(v) else None for name, v in found.items()}
