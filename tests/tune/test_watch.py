"""What is told of a sweep that goes on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from robustscale.recipes.digits import digits
from tune.ledger import Ledger
from tune.settings import Settings
from tune.spaces import Space
from tune.study import Study

# No batch of 16 images can be cut into 32 shards.
SPACE = Space.from_text({"optimizer.lr": "log(0.01,1)", "batch_size": "choice(16,64)", "shards": "choice(8,32)"})


def begin(folder: Path) -> Study:
    ledger = Ledger(folder / "ledger.jsonl")
    return Study(ledger, digits(), SPACE, name="sweep", storage=str(folder / "optuna.journal"), sampler="random")


def watch(study: Study, shown: list[dict[str, Any]]) -> Any:
    from tune.watch import Watch  # imports Ray

    return Watch(study, Settings(trials=12), 20, 0.1, shown.append, lambda trial: "its process died")


def end(study: Study, sa: float, ra: float) -> str:
    while True:
        proposal = study.ask()
        assert proposal is not None
        state = "failed" if proposal.run is None else "complete"
        study.tell({"trial": proposal.id, "state": state, "reason": proposal.reason, "epoch": 20, "sa": sa, "ra": ra})
        if proposal.run is not None:
            return proposal.id


def test_trials_of_an_earlier_driver_count_for_rank_and_frontier(tmp_path: Path) -> None:
    first = begin(tmp_path)
    best, worse = end(first, 0.9, 0.5), end(first, 0.8, 0.4)
    study, shown = begin(tmp_path), list[dict[str, Any]]()
    watching = watch(study, shown)
    watching.setup()
    told: dict[str, dict[str, Any]] = {}
    for record in shown[:-1]:
        told.setdefault(record["id"], {}).update(record)
    assert told.keys() == study.ended.keys() and all(record["earlier"] for record in told.values())
    assert (told[best]["rank"], told[worse]["rank"], told[worse]["frontier"]) == (0, 1, False)
    assert told[best]["values"] == study.asked[best]["values"] and told[best]["sa"] == 0.9
    assert abs(shown[-1].pop("hypervolume") - 0.8 * 0.5) < 1e-12
    assert shown[-1] == {"event": "sweep", "ended": study.num_ended, "trials": 12}


def test_what_could_not_be_a_run_is_told_with_its_reason(tmp_path: Path) -> None:
    study, shown = begin(tmp_path), list[dict[str, Any]]()
    watching = watch(study, shown)
    watching.setup()
    assert shown == []
    while not any(ended["state"] == "failed" for ended in study.ended.values()):
        end(study, 0.5, 0.5)
    watching.on_trial_complete(0, [], None)
    failed = [record for record in shown if record.get("state") == "failed"]
    assert failed and all("shards" in record["reason"] and "earlier" not in record for record in failed)
    watching.on_trial_error(0, [], None)  # nothing new: it will be begun again
    assert len([record for record in shown if record["event"] == "sweep"]) == 1


def test_a_trial_that_is_begun_again_is_told_of(tmp_path: Path) -> None:
    study, shown = begin(tmp_path), list[dict[str, Any]]()
    trial = SimpleNamespace(config={"number": 3})
    watch(study, shown).on_trial_recover(0, [], trial)
    message = "trial 3: its process died; begun again, from its last checkpoint"
    assert shown == [{"event": "note", "message": message}]
