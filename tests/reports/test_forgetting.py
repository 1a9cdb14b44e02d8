"""What was forgotten, as a table and a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.config import encode
from robustscale.models.transfer import Transfer
from robustscale.reports.card import _training
from robustscale.reports.forgetting import draw_forgetting, forgetting_table
from robustscale.run import Run
from robustscale.threat import Linf

NAMES = {"source": "cinic10", "target": "cifar10"}


def figures(sa: float, ra: float) -> dict[str, Any]:
    spread = {"sa_interval": (sa - 0.01, sa + 0.01), "ra_interval": (ra - 0.01, ra + 0.01)}
    return {"sa": sa, "ra": ra, "n": 100, **spread}


FOUND = {
    "attack": encode(PGD(Linf(0.1), steps=3)),
    "goal": encode(Goal()),
    "part": "held_out",
    "source": {"0": figures(0.8, 0.5), "10": figures(0.7, 0.25), "2": figures(0.75, 0.4)},
    "target": {"0": figures(0.1, 0.0), "10": figures(0.9, 0.625), "2": figures(0.5, 0.3)},
}


def test_epochs_come_in_order_with_both_sets_beside_each_other() -> None:
    out = io.StringIO()
    forgetting_table(FOUND, NAMES, out)
    lines = out.getvalue().splitlines()
    assert lines[1].split() == ["epoch", "SA", "cinic10", "RA", "cinic10", "SA", "cifar10", "RA", "cifar10"]
    rows = [line.replace("%", "").split() for line in lines[2:5]]
    assert rows[0] == ["0", "80.0", "50.0", "10.0", "0.0"] and rows[2] == ["10", "70.0", "25.0", "90.0", "62.5"]
    assert "held-out images" in lines[5] and "pgd-3" in lines[5]


def test_the_picture_has_a_colour_for_each_set(tmp_path: Path) -> None:
    draw_forgetting(FOUND, NAMES, tmp_path / "forgetting.png", "tuned")
    with Image.open(tmp_path / "forgetting.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(2**24) or []}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_the_card_says_what_training_started_from() -> None:
    run = Run(transfer=Transfer(weights="/a/weights/best.safetensors", sha256="ab" * 32, frozen=2, layer_decay=0.5))
    assert (
        "- Started from `/a/weights/best.safetensors` (SHA-256 abababababababab...), the first 2 stages frozen, "
        "each stage at 0.5 times the rate of the one above it\n"
    ) in _training(run)
    assert "Started" not in _training(Run())
