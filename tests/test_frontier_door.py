"""The door of the frontier: what it refuses, in one line and before anything starts; what it keeps and what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from robustscale import recipes
from robustscale.cli import door
from robustscale.config import decode
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.frontier import main
from robustscale.models.network import build
from robustscale.reports.finish import finish_frontier
from robustscale.reports.frontier_points import test_text as judged_text
from robustscale.run import Cluster, Run
from robustscale.types import DataSpec
from tune.fidelity import Fidelity
from tune.search import slots
from tune.settings import Settings
from tune.spaces import Space
from tune.summary import summary, write_recipes
from tune.sweep import Sweep

SMALL = ["digits", "--model.base", "4", "--epochs", "6"]
FIGURES = {"epoch": 6, "sa": 0.9, "ra": 0.5, "n": 144, "flops": 10**9, "seconds": 2.0}


class Door:
    """`python -m robustscale.frontier ARGS`, where no cluster answers: what is only found out there is another error
    than is asserted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args: object) -> tuple[object, str, str]:
        """Exit code, stdout, stderr."""
        self.monkeypatch.setattr("sys.argv", ["frontier", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            door(main)
        said = self.capsys.readouterr()
        return caught.value.code, said.out, said.err

    def refused(self, *args: object) -> str:
        """The one line of stderr. Of data it may have been told before that they are there."""
        code, out, err = self(*args)
        assert code == 2 and all("preparing data" in line for line in out.splitlines()), out
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
        return err.removeprefix("error: ").strip()


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Door:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("ROBUSTSCALE_STORAGE", str(tmp_path))
    return Door(monkeypatch, capsys)


# --- Bad input


BAD = [
    # Ranges.
    ("digits objective.beta=log()", "objective.beta: log() is empty; give its two ends"),
    ("digits objective.beta=", "objective.beta=: names no range; write PATH=RANGE"),
    ("digits objective.beta=choice()", "objective.beta: choice() is empty"),
    ("digits objective.beta=uniform(1,0.1)", "uniform(1,0.1) runs from high to low; write uniform(0.1,1)"),
    ("digits objective.beta=uniform(0.5,0.5)", "uniform(0.5,0.5) is one point; fix it with --objective.beta 0.5"),
    ("digits objective.beta=choice(0.5)", "choice(0.5) is one point; fix it with --objective.beta 0.5"),
    ("digits objective.beta=lg(1,2)", "objective.beta: range: 'lg' is not known; did you mean 'log'?"),
    ("digits objective.beta=0.5", "'0.5' is no range; write uniform(0,1)"),
    ("digits objective.beta=log(a,1)", "'a' is not a number"),
    ("digits optimizer.lr=recipe objective.beta=recipe objective.attack.threat.eps=recipe", "space: has no dimension"),
    # Fields.
    ("digits objective.bta=log(0.1,1)", "objective.bta: 'bta' is not known; did you mean 'beta'?"),
    ("digits objctive=choice(trades,mart)", "objctive: 'objctive' is not known; did you mean 'objective'?"),
    ("digits objective=choice(trades,mrt)", "objective: 'mrt' is not known; did you mean 'mart'?"),
    ("digits optimizr.lr=recipe", "optimizr.lr=recipe: dimension: 'optimizr.lr' is not known; did you mean"),
    ("digits seed=int(0,4)", "seed: is chance"),
    ("digits evaluation.attack.steps=int(1,9)", "evaluation.attack.steps: is what every trial is judged by"),
    ("digits data.held_out=uniform(0.1,0.2)", "data.held_out: is of the data that all trials share"),
    # Options.
    ("digits --trails 3", "option: '--trails' is not known; did you mean '--trials'?"),
    ("digits --epoch 3", "option: '--epoch' is not known; did you mean '--epochs'?"),
    ("digits --dashbord", "option: '--dashbord' is not known; did you mean '--dashboard'?"),
    ("digits --fidelity.epoch 3", "option: '--fidelity.epoch' is not known; did you mean '--fidelity.epochs'?"),
    ("digts", "recipe: 'digts' is not known; did you mean 'digits'?"),
    ("digits --trials -1", "trials: -1 is below 1"),
    ("digits --trials x", "--trials: invalid literal for int() with base 10: 'x'"),
    ("digits --trials", "--trials: needs a value"),
    ("digits --judge-steps 0", "judge_steps: 0 is below 1"),
    ("digits --finalists 0", "finalists: 0 is below 1"),
    ("digits --sampler tp", "'tp'"),
    ("digits --objectives sa", "objectives: 'sa' will not do; take sa,ra or sa,ra,cost"),
    ("digits --objectives sa,ra,costs", "objectives: 'sa,ra,costs' will not do"),
    ("digits --noise nan", "noise: nan is outside [0, 1)"),
    ("digits --hang 0", "hang: 0.0 is not positive"),
    ("digits --gpus-per-worker 2", "gpus_per_worker: 2.0 is outside (0, 1]"),
    ("digits --gpus-per-worker 0.5 --cluster.workers 2", "gpus_per_worker: 0.5 for trials of 2 workers"),
    ("digits --fidelity.epochs 3000", "fidelity.epochs: 3000 are more than the recipe's 20"),
    ("digits --fidelity.width 2", "fidelity.width: 2.0 is outside (0, 1]"),
    ("digits --data.held-out 0", "data.held_out: is 0, and trials are compared on the held-out part"),
    ("digits --data.held-out 0.0001", "data.held_out: 0.0001 of these images is none"),
    ("digits --data.source nowhere", "nowhere: neither a kind of source nor a path that exists"),
    ("digits --run-name ../up", "name: '../up' will not do"),
    ("digits --lam 0:1:3", "--lam: goes with --from-run, not with a search"),
    ("digits --at=0:1:3", "--at: goes with --interpolate or --mix, not with a search"),
    ("digits --port 8080", "--port: goes with --dashboard, not with a search"),
    # Folders.
    ("--resume none", "none: not a search's folder"),
    ("cifar10 --resume", "cifar10-frontier: not a search's folder"),
    ("--report none", "none: not a search's folder"),
    ("--report", "--report: needs a value"),
    ("--report none --trials 3", "--trials: not an option here"),
    ("--dashboard", "no search there; name its folder: --dashboard FOLDER"),
    ("--dashboard none", "none: not a search's folder"),
    ("--dashboard --port abc", "--port: 'abc' is not a whole number"),
    ("--dashboard --trials 3", "--trials: not an option here"),
    # Points of finished runs; RUN is one without λ.
    ("--from-run none", "none: not a run's folder"),
    ("--from-run", "--from-run: needs a value"),
    ("--from-run RUN RUN", "--from-run: takes one run, got 2"),
    ("--from-run RUN", "lam: no point to judge"),
    ("--from-run RUN --lam 0:1:3", "lam: the network is not conditional"),
    ("--from-run RUN --at 0:1:3", "--at: is for --interpolate and --mix; --from-run takes --lam and --width"),
    ("--from-run RUN --lam 0:1:0", "--lam: '0:1:0' will not do; write 0,0.2,1 or FIRST:LAST:COUNT"),
    ("--from-run RUN --lam 0:1:-3", "--lam: '0:1:-3' will not do"),
    ("--from-run RUN --lam 0:1", "--lam: '0:1' will not do"),
    ("--from-run RUN --lam a", "--lam: 'a' will not do"),
    ("--from-run RUN --lam 0,nan", "--lam: '0,nan' will not do"),
    ("--from-run RUN --lam 0 --workers x", "--workers: 'x' is not a whole number"),
    ("--from-run RUN --lam 0 --workers 0", "workers: 0 is below 1"),
    ("--from-run RUN --lam 0 --steps 0", "steps: 0 is below 1"),
    ("--from-run RUN --lam 0 --stesp 3", "option: '--stesp' is not known; did you mean '--steps'?"),
    ("--from-run RUN --lam 0 --beside none", "none: not a run's folder"),
    ("--interpolate RUN", "--interpolate: takes two runs, got 1"),
    ("--interpolate RUN RUN --lam 0,1", "--lam, --width: are for --from-run; --interpolate takes --at"),
    ("--interpolate RUN RUN --at 0:2:3", "t: "),
    ("--mix RUN RUN --at=-1", "alpha: "),
    ("--mix RUN RUN --from-run RUN", "--from-run and --mix: choose one of them"),
]


@pytest.fixture
def plain_run(tmp_path: Path) -> Path:
    """What is read of a finished run before anything starts."""
    run = dataclasses.replace(recipes.get("digits"), name="plain")
    folder, spec = RunFolder(tmp_path / "plain"), DataSpec(1, 8, 8, 10, (0.3,), (0.2,))
    folder.write_run(run)
    part = {"fingerprint": "0", "rows": 10}
    folder.write("data.json", {"spec": spec._asdict(), "held_out": 4, "train": part, "test": part})
    folder.write("result.json", {"weights": "last"})
    folder.save_weights("last", build(run.model, spec))
    return folder.path


@pytest.mark.parametrize("args, message", BAD, ids=[args for args, _message in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    enter: Door, plain_run: Path, tmp_path: Path, args: str, message: str
) -> None:
    before = sorted(plain_run.rglob("*"))
    assert message in enter.refused(*(str(plain_run) if word == "RUN" else word for word in args.split()))
    assert sorted(plain_run.rglob("*")) == before
    assert not list(tmp_path.rglob("ledger.jsonl"))


@pytest.mark.parametrize(
    "cluster, settings, message",
    [
        (Cluster(workers=4), {}, "one trial needs 4 CPUs (the cluster has 2) and 4 GPUs (the cluster has 1)"),
        (Cluster(workers=1, cpus_per_worker=3), {}, "3 CPUs (the cluster has 2)"),
    ],
)
def test_too_few_resources_for_one_trial(cluster: Cluster, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^cluster.workers: .*; lower it, or add nodes$") as caught:
        slots(cluster, Settings(**settings), True, {"CPU": 2, "GPU": 1})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "settings, gpu, there, room",
    [
        ({}, False, {"CPU": 6.0}, 6),
        ({"concurrent": 4}, False, {"CPU": 6.0}, 4),
        ({}, True, {"CPU": 16.0, "GPU": 2.0}, 2),
        ({"gpus_per_worker": 0.1}, True, {"CPU": 16.0, "GPU": 1.0}, 10),
    ],
)
def test_as_many_trials_at_a_time_as_there_is_room_for(
    settings: dict[str, Any], gpu: bool, there: dict[str, float], room: int
) -> None:
    assert slots(Cluster(workers=1), Settings(**settings), gpu, there) == room


# --- A search that has begun


def begun(path: Path, settings: Settings | None = None) -> tuple[Sweep, Run]:
    run = recipes.get("digits")
    run = dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, workers=1))
    sweep = Sweep(path)
    sweep.begin(run, Space.of(run), settings or Settings())
    sweep.write("data.json", {"spec": DataSpec(1, 8, 8, 10, (0.3,), (0.2,))._asdict()})
    return sweep, run


def ended(sweep: Sweep, number: int, state: str, **figures: Any) -> str:
    trial, values = f"{number:016x}", {"objective.beta": 0.1 * number, "objective.attack.threat.eps": 0.05}
    sweep.ledger().append(
        {
            "kind": "asked",
            "trial": trial,
            "number": number,
            "values": values | {"optimizer.lr": 0.3},
            "attributes": {"trial": {}, "study": {}},
        }
    )
    sweep.ledger().append({"kind": "ended", "trial": trial, "state": state, **FIGURES, "reason": None, **figures})
    return trial


def test_a_folder_that_holds_another_space_is_refused_and_both_are_shown(enter: Door, tmp_path: Path) -> None:
    begun(tmp_path / "digits-frontier")
    code, _out, err = enter("digits", "objective.beta=uniform(0.2,0.5)", "model.base=choice(4,8)")
    assert code == 2 and err.startswith(f"error: {tmp_path}/digits-frontier: holds a search of another space; take")
    rows = [line.split() for line in err.splitlines()]
    assert ["*", "objective.beta", "uniform(0,1)", "uniform(0.2,0.5)"] in rows
    assert ["*", "model.base", "-", "choice(4,8)"] in rows


@pytest.mark.parametrize(
    "args, message",
    [
        ("digits --epochs 3", "holds another search (epochs: 20 there, 3 now); take another --run-name"),
        ("--resume digits-frontier --epochs 3", "holds another search (epochs: 20 there, 3 now)"),
        ("digits --objectives sa,ra,cost", "objectives was ['sa', 'ra'], now ['sa', 'ra', 'cost']"),
        ("--resume digits-frontier --judge-steps 3", "judge_steps was 10, now 3"),
        ("digits --resume --fidelity.epochs 3", "fidelity was "),
    ],
)
def test_a_search_goes_on_as_it_began_or_not_at_all(enter: Door, tmp_path: Path, args: str, message: str) -> None:
    begun(tmp_path / "digits-frontier")
    assert message in enter.refused(*args.split())


def test_what_was_refused_late_is_in_nobodys_way(enter: Door, tmp_path: Path) -> None:
    """A wrong data set is found when it is looked for: the corrected command must not find another search there."""
    assert "nowhere" in enter.refused("digits", "--data.source", "nowhere")
    assert not (tmp_path / "digits-frontier" / "ledger.jsonl").exists()


def test_resume_goes_on_by_the_options_of_the_last_start(tmp_path: Path) -> None:
    first = Settings(
        trials=50, sampler="nsga2", objectives="sa,ra,cost", fidelity=Fidelity(epochs=5), noise=0.02, optuna="sqlite://"
    )
    sweep, run = begun(tmp_path / "sweep", first)
    assert sweep.begun()[2] == dataclasses.replace(first, optuna=None)
    more = dataclasses.replace(first, trials=90)
    sweep.begin(run, Space.of(run), more)
    sweep.begin(run, Space.of(run), more)
    assert sweep.begun()[2] == dataclasses.replace(more, optuna=None)
    assert [record["kind"] for record in sweep.ledger().records()] == ["sweep", "options", "options"]
    assert "sqlite" not in sweep.ledger_path.read_text()


def test_print_space_is_what_the_command_line_takes(enter: Door, tmp_path: Path) -> None:
    code, out, err = enter("digits", "--print-space", "model.base=choice(4,8)")
    assert (code, err, list(tmp_path.iterdir())) == (0, "", [])
    assert enter("digits", "--print-space", *out.split()) == (0, out, "")
    assert "objective.beta=uniform(0,1)" in out.split()


def test_help_names_every_option(enter: Door) -> None:
    code, out, _err = enter("--help")
    assert code == 0
    options = [
        f"--{field.name}".replace("_", "-") for field in dataclasses.fields(Settings) if field.name != "fidelity"
    ]
    options += [f"--fidelity.{field.name}".replace("_", "-") for field in dataclasses.fields(Fidelity)]
    modes = ["--from-run", "--interpolate", "--mix", "--beside", "--lam", "--width", "--at", "--steps", "--weights"]
    others = ["--report", "--dashboard", "--port", "--resume", "--run-name", "--storage", "--print-space", "--workers"]
    assert [option for option in [*options, *modes, *others] if option not in out] == []
    assert [name for name in recipes.names() if name not in out] == []


# --- What comes of it


SAME = ["digits", "--trials", "2"]


def test_a_search_that_is_finished_is_shown_without_ray(enter: Door, tmp_path: Path) -> None:
    """No cluster answers; and its figures on the test set are there."""
    sweep, _run = begun(tmp_path / "digits-frontier")
    (sweep.path / "data.json").unlink()
    for number, ra in enumerate((0.5, 0.3)):
        trial = ended(sweep, number, "complete", ra=ra, sa=0.9 - ra / 10)
        sweep.ledger().append({"kind": "judged", "trial": trial, "test": {"sa": 0.8, "ra": 0.2, "n": 9, "ball": ""}})
    code, out, err = enter(*SAME)
    assert code == 0, err
    assert "2 trials have ended; a larger --trials goes on" in err + out
    assert "one more point of RA costs" in out and (sweep.path / "frontier.html").is_file()
    assert enter("--report", "digits-frontier")[:2] == (0, out[out.index("digits, resnet_cifar") :])


def test_of_a_search_without_a_frontier_the_last_line_and_the_exit_code_say_so(enter: Door, tmp_path: Path) -> None:
    sweep, _run = begun(tmp_path / "digits-frontier")
    (sweep.path / "data.json").unlink()
    ended(sweep, 0, "stopped", epoch=2)
    ended(sweep, 1, "failed", reason="the loss is not finite;\nlower optimizer.lr", sa=None, ra=None, epoch=None)
    code, out, err = enter(*SAME)
    assert code == 1
    assert err.splitlines()[-1] == (
        "error: none of 2 trials ran to its end, so there is no frontier; "
        "the last to fail: the loss is not finite; lower optimizer.lr"
    )
    assert "frontier.html" in out and "No frontier" in (sweep.path / "frontier.html").read_text()
    # To look at a search is no failure: it may be running.
    assert enter("--report", sweep.path)[0] == 0


def test_retrain_is_of_the_whole_recipe_with_the_trials_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, run = begun(tmp_path / "sweep", Settings(fidelity=Fidelity(epochs=5, attack_steps=2, share=0.5, width=0.5)))
    on, beaten, stopped = (
        ended(sweep, k, state, ra=0.1 * k) for k, state in ((3, "complete"), (1, "complete"), (2, "stopped"))
    )
    found = summary(sweep)
    little = "5 of 20 epochs, pgd-2 instead of 7, 50 % of the training images, half the width"
    assert found["fidelity"] == little
    finish_frontier(sweep, found)
    assert little in (sweep.path / "frontier.html").read_text() and little in capsys.readouterr().out
    write_recipes(sweep, found)
    commands = {trial["id"]: trial["commands"] for trial in found["trials"]}
    assert commands[stopped] == {} and not (sweep.trial(stopped).path / "recipe.json").exists()
    for trial, beta in ((on, 0.1 * 3), (beaten, 0.1)):
        path = sweep.trial(trial).path / "recipe.json"
        assert f"--config {path} " in commands[trial]["retrain"]
        whole = decode(Run, json.loads(path.read_text()))
        assert (whole.epochs, whole.data.share, whole.model) == (run.epochs, 1.0, run.model)
        assert (whole.objective.attack.steps, whole.objective.attack.threat.eps) == (run.objective.attack.steps, 0.05)  # type: ignore[attr-defined]
        assert (whole.objective.beta, whole.evaluation) == (beta, run.evaluation)  # type: ignore[attr-defined]


# --- A search beside a run


@pytest.mark.parametrize(
    "attack, n, train, args, message",
    [
        ("apgd-10 linf 0.1", 4, "1", "--lam 0", "searched on another train set; leave it out of --beside"),
        ("apgd-3 linf 0.1", 4, "0", "--lam 0", "were judged by apgd-3 linf 0.1 on 4 images, these points by apgd-10"),
        ("apgd-10 linf 0.1", 5, "0", "--lam 0", "on 5 images, these points by apgd-10 linf 0.1 on 4; set --steps"),
        ("apgd-10 linf 0.1", 4, "0", "--lam 0 --steps 5", "these points by apgd-5 linf 0.1 on 4"),
        ("apgd-10 linf 0.1", 4, "0", "--lam 0", "lam: the network is not conditional"),  # they fit: so far, it came
    ],
)
def test_what_cannot_stand_beside_a_run_is_refused_before_it_is_judged(
    enter: Door, plain_run: Path, tmp_path: Path, attack: str, n: int, train: str, args: str, message: str
) -> None:
    sweep, _run = begun(tmp_path / "search")
    sweep.write("data.json", {"train": {"fingerprint": train}, "test": {"fingerprint": "0"}})
    assert "search: has no frontier.json yet; run --report" in enter.refused(
        "--from-run", plain_run, "--lam", 0, "--beside", "search"
    )
    sweep.write("frontier.json", {"attack": attack, "n": n})
    assert message in enter.refused("--from-run", plain_run, *args.split(), "--beside", "search")


def test_one_search_beside_runs_and_none_beside_a_mixture(enter: Door, plain_run: Path, tmp_path: Path) -> None:
    begun(tmp_path / "search")
    two = ["--beside", "search", "search"]
    assert "--beside: takes one search at most" in enter.refused("--from-run", plain_run, "--lam", 0, *two)
    assert "--beside: a mixture is judged by" in enter.refused("--mix", plain_run, plain_run, *two[:2])


def test_figures_of_other_attacks_are_told_apart() -> None:
    """Finalists are judged by the full evaluation, points of a run by its own attack unless --full says otherwise."""
    trial = {"test": {"n": 360, "ball": "linf 0.1", "attacks": {"apgd-100": 0.2, "square": 0.3}}}
    point = {"test": {"n": 360, "ball": "linf 0.1", "attacks": {"pgd-20": 0.6}}}
    curve = {"name": "dedicated runs", "points": [point]}
    assert judged_text({"trials": [trial], "curves": [curve]}) == (
        "360 test images in the ball linf 0.1; trials: RA the worst of apgd-100, square; dedicated runs: RA pgd-20"
    )
    assert judged_text({"trials": [], "curves": [curve]}) == "360 test images in the ball linf 0.1, RA pgd-20"
