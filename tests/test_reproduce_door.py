"""What `python -m robustscale.reproduce` says and refuses before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from robustscale import experiments, reproduce
from robustscale.engine.schedule import Cosine
from robustscale.errors import InputError
from robustscale.experiments.base import SCALES
from robustscale.run import Run
from tests.edges.tiny_grid import tiny
from tune.grid import Course, plan
from tune.grid_run import GridSettings


def door(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce", *args])
    return reproduce.main()


def test_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        door(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert ended.value.code == 0
    for words in (
        "--plan-only",
        "--source-data",
        "--gpus-per-worker",
        "smoke: pretraining set digits_source",
        "--leaks",
    ):
        assert words in out


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "NAME: is missing"),
        (["--scale", "smoke"], "NAME: is missing"),
        (["no_such_experiment"], "experiment: 'no_such_experiment' is not known"),
        (["thesis_4_1", "--rows", "λ 0; λ 7"], "rows: MIT thesis, table 4.1 has no 'λ 7'; it has λ 0; λ 0.1"),
    ],
)
def test_what_is_wrong_is_one_line(args: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as refused:
        door(monkeypatch, *args)
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


@pytest.mark.parametrize("wrong", [{"concurrent": 0}, {"gpus_per_worker": 1.5}, {"retries": -1}, {"hang": 0.0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: "):
        GridSettings(**wrong)  # type: ignore[arg-type]


def test_options_replace_parts_of_a_scale() -> None:
    options, settings = reproduce._parsed(["--scale", "medium", "--seeds", "2", "--share", "0.5", "--retries", "3"])
    scale = options.scaled()
    assert (scale.name, scale.seeds, scale.share, scale.epochs) == ("medium", 2, 0.5, SCALES["medium"].epochs)
    assert settings.retries == 3
    with pytest.raises(InputError, match="option: '--sed' is not known; did you mean '--seeds'"):
        reproduce._parsed(["--sed", "2"])


def test_fields_of_every_run_may_be_given(tmp_path: Path) -> None:
    experiment = tiny(SCALES["smoke"], str(tmp_path), 2, broken=False)
    changed = experiment.changed(
        lambda run: reproduce._here(run, 2, ["data.loader=resident", "precision=bf16", "batch_size=32"])
    )
    runs = [node.training.run for node in plan(changed, 1).values()]
    assert all(run.precision == "bf16" and run.batch_size == 32 and run.cluster.workers == 2 for run in runs)
    assert all(run.data.loader == "resident" for run in runs)
    with pytest.raises(InputError, match="batchsize"):
        experiment.changed(lambda run: reproduce._here(run, 1, ["batchsize=32"]))


def test_the_report_tells_the_fields_that_were_given() -> None:
    asked = experiments.get("course_pretrain", SCALES["smoke"])
    changed = reproduce._with_fields(asked, 1, ["precision=bf16", "batch_size=32"])
    assert changed.notes == (*asked.notes, "Every run with precision=bf16, batch_size=32.")
    assert reproduce._with_fields(asked, 1, []).notes == asked.notes


def test_leaks_are_left_out_of_what_is_pretrained_on_alone() -> None:
    asked = experiments.get("course_pretrain", SCALES["smoke"])
    changed = reproduce._with_fields(asked, 1, ["data.leaks=/leaks.json", "precision=bf16"])
    found = {node.training.run.name: node.training.run for node in plan(changed, 1).values()}
    assert [name for name, run in found.items() if run.data.leaks is not None] == ["course-imagenet32"]
    assert all(run.precision == "bf16" for run in found.values())


def test_what_is_frozen_is_frozen_in_what_is_tuned_alone() -> None:
    asked = experiments.get("course_pretrain", SCALES["smoke"])
    changed = reproduce._with_fields(asked, 1, ["transfer.frozen=3", "precision=bf16", "data.leaks=/leaks.json"])
    found = {node.training.run.name: node.training.run for node in plan(changed, 1).values()}
    assert [name for name, run in found.items() if run.transfer.frozen == 3] == ["course-tuned"]
    assert changed.notes[len(asked.notes) :] == (
        "What is tuned with transfer.frozen=3.",
        "Every run with precision=bf16.",
        "What is pretrained with data.leaks=/leaks.json.",
    )


@pytest.mark.parametrize("entry", ["batch_size=32", "evaluation.attack.steps=3", "optimizer.momentum=0.8", "clip=1.0"])
def test_what_the_trainings_are_not_about_may_be_given(entry: str) -> None:
    """Also where pretraining and tuning differ in it: how they are done."""
    reproduce._with_fields(experiments.get("course_pretrain", SCALES["smoke"]), 1, [entry])


@pytest.mark.parametrize("turned", [1, -1])
def test_a_component_and_its_fields_may_be_given_together(turned: int) -> None:
    run = reproduce._here(Run(), 1, ["schedule=cosine", "schedule.warmup_epochs=1"][::turned])
    assert run.schedule == Cosine(warmup_epochs=1)


def test_the_report_tells_that_leaks_were_ignored() -> None:
    tuned, alone = (experiments.get(name, SCALES["smoke"]) for name in ("course_pretrain", "thesis_4_1"))
    assert "--leaks ignore" in reproduce._not_compared(tuned).notes[-1]
    assert reproduce._not_compared(alone) == alone


@pytest.mark.parametrize(
    "name, entry, words",
    [
        ("thesis_4_1", "epochs=3", "epochs: is set by the scale; give --epochs"),
        ("thesis_4_1", "seed=3", "seed: is set by the scale; give --seeds"),
        ("thesis_5_5", "data.share=0.5", "data.share: is set by the scale; give --share"),
        ("biparo_table_3", "model.name=basic", "PATH=VALUE: with model.name=basic in every run, "),
        ("biparo_fig_2", "evaluation.every=3", "evaluation.every: leaves out epoch 1 of biparo-wrn18-pgd"),
        ("biparo_fig_2", "evaluation.patience=3", "evaluation.patience: would end trainings whose epochs are read"),
        ("thesis_4_1", "divergence.rollbacks=2", "divergence.rollbacks: a training of a plan does not go back"),
        ("thesis_fig_5_1", "checkpoints.snapshots=2", "checkpoints.snapshots: leaves out epoch 1"),
        (
            "course_pretrain",
            "optimizer.lr=0.1",
            "optimizer.lr: is 0.001 in course-tuned and 0.1 in course-imagenet32, as the experiment means them to",
        ),
        ("thesis_5_1", "schedule=cosine", "schedule: is constant (warmup_epochs 0.0) in cinic10-rob-then-rob and "),
        (
            "thesis_5_1",
            "schedule.name=cosine",
            "schedule.name: is constant (warmup_epochs 0.0) in cinic10-rob-then-rob",
        ),
        (
            "thesis_4_1",
            "transfer.frozen=9",
            "transfer.frozen: no training of MIT thesis, table 4.1 starts from another",
        ),
    ],
)
def test_fields_that_the_figures_go_by_are_refused(name: str, entry: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        reproduce._with_fields(experiments.get(name, SCALES["smoke"]), 1, [entry])
    assert str(refused.value).startswith(words) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_takes_fields_that_it_does_not_vary(name: str) -> None:
    reproduce._with_fields(experiments.get(name, SCALES["small"]), 1, ["precision=bf16", "data.loader=resident"])


def test_the_plan_shows_what_hangs_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tiny(SCALES["smoke"], str(tmp_path), 2, broken=False)
    reproduce._show_plan(experiment, SCALES["smoke"], Course.of(plan(experiment, 1)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1].split(",")[0] for line in lines[2:-1]] == [
        "rob",
        "rob-trades-0.5",
        "rob-trades-3.0",
        "natural",
        "natural-trades-0.5",
        "natural-trades-3.0",
    ]
    assert lines[-1] == (
        "6 trainings (2 of them start others) and 1 readings for 9 figures; 7 nodes, 12 epochs of training to do"
    )


def test_of_a_table_some_rows_may_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["thesis_4_1", "--scale", "smoke", "--rows", "λ 0; λ 5", "--storage", str(tmp_path), "--plan-only"]
    assert door(monkeypatch, *args) == 0
    assert "2 trainings (0 of them start others) and 0 readings for 4 figures" in capsys.readouterr().out
