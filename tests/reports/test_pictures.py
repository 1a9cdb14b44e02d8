"""Each picture is a real PNG of the expected size that shows what it was given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from robustscale.attacks.eot import EOT
from robustscale.attacks.pgd import PGD
from robustscale.evaluation.result import encoded, wilson
from robustscale.evaluation.words import Attacker
from robustscale.objectives.natural import Natural
from robustscale.objectives.pgd_at import PgdAt
from robustscale.reports import eps_curve
from robustscale.reports.curves import draw_curves
from robustscale.reports.eps_curve import draw_eps_curve
from robustscale.reports.figures import BLUE, DPI, VERMILLION, source_name
from robustscale.reports.gallery import draw_gallery
from robustscale.run import Data, Run
from robustscale.threat import L2, Linf

CLASSES = ["cat", "dog", "a very long name of a class"]


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def share_of(color: str, pixels: NDArray[np.uint8]) -> float:
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.abs(pixels.astype(int) - wanted).max(2) < 8).mean())


def records(epochs: int, steps: int, *, held_out: bool = True) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for step in range(1, epochs * steps + 1):
        found.append({"event": "step", "epoch": (step - 1) // steps, "step": step, "loss": 2 / step**0.2, "lr": 0.1})
        if step % steps == 0:
            figures = {"sa": 0.8, "ra": 0.1 + 0.3 * step / (epochs * steps)} if held_out else {}
            found.append(
                {"event": "epoch", "epoch": step // steps, "step": step, "train_loss": 2 / step**0.2, **figures}
            )
    return found


@pytest.mark.parametrize("epochs, steps", [(1, 1), (200, 2)])
def test_curves(tmp_path: Path, epochs: int, steps: int) -> None:
    draw_curves(records(epochs, steps), tmp_path / "curves.png", "digits, RA under pgd-10 linf 8/255")
    pixels = read(tmp_path / "curves.png")
    assert pixels.shape == (round(7.9 * DPI), round(7.5 * DPI), 3)
    assert share_of(BLUE, pixels) > 1e-4
    assert share_of(VERMILLION, pixels) > 1e-4


def test_curves_without_held_out_figures_have_no_accuracy_panel(tmp_path: Path) -> None:
    before = (dict(mpl.rcParams), mpl.get_backend())
    draw_curves(records(3, 5, held_out=False), tmp_path / "curves.png")
    assert (dict(mpl.rcParams), mpl.get_backend()) == before, "global state"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    pixels = read(tmp_path / "curves.png")
    assert pixels.shape[0] == round(4.9 * DPI)
    assert share_of(BLUE, pixels) == 0


@pytest.mark.parametrize("found", [[], records(1, 20)[:7], [r for r in records(2, 3) if r["event"] == "epoch"]])
def test_curves_of_an_unfinished_run(tmp_path: Path, found: list[dict[str, Any]]) -> None:
    draw_curves(found, tmp_path / "curves.png")
    assert read(tmp_path / "curves.png").std() > 0


def gallery(path: Path, n: int, channels: int, eps: float, right: bool) -> NDArray[np.uint8]:
    images = torch.full((n, channels, 8, 8), 0.5)
    labels = torch.arange(n) % 3
    seen = labels if right else (labels + 1) % 3
    draw_gallery(images, images + eps, labels, labels, seen, CLASSES, path, "digits")
    return read(path)


@pytest.mark.parametrize("n, channels", [(1, 1), (3, 3), (10, 1)])
def test_gallery(tmp_path: Path, n: int, channels: int) -> None:
    pixels = gallery(tmp_path / "g.png", n, channels, 8 / 255, right=False)
    assert pixels.shape == (round(4.9 * DPI), round(max(5.5, 1.2 + 1.25 * n) * DPI), 3)
    assert share_of(BLUE, pixels) > 1e-3
    assert share_of(VERMILLION, pixels) > 1e-3


def test_gallery_marks_wrong_in_another_colour_alone_where_it_is_wrong(tmp_path: Path) -> None:
    assert share_of(VERMILLION, gallery(tmp_path / "g.png", 3, 1, 8 / 255, right=True)) == 0


def test_perturbation_is_signed_magnified_and_grey_at_zero(tmp_path: Path) -> None:
    """8/255 is shown 15-fold: 0.5 ± 0.47."""
    for eps, grey in ((8 / 255, 247), (-8 / 255, 8), (0.0, 128)):
        pixels = gallery(tmp_path / "g.png", 3, 1, eps, right=True)
        middle = pixels[pixels.shape[0] // 2 - 40 : pixels.shape[0] // 2 + 40]
        assert (np.abs(middle.astype(int) - grey).max(2) <= 1).mean() > 0.3


def test_gallery_names_what_is_not_finite(tmp_path: Path) -> None:
    images, labels = torch.zeros(1, 1, 8, 8), torch.tensor([2])
    draw_gallery(images, images, labels, torch.tensor([-1]), torch.tensor([-1]), CLASSES, tmp_path / "g.png")
    assert share_of(VERMILLION, read(tmp_path / "g.png")) > 1e-3


def evaluation(norm: str = "linf", eps: float = 8 / 255, n: int = 1000) -> dict[str, Any]:
    sweep = [
        {
            "eps": f * eps,
            "eps_text": f"{f:g}",
            "attack": f"at {f:g}" if f else None,
            "ra": ra,
            "ra_interval": list(wilson(round(ra * n), n)),
        }
        for f, ra in ((0, 0.8), (0.5, 0.6), (1, 0.4), (2, 0.1))
    ]
    attacks = {f"at {f:g}": encoded(Attacker(EOT(PGD(Linf(f * eps), steps=20), 7))) for f in (0.5, 1, 2)}
    return {"sweep": sweep, "attacks": attacks, "sa": 0.8, "eps": eps, "norm": norm, "n": n}


def test_eps_curve_names_the_attack_and_the_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The picture is shown without the table: what it says must not be read as robustness."""
    texts: list[str] = []
    monkeypatch.setattr(
        eps_curve, "save", lambda figure, path: texts.extend(t.get_text() for t in figure.findobj(Text))
    )
    draw_eps_curve(Run(name="r"), {"classes": CLASSES}, {**evaluation(), "noise": 0.25}, tmp_path / "e.png")
    assert "RA under eot-7 pgd-20, an upper bound" in texts
    assert "r: digits behind noise of sigma 0.25, eot-7 pgd-20 in ℓ∞, 1,000 images" in texts


@pytest.mark.parametrize(
    "run, norm",
    [
        (Run(), "linf"),
        (Run(objective=Natural()), "linf"),
        (Run(objective=PgdAt(attack=PGD(L2(0.5)))), "l2"),
        (Run(), "l2"),
    ],
)
def test_eps_curve(tmp_path: Path, run: Run, norm: str) -> None:
    draw_eps_curve(run, {"classes": CLASSES}, evaluation(norm), tmp_path / "e.png")
    pixels = read(tmp_path / "e.png")
    assert pixels.shape == (round(4.5 * DPI), round(7 * DPI), 3)
    assert share_of(VERMILLION, pixels) > 1e-3
    assert share_of(BLUE, pixels) > 1e-4


def test_eps_curve_at_a_radius_of_0(tmp_path: Path) -> None:
    only = {**evaluation(), "sweep": evaluation()["sweep"][:1], "eps": 0.0}
    draw_eps_curve(Run(), {"classes": CLASSES}, only, tmp_path / "e.png")
    assert read(tmp_path / "e.png").std() > 0


@pytest.mark.parametrize(
    "source, name", [("digits", "digits"), ("folder:/data/birds", "birds"), ("parquet:/data/c.parquet", "c.parquet")]
)
def test_name_of_the_data(source: str, name: str) -> None:
    assert source_name(Run(data=Data(source=source))) == name
