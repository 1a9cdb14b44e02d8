"""What a plan adds up to, how it is shown, and what stands beside it when the run is finished."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from robustscale.cli import take_plan
from robustscale.config import override
from robustscale.engine.folder import RunFolder
from robustscale.engine.plan import Asked, notes, priced, whole
from robustscale.errors import InputError
from robustscale.models.transfer import Transfer
from robustscale.reports.card import model_card
from robustscale.reports.plan import plan_rows, plan_table, planned, size, with_actual
from robustscale.run import Checkpoints, Evaluation, Run, identity
from tests.reports.test_card import DATA, VERSIONS, result_of

RUN = Run(name="digits", epochs=10, checkpoints=Checkpoints(every_epochs=3, every_seconds=None, keep=2))
MEASURED: dict[str, Any] = {
    "workers": 4, "device": "cpu", "machine": "a | machine", "epochs": 10, "steps": 200, "images": 1280,
    "held_out": 100, "test": 360, "step_seconds": 0.5, "step_seconds_low": 0.4, "step_seconds_high": 0.7,
    "steps_measured": 60, "points": 10, "images_measured": 64, "images_of_a_step": 64, "images_per_second": 128.0,
    "wait": 0.02, "opening_seconds": 1.0, "looks": 5, "look_seconds": 8.0, "test_seconds": 30.0,
    "checkpoint_bytes": 10_000_000, "weights_bytes": 5_000_000, "peak_memory": 2_000_000_000, "flops": 1e15,
    "step_flops": 1e9,
}  # fmt: skip
RESULT = {**result_of(RUN), "workers": 4, "wall_seconds": 360.0, "test_seconds": 33.0, "peak_memory": 2_200_000_000}


def plan_of(run: Run = RUN, **changes: Any) -> dict[str, Any]:
    plan = {"identity": identity(run), **MEASURED, **changes}
    plan |= whole(run, plan)
    return plan | {"notes": notes(run, plan, real=True)}


def test_the_whole_is_its_parts() -> None:
    plan = priced(plan_of(), 2.5)
    assert plan["training_seconds"] == 200 * 0.5 + 10 * 1.0
    assert plan["seconds"] == 110 + 5 * 8 + 30
    assert plan["hours"] == pytest.approx(4 * 180 / 3600) and plan["cost"] == pytest.approx(0.5)
    assert (plan["checkpoints_kept"], plan["weights_kept"], plan["disk_bytes"]) == (2, 2, 30_000_000)


@pytest.mark.parametrize(
    "changes, kept",
    [
        ({"every_epochs": 10}, 1),
        ({"every_epochs": 3, "keep": 3, "keep_best": 2}, 4),  # after epochs 3, 6, 9 and 10
        ({"every_epochs": 10, "keep": 9, "every_steps": 50}, 5),
        ({"every_epochs": 10, "keep": 9, "every_seconds": 100.0}, 2),
    ],
)
def test_checkpoints_kept(changes: dict[str, Any], kept: int) -> None:
    run = dataclasses.replace(RUN, checkpoints=dataclasses.replace(RUN.checkpoints, **changes))
    assert plan_of(run)["checkpoints_kept"] == kept


def test_snapshots_and_what_a_transfer_starts_from_are_kept() -> None:
    kept = dataclasses.replace(RUN, checkpoints=Checkpoints(snapshots=4))
    assert plan_of(kept)["weights_kept"] == 2 + 2
    assert plan_of(dataclasses.replace(kept, transfer=Transfer(weights="a.pth")))["weights_kept"] == 2 + 2 + 2


def test_what_is_not_covered_is_said() -> None:
    early = dataclasses.replace(RUN, evaluation=Evaluation(patience=3))
    told = " ".join(plan_of(early, points=1, images_measured=8)["notes"])
    for words in ("Early stopping", "1 of 10 points", "8 of its 64 images", "start of cluster"):
        assert words in told, words
    assert len(plan_of()["notes"]) == 1


@pytest.mark.parametrize("sizes, changes", [((8, 16), 1), ((8, 8, 12, 16), 2), ((16, 16), 0)])
def test_a_change_of_image_size_is_said_to_cost_more(sizes: tuple[int, ...], changes: int) -> None:
    grows = override(RUN, {"data": {"progressive": sizes, "image_size": sizes[-1]}})
    told = [note for note in plan_of(grows)["notes"] if "image size" in note]
    assert [f"at each change of image size ({changes}) are not in it" in note for note in told] == [True] * (
        changes > 0
    )


def test_table() -> None:
    out = io.StringIO()
    plan_table(RUN, priced(plan_of(), 2.5), out)
    for expected in (
        "0.5 s (0.4 s to 0.7 s)", "128", "2.0 %", "of 5", "8 s", "3:00 min", "1e+15", "2 GB", "RSS", "worker hours",
        "10 MB", "30 MB", "cost at 2.5 EUR an hour", "0.50 EUR", "200 steps in 10 epochs",
    ):  # fmt: skip
        assert expected in out.getvalue(), expected
    out = io.StringIO()
    plan_table(RUN, plan_of(device="cuda"), out)
    assert "GPU hours" in out.getvalue() and "RSS" not in out.getvalue() and "EUR" not in out.getvalue()


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (48_830, "48.8 kB"), (1.5e9, "1.5 GB"), (999_999, "1 MB"), (5e18, "5,000 PB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def finished(path: Path, plan: dict[str, Any]) -> RunFolder:
    """A folder after two epochs of five steps, 0.6 s each; a look of 8 s is in the first lap of the second epoch."""
    folder = RunFolder(path)
    laps = [(0, 2, 0.6), (0, 4, 0.6), (0, 5, 0.6), (1, 6, 8.6), (1, 8, 0.5), (1, 10, 0.7)]
    lines = [
        {"event": "step", "epoch": e, "step": s, "step_seconds": t, "images_per_second": 64 / t, "wait": 0.1}
        for e, s, t in laps
    ]
    lines += [{"event": "epoch", "epoch": e, "step": 5 * e} for e in (1, 2)]
    folder.metrics.parent.mkdir(exist_ok=True)
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, length in (
        ("checkpoints/step-00000005/a", 50),
        ("checkpoints/step-00000010/a", 70),
        ("weights/last.safetensors", 30),
    ):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"0" * length)
    folder.write("plan.json", plan)
    return folder


def test_actual_figures_stand_beside_it(tmp_path: Path) -> None:
    folder = finished(tmp_path, priced(plan_of(), 2.5))
    plan = planned(folder, RUN)
    assert plan is not None
    both = with_actual(folder, RUN, plan, RESULT)
    actual = both["actual"]
    # Without the first lap of each epoch: 2, 1, 2 and 2 steps.
    assert actual["step_seconds"] == pytest.approx((2 * 0.6 + 0.6 + 2 * 0.5 + 2 * 0.7) / 7)
    assert actual["images_per_second"] == pytest.approx(7 * 64 / (2 * 0.6 + 0.6 + 2 * 0.5 + 2 * 0.7))
    assert actual["wait"] == pytest.approx(0.1)
    assert (actual["checkpoint_bytes"], actual["checkpoints_kept"], actual["disk_bytes"]) == (70, 2, 150)
    assert actual["hours"] == pytest.approx(0.4) and actual["cost"] == pytest.approx(1.0)
    assert actual["notes"] == ["It stopped after epoch 2 of 10."]
    rows = {row[0]: row[1:] for row in plan_rows(both)}
    assert rows["training and test"] == ("3:00 min", "6:00 min", "2.00")
    assert rows["the test set"] == ("30 s", "33 s", "1.10") and rows["FLOPs"] == ("1e+15", "a count", "")
    card = model_card(RUN, DATA, RESULT, VERSIONS, 360.0, "runs/digits", both)
    table = card.partition("## Plan and what it took")[2]
    assert "| training and test | 3:00 min | 6:00 min | 2.00 |" in table and "stopped after epoch 2" in table
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines() if line.startswith("|")} == {5}
    assert "Plan" not in model_card(RUN, DATA, RESULT, VERSIONS, 360.0, "runs/digits")


def test_a_plan_of_another_configuration_says_nothing(tmp_path: Path) -> None:
    folder = finished(tmp_path, plan_of())
    assert planned(folder, dataclasses.replace(RUN, epochs=11)) is None
    assert planned(folder, dataclasses.replace(RUN, name="other")) is not None
    (tmp_path / "plan.json").unlink()
    assert planned(folder, RUN) is None
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(InputError, match=r"plan.json: not what is written there"):
        planned(folder, RUN)


def test_options() -> None:
    args = ["digits", "--plan", "--price", "2.5", "--plan-seconds=7", "--epochs", "3"]
    args += ["--plan-data", "1281167+50_000x3x224x224/1000"]
    asked = take_plan(args)
    assert args == ["digits", "--epochs", "3"]
    assert asked is not None and asked[:2] == (7.0, 2.5) and asked.assumed is not None
    assert asked.assumed == (1281167, 50000, 3, 224, 224, 1000)
    assert asked.assumed.spec()[:4] == (3, 224, 224, 1000)
    assert take_plan(["digits"]) is None
    assert take_plan(["--plan"]) == Asked()


@pytest.mark.parametrize(
    "line, message",
    [
        ("--price 2", "--price: is of a plan; add --plan"),
        ("--plan --price free", "--price: 'free' is no positive number"),
        ("--plan --price -1", "--price: '-1' is no positive number"),
        ("--plan --plan-seconds inf", "--plan-seconds: 'inf' is no positive number"),
        ("--plan --plan-data 100x3", "--plan-data: '100x3' is no TRAIN+TEST"),
        ("--plan --plan-data 100+10x3x0x8/10", "is no TRAIN+TEST"),
    ],
)
def test_options_that_will_not_do(line: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        take_plan(line.split())
