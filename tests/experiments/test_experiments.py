"""Every experiment of the source reports: its plan, its published figures, and its verdict on made-up ones."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping

import pytest

from robustscale import experiments
from robustscale.experiments.base import SCALES, Cell, Experiment, Found, Measured, Scale, Training
from robustscale.models.conditional import Conditional
from robustscale.models.network import build, shapes
from robustscale.objectives.adversarial_regularization import AdversarialRegularization
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import require_fit
from robustscale.types import DataSpec
from tests.experiments.claims import BEST, CLAIMS, PUBLISHED
from tune.grid import Plan, plan

NAMES = experiments.names()
each = pytest.mark.parametrize("name", NAMES)
DIGITS = DataSpec(1, 8, 8, 10, (0.5,), (0.5,))
GRID = ("thesis_5_1", "thesis_5_2", "thesis_5_3", "thesis_5_4")


@functools.cache
def at(name: str, scale: str = "full") -> Experiment:
    return experiments.get(name, SCALES[scale])


@functools.cache
def nodes(name: str, scale: str = "full") -> Plan:
    return plan(at(name, scale), 1)


def trainings(name: str, scale: str = "full") -> dict[str, Training]:
    return {key: node.what for key, node in nodes(name, scale).items() if isinstance(node.what, Training)}


def test_every_row_of_the_reports_has_its_experiment() -> None:
    thesis = ("4_1", "4_2", "5_1", "5_2", "5_3", "5_4", "5_5", "fig_5_1", "fig_5_2", "fig_5_3", "fig_5_4")
    biparo = [*(f"table_{k}" for k in range(1, 7)), "fig_1", "fig_2"]
    rest = {"oat_cifar10", "oat_svhn", "oat_stl10", "course_gairat", "course_pretrain", "course_normalisation"}
    named = {f"thesis_{each}" for each in thesis} | {f"biparo_{each}" for each in biparo}
    assert set(NAMES) == named | rest | {f"poster_table_{k}" for k in (1, 2, 3)} == set(CLAIMS)


@each
def test_the_docstring_tells_the_cost(name: str) -> None:
    doc = inspect.getdoc(experiments.function(name)) or ""
    assert 0 < len(doc.partition("\n")[0]) <= 100, "the first line is for --list"
    assert "\n\nVaries " in doc and "\nDiffers: " in doc
    (told,) = re.findall(r"^Cost: (\d+) trainings?, ([\d,]+) epochs\.$", doc, re.MULTILINE)
    found = trainings(name).values()
    assert (len(found), sum(training.run.epochs for training in found)) == (int(told[0]), int(told[1].replace(",", "")))


@each
def test_the_docstring_tells_how_many_images_snapshots_are_judged_on(name: str) -> None:
    """CINIC-10's test set and CIFAR-10's, for each."""
    doc = inspect.getdoc(experiments.function(name)) or ""
    told = re.findall(r"^Snapshots: ([\d.]+) million images of test sets\.$", doc, re.MULTILINE)
    runs = [node.training.run for node in nodes(name).values() if getattr(node.what, "kind", None) == "snapshots"]
    count = sum(1 + run.epochs // (run.checkpoints.snapshots or 1) for run in runs)
    assert list(map(float, told)) == ([pytest.approx(count * 0.1)] if runs else [])


@each
@pytest.mark.parametrize("scale", SCALES)
def test_the_plan_is_a_graph_with_the_same_trainings_at_every_scale(name: str, scale: str) -> None:
    found = nodes(name, scale)
    keys = list(found)
    assert all(need in keys[:number] for number, key in enumerate(keys) for need in found[key].needs)
    # What differs as published still differs when it is made smaller.
    assert len(trainings(name, scale)) == len(trainings(name))


@each
def test_what_is_published_stands_in_the_reports(name: str) -> None:
    found = {figure.cell: figure.published for figure in at(name).figures if figure.published is not None}
    assert found == PUBLISHED.get(name, {})


def made_up(experiment: Experiment, told: Mapping[Cell, float]) -> Found:
    """Figures of a hundred thousand images, 0.5 unless told."""
    assert told.keys() <= {figure.cell for figure in experiment.figures}
    return {figure.cell: Measured((told.get(figure.cell, 0.5),), 100_000) for figure in experiment.figures}


@each
def test_the_verdict_is_about_the_claim(name: str) -> None:
    experiment, claim = at(name, "smoke"), CLAIMS[name]
    as_claimed = made_up(experiment, claim)
    assert experiment.verdict(as_claimed).holds is True
    for cell, value in claim.items():
        against = made_up(experiment, {**claim, cell: 0.05 if value > 0.5 else 0.95})
        assert experiment.verdict(against).holds is False, f"{cell} alone breaks the claim"
    even = experiment.verdict(made_up(experiment, {})).holds
    assert even is (True if name.startswith("oat_") else None), "two points are allowed to OAT alone"


@pytest.mark.parametrize("name", GRID)
def test_nothing_in_the_grid_is_above_the_best_pair(name: str) -> None:
    experiment = at(name, "smoke")
    others = {figure.cell for figure in experiment.figures if figure.column == "RA"} - CLAIMS[name].keys()
    tuned = {cell for cell in others if not cell[0].endswith("not tuned")}
    for cell in tuned:
        assert experiment.verdict(made_up(experiment, {**CLAIMS[name], cell: 0.7})).holds is False
    # A head that is drawn anew, as for other classes, says nothing of what is claimed.
    for value in (0.1, 0.7):
        told = {**CLAIMS[name], **dict.fromkeys(others - tuned, value)}
        assert len(others - tuned) > 0 and experiment.verdict(made_up(experiment, told)).holds is True
        even = {**told, (BEST, "RA"): 0.5}
        assert experiment.verdict(made_up(experiment, even)).holds is None


@pytest.mark.parametrize(
    "oat, holds", [(0.55, True), (0.49, True), (0.48, None), (0.47, False)], ids=["above", "near", "at 2", "beyond 2"]
)
def test_oat_may_be_two_points_below(oat: float, holds: bool | None) -> None:
    experiment = at("oat_svhn", "smoke")
    told = {figure.cell: oat for figure in experiment.figures if figure.row.startswith("OAT")}
    assert experiment.verdict(made_up(experiment, told)).holds is holds


def test_runs_fit_the_digits_that_smoke_is_on() -> None:
    """Each network with each kind of objective once: what is asked of them before Ray starts."""
    found = {key: training for name in NAMES for key, training in trainings(name, "smoke").items()}
    starts = {training.start.key for training in found.values() if training.start is not None}
    for key, training in found.items():
        assert training.run.data.source == ("digits_source" if key in starts else "digits_target")
    kinds = {(t.run.model, type(t.run.objective)): t.run for t in found.values()}
    networks = {model: build(model, DIGITS) for model in {model for model, _objective in kinds}}
    for (model, _objective), run in kinds.items():
        require_fit(run, DIGITS, networks[model])


def test_published_networks_can_be_built() -> None:
    models = {t.run.model: t.run for name in NAMES for t in trainings(name).values()}
    for model, run in models.items():
        side = 96 if run.data.source == "stl10" else 32
        assert shapes(model, DataSpec(3, side, side, 10, (0.5,) * 3, (0.5,) * 3))


def test_lambda_0_is_robust_optimisation_for_both() -> None:
    runs = {figure.row: figure.reading.training.run for figure in at("thesis_4_2").figures}
    assert isinstance(runs["both, λ 0"].objective, PgdAt) and runs["both, λ 0"].objective.beta == 0
    lambdas: dict[str, list[float]] = {"TRADES": [], "AdvReg": []}
    for row, run in runs.items():
        if isinstance(run.objective, (Trades, AdversarialRegularization)):
            words, _, told = row.partition(", λ ")
            lam = run.objective.beta if isinstance(run.objective, Trades) else run.objective.lam
            assert f"{lam:g}" == told
            lambdas[words].append(lam)
    assert lambdas["TRADES"] == lambdas["AdvReg"] == [0.1, 0.2, 0.4, 0.8, 1, 2, 3, 5]


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("thesis_")])
def test_the_thesis_is_at_its_own_eps(name: str) -> None:
    for training in trainings(name).values():
        run = training.run
        attacks = (run.objective.attack, run.evaluation.attack, run.evaluation.monitor)  # type: ignore[attr-defined]
        assert [attack.threat.eps for attack in attacks] == [0.03] * 3
        assert [attack.step_size for attack in attacks] == [0.007, 0.003, 0.003]
        assert [attack.steps for attack in attacks] == [10, 20, 10]
        assert (run.epochs, run.batch_size) == (100, 100)
        assert run.optimizer.lr == (0.1 if training.start is None else 0.001)  # type: ignore[attr-defined]
        assert (training.start is None) or training.start.run.data.source == "folder:CINIC-10"


def test_the_tables_share_one_grid() -> None:
    pretrained = ["Rob", "TRADES 0.1", "TRADES 0.5", "TRADES 1", "TRADES 3"]
    tuned = ["Rob", *(f"TRADES {lam}" for lam in ("0.1", "0.5", "1", "3", "5"))]
    rows = [f"{before}, {after}" for before in pretrained for after in ("not tuned", *(f"then {t}" for t in tuned))]
    found = {figure.row for name in GRID for figure in at(name).figures}
    assert found == {*rows, "no pretraining, TRADES 5"}
    shared = {key for name in GRID for key in trainings(name)}
    assert len(shared) == 5 + 30 + 1
    figures = {key for k in range(1, 5) for key in trainings(f"thesis_fig_5_{k}")}
    assert len(figures - shared) == 1, "but for the tuning by AdvReg, the figures follow trainings of the grid"


def test_a_pretraining_that_is_not_tuned_is_read_where_the_tuned_are() -> None:
    (sa, ra) = [figure for figure in at("thesis_5_3").figures if figure.row == "TRADES 1, not tuned"]
    assert sa.key == ("target", "0", "sa") and ra.key == ("target", "0", "ra")
    run = ra.reading.training.run
    # Under the monitor, with as many steps as the evaluation attack has it is that attack.
    assert ra.reading.options == {"part": "test", "steps": 20}
    assert run.evaluation.monitor.step_size == run.evaluation.attack.step_size  # type: ignore[attr-defined]
    assert run.checkpoints.snapshots == run.epochs


@pytest.mark.parametrize(
    "epochs, columns", [(0.01, 2), (0.1, 11), (0.2, 21), (0.37, 38), (0.45, 16), (0.55, 12), (0.99, 34), (1, 21)]
)
def test_figures_have_a_column_for_each_snapshot(epochs: float, columns: int) -> None:
    experiment = experiments.get("thesis_fig_5_4", Scale(epochs=epochs))
    shown = list(dict.fromkeys(figure.column for figure in experiment.figures))
    run = experiment.figures[0].reading.training.run
    assert run.checkpoints.snapshots is not None
    assert shown == [str(epoch) for epoch in range(0, run.epochs + 1, run.checkpoints.snapshots)]
    assert len(shown) == columns and shown[-1] == str(run.epochs), "which is what the verdict goes by"


def test_fewer_images_to_pretrain_on() -> None:
    shares = {t.run.name: t.run.data.share for t in trainings("thesis_5_5").values() if t.start is None}
    assert sorted(shares.values()) == pytest.approx([50 / 180] * 3 + [1.0] * 3)
    assert {share for name, share in shares.items() if "50k" in name} == {50 / 180}


@pytest.mark.parametrize("name", ["oat_cifar10", "oat_svhn", "oat_stl10"])
def test_dedicated_networks_are_not_told_lambda(name: str) -> None:
    for training in trainings(name).values():
        run = training.run
        conditional = isinstance(run.model, Conditional)
        assert conditional == ("dedicated" not in run.name) and run.evaluation.report == "last"
        if not conditional:
            assert isinstance(run.objective, PgdAt)
            assert run.objective.beta == pytest.approx(1 - float(run.name.rpartition("-")[2]))
            assert run.objective.attack.steps == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "epochs, compared", [(0.005, ("1", "1")), (0.02, ("3", "4")), (0.1, ("11", "20")), (1, ("105", "200"))]
)
def test_overfitting_is_read_after_the_first_drop(epochs: float, compared: tuple[str, str]) -> None:
    experiment = experiments.get("biparo_fig_2", Scale(epochs=epochs))
    asked = []

    class Asked(dict[Cell, Measured]):
        def __getitem__(self, cell: Cell) -> Measured:
            asked.append(cell)
            return super().__getitem__(cell)

    experiment.verdict(Asked(made_up(experiment, {})))
    assert asked == [("RA", column) for column in compared]
