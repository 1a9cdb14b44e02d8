"""What proposes the trials of a sweep: Optuna behind ask and tell, rebuilt from the ledger at every start."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FixedTrial, TrialState, create_trial

from robustscale.config import unknown
from robustscale.errors import InputError
from robustscale.noise import key_of, permutation
from robustscale.run import Run
from tune.frontier import STATES
from tune.importances import importances
from tune.ledger import Ledger, Record
from tune.spaces import Space
from tune.storage import clear, open_storage, reachable
from tune.sweep import require_id, trial_id

SAMPLERS = ("tpe", "nsga2", "gp", "random", "grid")
DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {"sa": "maximize", "ra": "maximize", "cost": "minimize"}
FIGURES = {"sa": "sa", "ra": "ra", "cost": "flops"}
"""The figure of an `ended` record that an objective is."""

MOST_REPEATS = 100
"""Proposals in a row that have run before, after which the space counts as exhausted."""
POPULATION = 10
"""Trials of a generation of NSGA-II. Optuna's 50 would leave a whole search of usual length to chance; the others
begin with 10 random ones, too."""

_STATES = {"complete": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class Proposal(NamedTuple):
    """A trial to run."""

    id: str
    number: int
    values: dict[str, Any]
    run: Run | None
    """None where what was drawn can't be a Run: then that trial has failed, for this reason."""
    reason: str = ""


class Study:
    """One Optuna study, told to maximise SA and RA and, with "cost", to minimise FLOPs.

    The ledger is the truth and is written first; of Optuna's storage nothing is read but whether its place is free. So
    a study that was lost, torn or left behind by a killed driver costs nothing, and no trial stays RUNNING in it but
    those that were asked for and have not ended, which `pending` gives out again.

    What is proposed for trial n is a function of the trials before it and of (seed, "suggest", n): each is drawn by a
    sampler of its own. What a sampler keeps in the study (the generations of NSGA-II) is in the ledger, with the
    trial that it came with. Then a study that was rebuilt proposes what the first would have proposed.

    A trial that is proposed again does not run again: Optuna is told what is known of it, or will be once that ends.
    Its second `asked` record has another number and the same ID.

    `storage` is the path of an Optuna journal, or a URL. One in the ledger's own folder is this sweep's alone, and is
    mended; another may be shared by sweeps of other names. Raises InputError where it can't be opened, or has a study
    of this name from another sweep or over another space, which is then left as it is.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: Run,
        space: Space,
        *,
        name: str,
        storage: str,
        sampler: str = "tpe",
        objectives: Sequence[str] = ("sa", "ra"),
        seed: int = 0,
        grid_points: int = 4,
    ) -> None:
        if sampler not in SAMPLERS:
            raise unknown("sampler", sampler, SAMPLERS)
        if wrong := [objective for objective in objectives if objective not in DIRECTIONS]:
            raise unknown("objectives", wrong[0], DIRECTIONS)
        self.ledger = ledger
        self.finished: str | None = None
        """Why nothing more is proposed, once that is so."""
        self._run, self._space, self._objectives = run, space, tuple(objectives)
        self._sampler, self._seed = sampler, seed
        self._grid = _shuffled(space.grid(run, grid_points), seed) if sampler == "grid" else None
        self._asked: dict[str, Record] = {}
        self._ended: dict[str, Record] = {}
        self._numbers: dict[str, list[int]] = {}
        """Of each trial, by ID: the numbers it was proposed under."""
        self._num_asked = 0
        self._open(name, storage)
        self._rebuild(ledger.records())

    def _open(self, name: str, storage: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces every trial on stderr
        header = next((record for record in self.ledger.records() if record["kind"] == "sweep"), {})
        ours = {"space": self._space.as_text(), "sweep": _digest(header)}
        self._storage = open_storage(storage, self.ledger.path.parent)
        with reachable(storage):
            clear(self._storage, name, ours, storage)
            self._study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                directions=[DIRECTIONS[objective] for objective in self._objectives],
                sampler=RandomSampler(),  # not drawn from: every trial has a sampler of its own
            )
        self._study_id = self._storage.get_study_id_from_name(name)
        for key, value in {**ours, "objectives": list(self._objectives), "sampler": self._sampler}.items():
            self._study.set_user_attr(key, value)
        # The names on the dashboard's axes. What sets them, Study.set_metric_names, warns that it is experimental.
        self._storage.set_study_system_attr(self._study_id, "study:metric_names", list(self._objectives))

    def _rebuild(self, records: Iterable[Record]) -> None:
        records = list(records)
        for record in sorted((r for r in records if r["kind"] == "ended"), key=lambda r: STATES.index(r["state"])):
            self._ended.setdefault(record["trial"], _settled(record, self._objectives))
        asked: dict[int, Record] = {}
        for record in records:
            if record["kind"] == "asked":
                asked.setdefault(record["number"], record)
        self._pending: list[Proposal] = []
        for number in range(max(asked, default=-1) + 1):
            if number in asked:
                self._restore(asked[number])
            else:  # Numbers must stay what they were: of one whose line was damaged, this much is known.
                self._study.add_trial(create_trial(state=TrialState.FAIL, user_attrs={"reason": "record was damaged"}))
        self._num_asked = len(self._study.get_trials(deepcopy=False))

    def _restore(self, asked: Record) -> None:
        """Add a trial of the ledger to the study."""
        trial, ended = require_id(asked["trial"]), self._ended.get(asked["trial"])
        fixed = FixedTrial(asked["values"], asked["number"])
        for path in asked["values"]:  # each alone, for its distribution: to build a Run takes a hundred times as long
            self._space.dimensions[path].suggest(fixed, path)
        frozen = create_trial(
            state=_STATES[ended["state"]] if ended else TrialState.RUNNING,
            values=self._told(ended) if ended else None,
            params=fixed.params,
            distributions=fixed.distributions,
            system_attrs=asked["attributes"]["trial"],
            user_attrs=self._user_attributes(ended or {"trial": trial}),
        )
        frozen.datetime_start = datetime.fromtimestamp(asked["time"])
        if ended:
            frozen.datetime_complete = datetime.fromtimestamp(max(ended["time"], asked["time"]))
        self._study.add_trial(frozen)
        for key, numbers in asked["attributes"]["study"].items():
            self._storage.set_study_system_attr(self._study_id, key, [self._optuna_id(n) for n in numbers])
        self._note(asked)
        if not ended and len(self._numbers[trial]) == 1:
            self._pending.append(Proposal(trial, asked["number"], dict(asked["values"]), *self._draw(fixed)[1:]))

    def _note(self, asked: Record) -> None:
        self._asked.setdefault(asked["trial"], asked)
        self._numbers.setdefault(asked["trial"], []).append(asked["number"])

    @property
    def asked(self) -> Mapping[str, Record]:
        """What was first asked of each trial, by ID."""
        return self._asked

    @property
    def pending(self) -> list[Proposal]:
        """Trials that an earlier driver asked for and of which no end is known, by number."""
        return [proposal for proposal in self._pending if proposal.id not in self._ended]

    @property
    def ended(self) -> Mapping[str, Record]:
        """How each trial that has ended did, by ID."""
        return self._ended

    @property
    def num_ended(self) -> int:
        """Trials that have ended, in whatever way, over the whole life of the sweep."""
        return len(self._ended)

    def ask(self) -> Proposal | None:
        """The next trial, on record when this returns; None once there is none, and then `finished` says why."""
        for _ in range(MOST_REPEATS):
            if self._grid is not None and self._num_asked >= len(self._grid):
                self.finished = "every point of the grid has been proposed"
                return None
            proposal = self._propose()
            if len(self._numbers[proposal.id]) == 1:
                return proposal
            if proposal.id in self._ended:
                self._tell(proposal.number, self._ended[proposal.id])
        self.finished = f"the last {MOST_REPEATS} proposals were of trials that have run: nothing new is left to try"
        return None

    def _propose(self) -> Proposal:
        """A trial, maybe one that has been there."""
        number, before = self._num_asked, self._storage.get_study_system_attrs(self._study_id)
        if self._grid is not None:
            self._study.enqueue_trial(self._grid[number])
        self._study.sampler = self._sampler_of(number)
        trial = self._study.ask()
        self._num_asked += 1
        if trial.number != number:
            raise InputError(
                f"{self._study.study_name}: somebody else asks this study for trials; take another --run-name"
            )
        values, run, reason = self._draw(trial)
        name = _digest(values) if run is None else trial_id(run)
        attributes = {"trial": self._system_attributes(number), "study": self._new_attributes(before)}
        asked = {"kind": "asked", "trial": name, "number": number, "values": values, "attributes": attributes}
        self._note(self.ledger.append(asked))
        return Proposal(name, number, values, run, reason)

    def _sampler_of(self, number: int) -> BaseSampler:
        seed = key_of(self._seed, "suggest", number) % 2**32
        if self._sampler == "nsga2":
            return NSGAIISampler(population_size=POPULATION, seed=seed)
        if self._sampler == "gp":
            return GPSampler(seed=seed, warn_independent_sampling=False)
        return TPESampler(seed=seed) if self._sampler == "tpe" else RandomSampler(seed=seed)

    def _draw(self, trial: Any) -> tuple[dict[str, Any], Run | None, str]:
        try:
            values, run = self._space.draw(self._run, trial)
        except InputError as error:
            return dict(trial.params), None, str(error)
        return values, run, ""

    def _system_attributes(self, number: int) -> dict[str, Any]:
        return dict(self._storage.get_trial_system_attrs(self._optuna_id(number)))

    def _new_attributes(self, before: Mapping[str, Any]) -> dict[str, list[int]]:
        """What the sampler has left in the study: who the parents of a generation are. As numbers of trials: Optuna's
        IDs are of the storage, and others once the study is rebuilt."""
        after = self._storage.get_study_system_attrs(self._study_id)
        return {
            key: [self._storage.get_trial_number_from_id(trial) for trial in trials]
            for key, trials in after.items()
            if key not in before
        }

    def tell(self, ended: Mapping[str, Any]) -> None:
        """Record how a trial has ended: an `ended` record but for kind and time. A complete one whose figures are not
        all finite has failed. Of a trial that has ended, nothing more is recorded."""
        if ended["trial"] in self._ended:
            return
        record = self.ledger.append({"kind": "ended", **_settled(ended, self._objectives)})
        self._ended[record["trial"]] = record
        for number in self._numbers[record["trial"]]:
            self._tell(number, record)

    def _tell(self, number: int, record: Record) -> None:
        for key, value in self._user_attributes(record).items():
            self._storage.set_trial_user_attr(self._optuna_id(number), key, value)
        self._study.tell(number, self._told(record), state=_STATES[record["state"]])

    def _told(self, record: Record) -> list[float] | None:
        complete = record["state"] == "complete"
        return [float(record[FIGURES[objective]]) for objective in self._objectives] if complete else None

    def _user_attributes(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the dashboard shows of a trial."""
        named = {key: record.get(key) for key in ("reason", "epoch", "sa", "ra", "flops", "seconds")}
        folder = str(self.ledger.path.parent / "trials" / record["trial"])
        return {"id": record["trial"], "folder": folder, **{k: v for k, v in named.items() if v is not None}}

    def _optuna_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def importances(self, objective: str) -> dict[str, float]:
        """Each searched field's share in an objective: see tune/importances.py."""
        return importances(
            self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)),
            self._objectives.index(objective),
            DIRECTIONS[objective],
        )


def _shuffled(points: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """In the order of the grid, a search that ends before it would have seen one corner."""
    return [points[index] for index in permutation(len(points), seed, "grid")]


def _settled(ended: Mapping[str, Any], objectives: Sequence[str]) -> Record:
    """The record with no figure but finite ones."""
    figures = ("epoch", "sa", "ra", "n", "flops", "seconds")
    found = {name: ended.get(name) for name in figures}
    record = {**ended, **{name: v if v is not None and math.isfinite(v) else None for name, v in found.items()}}
    lacking = [FIGURES[objective] for objective in objectives if record[FIGURES[objective]] is None]
    if record["state"] == "complete" and lacking:
        was = ", ".join(f"{name} is {found[name]}" for name in lacking)
        return {**record, "state": "failed", "reason": f"no finite figures at its end: {was}"}
    return record


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
