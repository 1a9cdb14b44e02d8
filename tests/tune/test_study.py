"""The study: proposes the same trials however often it is rebuilt, and tells Optuna no more than is known."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from robustscale.errors import InputError
from robustscale.recipes.digits import digits
from tune.ledger import Ledger
from tune.spaces import Space
from tune.study import MOST_REPEATS, POPULATION, SAMPLERS, Proposal, Study

ROOT = Path(__file__).parents[2]
EPS, LR, STEPS = "objective.attack.threat.eps", "optimizer.lr", "objective.attack.steps"
SPACE = Space.from_text({EPS: "uniform(0.02, 0.3)", LR: "log(0.01, 1)", STEPS: "choice(3, 5, 7)"})
SMALL = Space.from_text({STEPS: "choice(3, 5)", LR: "choice(0.1, 0.3)"})
CONDITIONAL = Space.from_text(
    {"objective": "choice(pgd_at,trades)", "objective.beta": "log(0.5,12)", LR: "log(0.01,1)"}
)
"""Only TRADES has a beta in that range."""
Begin = Callable[..., Study]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """A study on the ledger of a folder, begun or begun again."""

    def begin(folder: str = "sweep", space: Space = SPACE, storage: str | None = None, **options: Any) -> Study:
        ledger = Ledger(tmp_path / folder / "ledger.jsonl")
        if not ledger.records():
            ledger.append({"kind": "sweep", "schema": 1, "space": space.as_text()})
        where = storage or str(tmp_path / folder / "optuna.journal")
        return Study(ledger, digits(), space, name=options.pop("name", "sweep"), storage=where, **options)

    return begin


def figures(values: dict[str, Any]) -> dict[str, float]:
    """A made-up trade-off."""
    eps = values.get(EPS, 0.1)
    return {"sa": 1 - eps - values.get(LR, 0) / 10, "ra": eps - eps**2, "flops": 1e6 * values.get(STEPS, 7)}


def complete(study: Study, proposal: Proposal) -> None:
    study.tell({"trial": proposal.id, "state": "complete", "epoch": 20, **figures(proposal.values)})


def asked(study: Study) -> Proposal:
    proposal = study.ask()
    assert proposal is not None
    return proposal


def trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    """Read back by a stranger's Optuna."""
    path = str(study.ledger.path.parent / "optuna.journal")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
    return optuna.load_study(study_name="sweep", storage=storage).get_trials()


def search(
    begin: Begin, folder: str, sampler: str, num: int, restart_every: int | None, space: Space = SPACE
) -> list[Proposal]:
    """Three trials at a time, of which the youngest ends first; the last of a generation thus ends within the next."""
    study = begin(folder, space, sampler=sampler)
    running: list[Proposal] = []
    proposals: list[Proposal] = []
    for step in range(num):
        if restart_every and step % restart_every == restart_every - 1:
            study = begin(folder, space, sampler=sampler)
            assert study.pending == sorted(running, key=lambda p: p.number)
        running.append(asked(study))
        proposals.append(running[-1])
        if len(running) == 3:
            ended = running.pop(0 if step % 7 == 0 else -1)
            if step % 5 == 4:
                study.tell({"trial": ended.id, "state": "stopped", "reason": "early", "sa": 0.5, "ra": 0.1})
            else:
                complete(study, ended)
    return proposals


@pytest.mark.parametrize(
    "sampler, num",
    [("tpe", 18), ("nsga2", 30), pytest.param("gp", 19, marks=pytest.mark.slow), ("random", 8), ("grid", 14)],
)
def test_a_rebuilt_study_goes_on_as_an_uninterrupted_one(begin: Begin, sampler: str, num: int) -> None:
    whole = search(begin, "whole", sampler, num, None)
    assert search(begin, "rebuilt", sampler, num, 4) == whole
    assert len({proposal.id for proposal in whole}) == num
    if sampler == "nsga2":  # the parents of two generations, as they were when each began
        asked = [r["attributes"]["study"] for r in begin("whole").ledger.records() if r["kind"] == "asked"]
        assert [len(numbers) for found in asked for numbers in found.values()] == [POPULATION] * 2


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_fields_that_only_some_trials_have(begin: Begin, sampler: str) -> None:
    whole = search(begin, "whole", sampler, 16, None, CONDITIONAL)
    assert search(begin, "rebuilt", sampler, 16, 4, CONDITIONAL) == whole
    kinds = {(p.values["objective"], "objective.beta" in p.values) for p in whole}
    assert kinds == {("pgd_at", False), ("trades", True)}


@pytest.mark.slow
def test_another_process_goes_on_alike(begin: Begin, tmp_path: Path) -> None:
    """One in which strings hash to other numbers, and sets have another order."""
    script = (
        "import sys, json; from tune.ledger import Ledger; from tune.spaces import Space\n"
        "from tune.study import Study; from robustscale.recipes.digits import digits\n"
        "space = Space.from_text(json.loads(sys.argv[1]))\n"
        "for sampler in sys.argv[2:]:\n"
        "    path = f'{sampler}/ledger.jsonl'\n"
        "    study = Study(Ledger(path), digits(), space, name='sweep', storage=path + '.journal', sampler=sampler)\n"
        "    print([study.ask().values for _ in range(2)])"
    )
    expected = []
    for sampler in SAMPLERS:
        search(begin, "here", sampler, 18, None)
        (tmp_path / sampler).mkdir()
        shutil.copy(tmp_path / "here" / "ledger.jsonl", tmp_path / sampler)
        study = begin("here", sampler=sampler)
        expected.append(str([asked(study).values for _ in range(2)]))
        shutil.rmtree(tmp_path / "here")
    env = os.environ | {"PYTHONHASHSEED": "17", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, json.dumps(SPACE.as_text()), *SAMPLERS]
    found = subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == expected


def test_the_seed_makes_the_search(begin: Begin) -> None:
    first, same, other = (asked(begin(f, seed=s)).values for f, s in [("a", 1), ("b", 1), ("c", 2)])
    assert first == same != other


def test_only_what_is_complete_is_told_as_complete(begin: Begin) -> None:
    study = begin(objectives=("sa", "ra", "cost"))
    done, stopped, failed, nan = (asked(study) for _ in range(4))
    complete(study, done)
    early = "not among the best"
    study.tell({"trial": stopped.id, "state": "stopped", "reason": early, "epoch": 2, "sa": 0.9, "ra": 0.8})
    study.tell({"trial": failed.id, "state": "failed", "reason": "its process was killed"})
    study.tell({"trial": nan.id, "state": "complete", "sa": float("nan"), "ra": 0.1, "flops": 1e6})
    figure = figures(done.values)
    for seen in trials(study), trials(begin(objectives=("sa", "ra", "cost"))):
        states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
        assert [trial.state for trial in seen] == states
        assert [trial.values for trial in seen] == [[figure["sa"], figure["ra"], figure["flops"]], None, None, None]
        assert [trial.user_attrs["id"] for trial in seen] == [done.id, stopped.id, failed.id, nan.id]
        assert seen[0].user_attrs["folder"].endswith(f"sweep/trials/{done.id}")
        assert seen[1].user_attrs["ra"] == 0.8
        assert [trial.user_attrs.get("reason") for trial in seen[1:3]] == [
            "not among the best",
            "its process was killed",
        ]
        assert "sa is nan" in seen[3].user_attrs["reason"]
        assert [trial.params for trial in seen] == [p.values for p in (done, stopped, failed, nan)]
    assert [r["state"] for r in study.ledger.records() if r["kind"] == "ended"] == [
        "complete",
        "stopped",
        "failed",
        "failed",
    ]


def test_directions(begin: Begin, tmp_path: Path) -> None:
    begin(objectives=("sa", "ra", "cost"))
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "sweep" / "optuna.journal"))
    )
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MAXIMIZE", "MINIMIZE"]
    assert study.metric_names == ["sa", "ra", "cost"]


def test_an_end_is_recorded_once(begin: Begin) -> None:
    study = begin()
    proposal = asked(study)
    complete(study, proposal)
    study.tell({"trial": proposal.id, "state": "failed", "reason": "told twice"})
    assert [r["state"] for r in study.ledger.records() if r["kind"] == "ended"] == ["complete"]
    assert study.num_ended == begin().num_ended == 1


def test_no_trial_stays_running_but_those_to_be_run(begin: Begin) -> None:
    study = begin()
    first, second = asked(study), asked(study)
    complete(study, first)
    rebuilt = begin()
    assert rebuilt.pending == [second]
    assert [t.number for t in trials(rebuilt) if t.state == TrialState.RUNNING] == [second.number]
    complete(rebuilt, second)
    assert rebuilt.pending == []
    assert [t.state for t in trials(rebuilt)] == [TrialState.COMPLETE] * 2


def test_the_ledger_comes_first(begin: Begin) -> None:
    """What a driver killed at the worst moment leaves: Optuna has a trial of which the ledger knows nothing."""
    study = begin()
    complete(study, asked(study))
    journal = study.ledger.path.parent / "optuna.journal"
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    optuna.load_study(study_name="sweep", storage=storage).ask()
    assert len(trials(study)) == 2
    rebuilt = begin()
    assert [t.state for t in trials(rebuilt)] == [TrialState.COMPLETE]
    assert asked(rebuilt).number == 1


def test_a_trial_never_runs_twice(begin: Begin) -> None:
    study = begin(space=SMALL, sampler="random")
    proposals = [asked(study)]
    while (proposal := study.ask()) is not None:
        complete(study, proposals[-1])
        proposals.append(proposal)
    assert len(proposals) == len({p.id for p in proposals}) == 4
    assert study.finished is not None and "nothing new is left" in study.finished
    # The last one has not ended; whoever proposed it again waits with it.
    running = {t.user_attrs.get("id", proposals[-1].id) for t in trials(study) if t.state == TrialState.RUNNING}
    assert running == {proposals[-1].id}
    complete(study, proposals[-1])
    seen = trials(study)
    assert len(seen) > MOST_REPEATS and {t.state for t in seen} == {TrialState.COMPLETE}
    for trial in seen:
        assert trial.values == [figures(trial.params)["sa"], figures(trial.params)["ra"]]
    rebuilt = begin(space=SMALL, sampler="random")
    assert [(t.params, t.state, t.values) for t in trials(rebuilt)] == [(t.params, t.state, t.values) for t in seen]
    assert rebuilt.num_ended == 4 and rebuilt.pending == []


def test_a_grid_is_walked_once(begin: Begin) -> None:
    study = begin(space=SMALL, sampler="grid")
    points = []
    while (proposal := study.ask()) is not None:
        points.append((proposal.values[STEPS], proposal.values[LR]))
        complete(study, proposal)
        study = begin(space=SMALL, sampler="grid")
    assert sorted(points) == [(3, 0.1), (3, 0.3), (5, 0.1), (5, 0.3)]
    assert study.finished == "every point of the grid has been proposed"


def test_what_cannot_be_a_run_has_failed(begin: Begin) -> None:
    # No batch of 16 images can be cut into 32 shards.
    space = Space.from_text({"batch_size": "choice(16, 64)", "shards": "choice(8, 32)", LR: "log(0.01, 1)"})
    study = begin(space=space, sampler="random")
    proposals = [asked(study) for _ in range(8)]
    wrong = [p for p in proposals if p.run is None]
    assert 0 < len(wrong) < 8 and all("batch_size: 16" in p.reason for p in wrong)
    assert begin(space=space, sampler="random").pending == proposals
    study = begin(space=space, sampler="random")
    for proposal in wrong:
        study.tell({"trial": proposal.id, "state": "failed", "reason": proposal.reason})
    assert [t.number for t in trials(study) if t.state == TrialState.FAIL] == [p.number for p in wrong]
    assert study.pending == [p for p in proposals if p.run is not None]


@pytest.mark.filterwarnings("ignore:.*damaged and skipped")
def test_a_lost_line_costs_its_trial_alone(begin: Begin) -> None:
    study = begin(sampler="random")
    proposals = [asked(study) for _ in range(4)]
    lines = study.ledger.path.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"asked", b"aksed")
    study.ledger.path.write_bytes(b"".join(lines[:4]))
    rebuilt = begin(sampler="random")
    assert [p.number for p in rebuilt.pending] == [0, 2]
    assert asked(rebuilt) == proposals[3]
    assert proposals[1].id not in {p.id for p in rebuilt.pending}


# Storage


@pytest.fixture(params=["journal", "sqlite"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "shared").mkdir()
    return f"sqlite:///{tmp_path}/shared/db" if request.param == "sqlite" else f"{tmp_path}/shared/journal"


def test_two_searches_at_a_time_in_one_storage(begin: Begin, shared: str) -> None:
    errors: list[BaseException] = []

    def run(name: str) -> None:
        try:
            study = begin(name, name=name, storage=shared, sampler="tpe")
            for _ in range(5):
                complete(study, asked(study))
        except BaseException as error:  # noqa: BLE001 (a thread's is shown by the test)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    # One begins anew meanwhile: the other's trials stay as they are.
    begin("one", name="one", storage=shared)
    alone = begin("alone", name="one", sampler="tpe")
    for _ in range(5):
        complete(alone, asked(alone))
    values = [t.params for t in stranger("one", shared).get_trials()]
    assert values == [t.params for t in stranger("two", shared).get_trials()]
    assert values == [p["values"] for p in alone.ledger.records() if p["kind"] == "asked"]


def stranger(name: str, storage: str) -> optuna.Study:
    if "://" in storage:
        return optuna.load_study(study_name=name, storage=storage)
    backend = optuna.storages.journal.JournalFileBackend(storage)
    return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend))


def test_another_space_under_the_name_is_refused(begin: Begin, shared: str) -> None:
    study = begin("one", storage=shared)
    complete(study, asked(study))
    before = stranger("sweep", shared).get_trials()
    with pytest.raises(InputError, match="another --run-name") as caught:
        begin("two", space=SMALL, storage=shared)
    for path, text in [*SPACE.as_text().items(), *SMALL.as_text().items()]:
        assert path in str(caught.value) and text in str(caught.value)
    with pytest.raises(InputError, match="another search's"):
        begin("three", storage=shared)
    assert stranger("sweep", shared).get_trials() == before
    assert [r["kind"] for r in Ledger(Path(study.ledger.path.parents[1], "two", "ledger.jsonl")).records()] == ["sweep"]


def test_a_study_that_is_not_ours_is_refused(begin: Begin, shared: str) -> None:
    begin("any", name="any", storage=shared)
    theirs = optuna.create_study(study_name="sweep", storage=stranger("any", shared)._storage)
    theirs.ask()
    with pytest.raises(InputError, match="none of a search of ours"):
        begin("one", storage=shared)
    assert len(stranger("sweep", shared).get_trials()) == 1


@pytest.mark.parametrize("cut", [1, 2, 9, 40])
def test_a_torn_journal_is_mended(begin: Begin, cut: int) -> None:
    study = begin()
    complete(study, asked(study))
    last = asked(study)
    journal = study.ledger.path.parent / "optuna.journal"
    journal.write_bytes(journal.read_bytes()[:-cut])
    rebuilt = begin()
    assert rebuilt.pending == [last]
    assert len(trials(rebuilt)) == 2


def test_a_damaged_journal_of_ours_is_set_aside(begin: Begin) -> None:
    study = begin()
    complete(study, asked(study))
    journal = study.ledger.path.parent / "optuna.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:3], lines[3][:-9] + b"\n", *lines[4:]]))
    with pytest.warns(UserWarning, match="was damaged, and is rebuilt"):
        rebuilt = begin()
    assert [t.state for t in trials(rebuilt)] == [TrialState.COMPLETE]
    assert len(list(journal.parent.glob("optuna.journal.damaged-*"))) == 1


def test_a_damaged_journal_of_others_is_refused(begin: Begin, tmp_path: Path) -> None:
    theirs = tmp_path / "notes.txt"
    theirs.write_text("not a journal\nat all\n")
    with pytest.raises(InputError, match=r"notes\.txt: is no Optuna journal"):
        begin(storage=str(theirs))
    assert theirs.read_text() == "not a journal\nat all\n"


def test_a_killed_drivers_lock_is_not_waited_for(begin: Begin) -> None:
    journal = begin().ledger.path.parent / "optuna.journal"
    Path(f"{journal}.lock").symlink_to(journal)
    start = time.monotonic()
    begin()
    assert time.monotonic() - start < 10  # Optuna's own patience is 30 s


@pytest.mark.parametrize(
    "url, reason",
    [
        ("postgresql://me:secret@127.0.0.1:1/trials", "psycopg"),
        ("mysqll://me:secret@host/trials", "mysqll"),
        ("sqlite:////nowhere/at/all/db", "unable to open"),
        ("://", "parse"),
    ],
)
def test_a_database_that_cannot_be_had(begin: Begin, url: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        begin(storage=url)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_had(begin: Begin, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        begin(storage=str(tmp_path / "nowhere" / "journal"))


@pytest.mark.parametrize("option", [{"sampler": "tpee"}, {"objectives": ("sa", "raa")}])
def test_unknown_names(begin: Begin, option: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="did you mean"):
        begin(**option)


# Importances


def tell_all(study: Study, num: int, outcome: Callable[[dict[str, Any]], tuple[float, float]]) -> None:
    for _ in range(num):
        proposal = asked(study)
        sa, ra = outcome(proposal.values)
        study.tell({"trial": proposal.id, "state": "complete", "sa": sa, "ra": ra, "flops": 1e6})


def test_importances(begin: Begin) -> None:
    study = begin(sampler="random")
    tell_all(study, 30, lambda v: (1 - v[EPS], 0.5 - abs(v[LR] - 0.1) + v[STEPS] / 1000))
    sa, ra = study.importances("sa"), study.importances("ra")
    assert max(sa, key=sa.__getitem__) == EPS and sa[EPS] > 0.6
    assert max(ra, key=ra.__getitem__) == LR and ra[LR] > 0.6
    assert set(sa) == set(ra) == {EPS, LR, STEPS}
    assert sum(sa.values()) == pytest.approx(1)


def test_importances_explain_what_is_best(begin: Begin) -> None:
    """A field that tells apart only the worst says nothing of the best, and the other way round."""
    study = begin(sampler="random")
    tell_all(study, 40, lambda v: (0.5 + max(0.0, v[EPS] - 0.2) - 0.001 * v[LR], 0.5))
    assert study.importances("sa")[EPS] > 0.6
    assert study.importances("ra") == {}  # all alike


def test_importances_are_of_complete_trials(begin: Begin) -> None:
    study = begin(sampler="random")
    tell_all(study, 7, lambda v: (1 - v[EPS], v[LR]))
    for _ in range(10):
        study.tell({"trial": asked(study).id, "state": "stopped", "reason": "early", "sa": 0.9, "ra": 0.9})
    assert study.importances("sa") == {}
    tell_all(study, 1, lambda v: (1 - v[EPS], v[LR]))
    assert set(study.importances("sa")) == {EPS, LR, STEPS}


def test_importances_of_fields_that_only_some_trials_have(begin: Begin) -> None:
    study = begin(space=CONDITIONAL, sampler="random")
    tell_all(study, 32, lambda v: (1 - v.get("objective.beta", 8) / 20, 0.5 + 0.01 * v[LR]))
    sa = study.importances("sa")
    assert set(sa) == {"objective", "objective.beta", LR}
    assert sa[LR] < sa["objective"] and sa[LR] < sa["objective.beta"]
