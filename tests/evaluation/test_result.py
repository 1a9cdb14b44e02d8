from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustscale.attacks.base import Goal
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import decode
from robustscale.evaluation.accuracy import NONFINITE, Examples
from robustscale.evaluation.result import (
    Figure,
    attack_results,
    encoded,
    num_nonfinite,
    robust,
    run_result,
    standard,
    wilson,
    write_examples,
)
from robustscale.evaluation.words import Attacker
from robustscale.reports.tables import attacker_of
from robustscale.threat import L2, Linf
from robustscale.types import Attack


def examples() -> Examples:
    return Examples(
        index=torch.arange(6),
        label=torch.tensor([0, 1, 2, 0, 1, 2]),
        predicted=torch.tensor([0, 1, 2, 0, 0, NONFINITE]),
        adversarial={
            "fgsm": torch.tensor([0, 1, 0, 0, 1, 2]),
            "pgd": torch.tensor([0, 0, 2, NONFINITE, 1, 2]),
            "l2": torch.tensor([1, 1, 2, 0, 1, 2]),
        },
    )


ATTACKS = {
    "fgsm": Attacker(FGSM(Linf(8 / 255))),
    "pgd": Attacker(PGD(Linf(8 / 255), steps=20)),
    "l2": Attacker(PGD(L2(0.5), steps=20)),
}


def test_figures() -> None:
    found = examples()
    assert standard(found) == Figure(4, 6)
    assert robust(found, "fgsm") == Figure(3, 6)
    assert robust(found, "pgd") == Figure(2, 6)
    assert robust(found, "l2") == Figure(3, 6)
    assert robust(found, "fgsm", "pgd") == Figure(1, 6)
    assert num_nonfinite(found) == 2


@pytest.mark.parametrize(
    "correct, n, low, high",
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_mirrors(pair: tuple[int, int]) -> None:
    correct, n = pair
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1
    assert low < high
    mirror = wilson(n - correct, n)
    assert math.isclose(1 - low, mirror[1], abs_tol=1e-9)
    assert math.isclose(1 - high, mirror[0], abs_tol=1e-9)


def test_run_result_is_json_and_rebuilds_its_attack() -> None:
    result = json.loads(
        json.dumps(run_result(examples(), "pgd", ATTACKS["pgd"], weights="best", step=12, epoch=3), allow_nan=False)
    )
    assert decode(Attack, result["attack"]) == ATTACKS["pgd"].attack
    assert result["sa"] == 4 / 6
    assert result["ra"] == 2 / 6
    assert result["ra_interval"] == list(wilson(2, 6))
    assert {k: result[k] for k in ("schema", "n", "nonfinite", "weights", "step", "epoch")} == {
        "schema": 1, "n": 6, "nonfinite": 2, "weights": "best", "step": 12, "epoch": 3,
    }  # fmt: skip


def test_worst_case_is_within_one_ball() -> None:
    result = attack_results(examples(), ATTACKS)
    assert {name: entry["ra"] for name, entry in result["attacks"].items()} == {"fgsm": 0.5, "pgd": 2 / 6, "l2": 0.5}
    assert list(result["worst"]) == ["linf 8/255"]
    assert result["worst"]["linf 8/255"]["attacks"] == ["fgsm", "pgd"]
    assert result["worst"]["linf 8/255"]["ra"] == 1 / 6


def test_table_of_examples(tmp_path: Path) -> None:
    write_examples(examples(), tmp_path / "examples.parquet")
    table = pq.read_table(tmp_path / "examples.parquet").to_pydict()
    assert list(table) == ["index", "label", "clean", "fgsm", "pgd", "l2"]
    assert table["clean"] == [0, 1, 2, 0, 0, None]
    assert table["pgd"] == [0, 0, 2, None, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["examples.parquet"]


def several_draws() -> Examples:
    predicted = torch.tensor([[0, 0], [1, 0], [2, NONFINITE], [0, 0]])
    return Examples(torch.arange(4), torch.tensor([0, 1, 2, 1]), predicted, {"pgd": predicted * 0})


def test_figures_of_several_draws() -> None:
    """3 and 1 of 4 right: 50 % in the mean, with a standard deviation of 35.4 % over the two draws."""
    sa = standard(several_draws())
    assert sa == Figure(2.0, 4, pytest.approx(0.125**0.5))
    assert sa.named("sa") == {"sa": 0.5, "sa_interval": list(wilson(2, 4)), "sa_spread": pytest.approx(0.125**0.5)}
    assert num_nonfinite(several_draws()) == 1
    result = attack_results(several_draws(), {"pgd": ATTACKS["pgd"]})
    assert result["draws"] == 2
    assert result["attacks"]["pgd"]["ra_spread"] == 0
    assert "sa_spread" not in attack_results(examples(), ATTACKS)


def test_table_of_several_draws(tmp_path: Path) -> None:
    write_examples(several_draws(), tmp_path / "examples.parquet")
    table = pq.read_table(tmp_path / "examples.parquet").to_pydict()
    assert table["clean"] == [[0, 0], [1, 0], [2, None], [0, 0]]
    assert table["label"] == [0, 1, 2, 1]


def test_targets_come_back_from_json() -> None:
    attacker = Attacker(PGD(), Goal(loss="dlr"), targets=9)
    assert attacker_of(json.loads(json.dumps(encoded(attacker)))) == attacker
    assert "targets" not in encoded(ATTACKS["pgd"])
