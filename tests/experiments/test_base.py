"""How an experiment is made smaller, what its trainings are known by, and what a verdict goes by."""

from __future__ import annotations

import dataclasses
import math

import pytest

from data_loaders.sources import open_source
from robustscale import experiments, recipes
from robustscale.errors import InputError
from robustscale.experiments.base import (
    SCALES,
    Cell,
    Figure,
    Found,
    Measured,
    Scale,
    Training,
    compared,
    curve,
    point,
    result,
    snapshots,
    tiny,
)
from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional
from robustscale.models.network import shapes
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.vgg import VGG
from robustscale.models.wide_resnet import WideResNet
from robustscale.run import Run
from robustscale.types import DataSpec, Model

DIGITS = DataSpec(1, 8, 8, 10, (0.5,), (0.5,))


def test_full_is_as_published() -> None:
    for name in ("cifar10_trades", "cifar10_oat", "digits"):
        run = recipes.get(name)
        assert SCALES["full"].shrink(run) == SCALES["full"].shrink(run, "source") == run


def test_smoke_is_on_halves_of_the_digits() -> None:
    run = recipes.get("cifar10_trades")
    source, target = (SCALES["smoke"].shrink(run, part) for part in ("source", "target"))
    assert (source.data.source, target.data.source) == ("digits_source", "digits_target")
    assert source.data.augmentation == "none" and source.epochs == round(0.02 * run.epochs)
    assert source.objective == run.objective and source.optimizer == run.optimizer


def test_the_halves_have_no_image_in_common() -> None:
    kinds = ("digits_source", "digits_target")
    parts = [open_source(kind, split) for kind in kinds for split in ("train", "test")]
    images = [{part.image(i).tobytes() for i in range(len(part))} for part in parts]
    assert sum(map(len, images)) == len(set().union(*images)) == 1797
    assert [len(part) for part in parts] == [719, 180, 718, 180]


@pytest.mark.parametrize(
    "model",
    [
        ResNet(18),
        ResNet(34),
        ResNet(50),
        WideResNet(34, 10),
        VGG(11),
        Basic(),
        ResNetCifar(20),
        Conditional(ResNet(34)),
    ],
)
def test_every_network_has_one_for_digits(model: Model) -> None:
    small = SCALES["smoke"].model(model)
    assert num_parameters(small, DIGITS) < 2e5
    narrower = SCALES["small"].model(model)
    colours = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.5,) * 3)
    sizes = [num_parameters(each, colours) for each in (narrower, model)]
    assert sizes[0] < sizes[1] / 5 or isinstance(model, (Basic, ResNetCifar))


def num_parameters(model: Model, data: DataSpec) -> int:
    return sum(p.numel() for p in shapes(model, data).parameters())


def test_networks_that_are_compared_stay_distinct() -> None:
    assert len({tiny(ResNet(depth)) for depth in (18, 34, 50)}) == 3
    assert len({tiny(model) for model in (ResNetCifar(20), ResNet(18), VGG(11))}) == 3
    assert tiny(ResNet(18, width=1.25)) != tiny(ResNet(18))


def test_data_of_ones_own_takes_the_published_place() -> None:
    scale = dataclasses.replace(SCALES["medium"], source="npz:a.npz", target="folder:birds", share=0.5)
    run = recipes.get("cifar10_trades")
    data = scale.data(run.data)
    assert data == dataclasses.replace(run.data, source="folder:birds", share=0.5)
    assert scale.data(run.data, "source").source == "npz:a.npz"
    # An experiment that is itself on a part of the images is on a part of that.
    assert scale.data(dataclasses.replace(run.data, share=0.2)).share == pytest.approx(0.1)


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.5}, {"epochs": 0.0}, {"seeds": 0}])
def test_a_scale_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"^{next(iter(wrong))}: "):
        Scale(**wrong)  # type: ignore[arg-type]


def test_epochs_shrink_to_one_at_least() -> None:
    assert [Scale(epochs=0.1).num_epochs(epochs) for epochs in (200, 14, 5, 1)] == [20, 1, 1, 1]


def test_a_figure_is_a_share() -> None:
    with pytest.raises(InputError, match=r"published: 48\.0 is outside"):
        Figure("a", "b", result(Training(Run())), "ra", 48.0)
    with pytest.raises(InputError, match="snapshots: forgetting needs"):
        snapshots(Training(Run()))
    with pytest.raises(InputError, match=r"checkpoints\.snapshots: run keeps none"):
        snapshots(Training(Run(), Training(Run())))


def test_points_are_named_alike_where_they_are_asked_for_and_where_they_are_read() -> None:
    reading = curve(Training(Run()), [{"lam": 0.2}, {"lam": 1, "width": 0.5}])
    assert [point(**at) for at in reading.options["at"]] == ["lam=0.2", "lam=1,width=0.5"]


def test_experiments_are_found_by_name() -> None:
    assert experiments.names() == sorted(experiments.names())
    with pytest.raises(InputError, match="experiment: 'no_such_thing' is not known"):
        experiments.function("no_such_thing")


A: Cell = ("a", "RA")
B: Cell = ("b", "RA")
C: Cell = ("c", "RA")


def over_seeds(*means: float, spread: float = 0.01) -> Found:
    return {cell: Measured((mean - spread, mean, mean + spread)) for cell, mean in zip((A, B, C), means, strict=False)}


def test_errors_are_those_of_seeds_or_of_images() -> None:
    ours = Measured((0.4, 0.5, 0.6), 1000)
    assert ours.spread == pytest.approx(0.1) and ours.error == pytest.approx(0.1 / math.sqrt(3))
    one = Measured((0.4,), 600)
    assert one.spread is None and one.error == pytest.approx(0.02)
    assert Measured((0.4,)).error == 0
    # Seeds that agree by chance are not exact.
    assert Measured((0.4, 0.4), 300).error == pytest.approx(0.02)


@pytest.mark.parametrize(
    "found, holds, words",
    [
        (over_seeds(0.6, 0.5, 0.4), True, "2 of 2 comparisons are told as claimed, 0 the other way"),
        # The standard error of a difference is 0.01 · sqrt(2 / 3), so that 0.0163 are needed.
        (over_seeds(0.517, 0.5, 0.499), None, "1 of 2 comparisons are told as claimed, 0 the other way, 1 within 2"),
        (over_seeds(0.516, 0.5, 0.499), None, "0 of 2 comparisons are told as claimed, 0 the other way, 2 within 2"),
        (over_seeds(0.9, 0.5, 0.6), False, "1 the other way; furthest off: b RA is 10.0 points below c RA"),
    ],
)
def test_a_verdict_goes_by_what_is_told(found: Found, holds: bool | None, words: str) -> None:
    verdict = compared(found, [(A, B), (B, C)])
    assert verdict.holds is holds and words in verdict.why and "one seed" not in verdict.why


def test_a_trend_holds_where_most_of_it_is_told() -> None:
    found = over_seeds(0.6, 0.5, 0.5)
    assert compared(found, [(A, B), (A, C), (B, C)]).holds is True
    assert compared(found, [(A, B), (B, C), (C, B)]).holds is None


def test_one_of_many_comparisons_may_go_astray() -> None:
    """At 2.5 standard errors a single comparison tells against a claim, one of nine does not, nor does it hold then."""
    rows = {(str(k), "RA"): Measured((0.05 + 0.1 * (9 - k),), 10_000) for k in range(10)}
    error = math.sqrt(2) * rows["8", "RA"].error
    found = {**rows, ("9", "RA"): Measured((rows["8", "RA"].mean + 2.5 * error,), 10_000)}
    pairs = [((str(k), "RA"), (str(k + 1), "RA")) for k in range(9)]
    assert compared(found, pairs[-1:]).holds is False
    many = compared(found, pairs)
    assert many.holds is None and "8 of 9 comparisons are told as claimed, 1 the other way" in many.why
    assert "but not by the 2.8 standard errors that one of 9 needs" in many.why
    assert compared(rows, pairs).holds is True
    # Nor by leaving out rows, once its figures are known.
    assert compared({cell: found[cell] for cell in pairs[-1]}, pairs).holds is None


def test_of_one_seed_the_verdict_says_what_its_errors_are() -> None:
    found = {A: Measured((0.6,), 10_000), B: Measured((0.5,), 10_000)}
    assert compared(found, [(A, B)]).why.endswith("since one seed does not tell how far trainings differ")


def test_rows_may_be_left_out_and_are_told_of() -> None:
    whole = experiments.get("thesis_4_2", SCALES["smoke"])
    kept = whole.only(["both, λ 0", "TRADES, λ 1", "AdvReg, λ 1", "AdvReg, λ 5"])
    assert [figure.row for figure in kept.figures[::2]] == ["both, λ 0", "TRADES, λ 1", "AdvReg, λ 1", "AdvReg, λ 5"]
    assert kept.notes[-1].startswith("Left out: TRADES, λ 0.1; ") and len(kept.notes) == len(whole.notes) + 1
    found = {figure.cell: Measured((0.5,), 10_000) for figure in kept.figures}
    found["AdvReg, λ 1", "RA"] = Measured((0.6,), 10_000)
    verdict = kept.verdict(found)
    assert kept.only(["both, λ 0"]).verdict({}).holds is None
    assert verdict.holds is None and verdict.why.startswith("1 of 1 comparisons are told as claimed")
    assert "7 further ones need rows that were left out" in verdict.why
    assert whole.only([figure.row for figure in whole.figures]).notes == whole.notes
    with pytest.raises(InputError, match=r"rows: MIT thesis, table 4\.2 has no 'λ 1'; it has both, λ 0; TRADES, "):
        whole.only(["λ 1"])


def test_where_nothing_is_left_to_compare_the_verdict_is_open() -> None:
    assert compared({A: Measured((0.6,), 100)}, [(A, B)]).holds is None
