from __future__ import annotations

import io
import os
import pty
from typing import Any

import pytest
import torch

from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.engine.mix import Mix
from robustscale.evaluation.accuracy import NONFINITE, Examples
from robustscale.evaluation.result import run_result
from robustscale.evaluation.suite import default_suite, reported, suite_result
from robustscale.models.conditional import Conditional
from robustscale.models.slimmable import Slimmable
from robustscale.objectives.natural import Natural
from robustscale.objectives.rst import Rst
from robustscale.objectives.trades import Trades
from robustscale.reports.card import model_card, threat_sentence
from robustscale.reports.tables import evaluation_table, result_table
from robustscale.run import Data, Evaluation, Run
from robustscale.threat import L2, Linf, Threat
from robustscale.types import DataSpec

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.3,))
DATA: dict[str, Any] = {
    "spec": SPEC._asdict(),
    "classes": [f"class {i}" for i in range(10)],
    "train": {"path": "train.beton", "num_examples": 1437, "fingerprint": "ab" * 32},
    "test": {"path": "test.beton", "num_examples": 360, "fingerprint": "cd" * 32},
    "held_out": 144,
}
VERSIONS = {"robustscale": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "gpu": "8 x NVIDIA H200", "cpu": "EPYC | 9"}


def examples(names: list[str], broken: int = 0) -> Examples:
    """SA is 90 %; the k-th attack breaks one image in 5 - k."""
    index = torch.arange(360)
    label = index % 10
    clean = torch.where(label == 9, 0, label)
    clean[:broken] = NONFINITE
    attacked = {name: torch.where(index % max(5 - k, 2) == 0, (label + 1) % 10, clean) for k, name in enumerate(names)}
    return Examples(index, label, clean, attacked)


def result_of(run: Run, weights: str = "best", broken: int = 0) -> dict[str, Any]:
    name, attacker = reported(run)
    found = run_result(examples([name], broken), name, attacker, weights=weights, step=120, epoch=12)
    return {**found, "held_out_sa": 0.961, "held_out_ra": 0.702, "workers": 8}


def card(run: Run, **changes: Any) -> str:
    result = result_of(run, **{k: v for k, v in changes.items() if k in ("weights", "broken")})
    data = {**DATA, **{k: v for k, v in changes.items() if k == "held_out"}}
    return model_card(run, data, result, VERSIONS, 7384, "runs/digits")


def test_card_names_every_figure() -> None:
    run = Run(name="digits", seed=41, epochs=30, objective=Trades(), data=Data(source="parquet:/data/birds"))
    text = card(run)
    for expected in (
        "# digits", "90.0 %", "86.5 to 92.7 %", "70.0 %", "65.1 to 74.5 %", "360 images", "1,437", "ab" * 32, "cd" * 32,
        "8/255", "`trades`", "beta=6.0", "arxiv.org/abs/1901.08573", "`pgd-10 linf 8/255`", "`pgd-20 linf 8/255`",
        "start=gaussian", "Seed: 41", "144 training images", "epoch 12 of 30", "step 120", "SA 96.1 %, RA 70.2 %",
        "The test set was read once", "2:03 h on 8 workers", "8 x NVIDIA H200", "2.13.0", "birds", "8 x 8", "class 9",
        "python -m robustscale.evaluate runs/digits ", "python -m robustscale.export runs/digits --format onnx",
        "python -m robustscale.pretrain --resume runs/digits", "--config runs/digits/run.json", "upper bound",
        "not AutoAttack",
    ):  # fmt: skip
        assert expected in text, expected
    assert "not finite" not in text
    assert "{" not in text.replace("```", "")


def test_card_says_what_the_weights_it_started_from_had_seen_and_what_was_left_out() -> None:
    train = {**DATA["train"], "left_out": {"num_examples": 1203, "sha256": "00"}}
    told = ["Images of the test set may be among those.", "None of the 900 images is in the test set."]
    text = model_card(Run(), {**DATA, "train": train, "seen": told}, result_of(Run()), VERSIONS, 7384, "runs/tuned")
    assert all(f"\n- {sentence}\n" in text for sentence in told)
    assert "1,203 training images were neither trained on nor held out" in text
    assert "had seen" not in card(Run()) and "neither" not in card(Run())
    suite, out = default_suite(Run(), SPEC), io.StringIO()
    result_table(Run(), {**DATA, "seen": told}, result_of(Run()), file=out)
    evaluation_table(Run(), {**DATA, "seen": told}, suite_result(examples(list(suite.attacks)), suite), file=out)
    assert all(out.getvalue().count(f"  {sentence}\n") == 2 for sentence in told)


def test_card_counts_pseudo_labelled_images() -> None:
    run = Run(objective=Rst(), data=Data(unlabelled="more.beton"))
    data = {**DATA, "unlabelled": {"path": "more.beton", "num_examples": 50_000, "fingerprint": "ef" * 32}}
    text = model_card(run, data, result_of(run), VERSIONS, 7384, "runs/student")
    assert f"| unlabelled | 50,000 | `{'ef' * 32}` |" in text


def test_card_says_what_is_missing() -> None:
    run = Run(
        objective=Natural(), data=Data(held_out=0.0), evaluation=Evaluation(attack=PGD(L2(0.5)), goal=Goal("predicted"))
    )
    text = card(run, weights="last", held_out=0, broken=40)
    for expected in (
        "Training attack: none", "Nothing was held out", "robust overfitting",
        "40 images met values that are not finite", "`pgd-10 l2 0.5 label=predicted`", "Euclidean length",
    ):  # fmt: skip
        assert expected in text, expected


def test_tables_of_the_card_are_whole() -> None:
    """A cell with a bar would add a column."""
    rows = [line.replace("\\|", "") for line in card(Run()).splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3, 4}
    assert any("EPYC " in row and row.count("|") == 3 for row in rows)


@pytest.mark.parametrize(
    "threat, words",
    [
        (Linf(8 / 255), "every pixel value of an image by at most 8/255"),
        (Linf(0.031), "7.91 of 255"),
        (L2(1.0), "at most 1 in Euclid"),
    ],
)
def test_threats_in_words(threat: Threat, words: str) -> None:
    assert words in threat_sentence(threat)


def test_result_as_plain_text() -> None:
    out = io.StringIO()
    result_table(Run(name="digits"), DATA, result_of(Run(), broken=40), file=out)
    text = out.getvalue()
    assert text.splitlines()[0] == "digits: digits test set, 360 images"
    assert "\x1b" not in text
    for expected in ("SA  clean", "RA  pgd-20 linf 8/255", "best weights, epoch 12, step 120", "40 images met"):
        assert expected in text, expected
    assert {line.index("%") for line in text.splitlines() if "RA  " in line or "SA  " in line} == {
        text.splitlines()[2].index("%")
    }


def test_evaluation_as_plain_text_has_every_attack_once() -> None:
    suite = default_suite(Run(), SPEC)
    evaluation = suite_result(examples(list(suite.attacks)), suite)
    out = io.StringIO()
    evaluation_table(Run(), DATA, evaluation, file=out)
    for name in suite.attacks:
        assert out.getvalue().count(f"RA  {name}  ") == 1, name
    assert "linf 8/255, worst of 4" in out.getvalue()
    assert all(note in out.getvalue() for note in suite.notes)


def test_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as out:
        result_table(Run(name="digits"), DATA, result_of(Run()), file=out)
        text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "┃" in text
    assert "pgd-20 linf 8/255" in text


def test_spread_of_a_randomised_network_is_shown() -> None:
    run = Run(name="shaky")
    name, attacker = reported(run, randomised=True)
    found = examples([name])
    draws = found.predicted[:, None].repeat(1, 4)
    draws[:36, 0] = NONFINITE
    shaky = Examples(found.index, found.label, draws, {name: found.adversarial[name][:, None].repeat(1, 4)})
    result = {**run_result(shaky, name, attacker, weights="best", step=1, epoch=1), "workers": 1}
    out = io.StringIO()
    result_table(run, DATA, result, file=out)
    assert f"RA  {name}" in out.getvalue() and name.startswith("eot-20 pgd-20 linf 8/255")
    for text in (out.getvalue(), model_card(run, DATA, result, VERSIONS, 1, "runs/shaky")):
        assert "± 4.6 %" in text
        assert "Means over 4 draws of the network's noise" in text
    assert "±" not in card(run)


def test_says_at_which_lambda_and_width_a_network_was_judged() -> None:
    run = Run(name="dial", model=Conditional(model=Slimmable(width=0.5), lam=0.3))
    out = io.StringIO()
    result_table(run, DATA, result_of(run), file=out)
    for text in (out.getvalue(), card(run)):
        assert "Judged at lam 0.3 and width 0.5 alone" in text
    assert "Judged at" not in card(Run())


def test_a_blind_attack_on_one_draw_is_called_so() -> None:
    """Nothing else in the table tells that the network is randomised."""
    run = Run(name="shaky", evaluation=Evaluation(eot=1, draws=1))
    result = {**result_of(run), "draws": 1}
    out = io.StringIO()
    result_table(run, DATA, result, file=out)
    for text in (out.getvalue(), model_card(run, DATA, result, VERSIONS, 1, "runs/shaky")):
        assert "Of one draw of the network's noise" in text and "(no EOT): what it left right is no robustness" in text


def test_card_names_what_is_done_to_training_images() -> None:
    assert "augmentation `none`, reduction" in card(Run())
    data = Data(rand_augment=2, progressive=(8, 16), image_size=16)
    told = "augmentation `none; rand_augment 2 at magnitude 9; cutmix 1; sides 8, 16`, reduction"
    assert told in card(Run(data=data, mix=Mix(cutmix=1.0)))
