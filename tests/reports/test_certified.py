"""The picture and the table of a certification show what was proven."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from robustscale.evaluation.certificates import Certification, Certified, certification_result, write_certificates
from robustscale.evaluation.smoothing import ABSTAIN, Certificate
from robustscale.reports.certified import certified_table, draw_certified
from robustscale.run import Run


def result() -> tuple[Certified, dict[str, Any]]:
    certificates = [Certificate(1, 60 - k, 1) for k in range(20)] + [Certificate(1, 30, ABSTAIN)] * 5
    certified = Certified(range(25), [1] * 20 + [0] * 5, certificates, Certification(0.25, n=60, alpha=0.05))
    return certified, {**certification_result(certified), "weights": "last", "notes": ["trained without noise"]}


def test_picture(tmp_path: Path) -> None:
    certified, figures = result()
    write_certificates(certified, tmp_path / "images.parquet")
    draw_certified(Run(), figures, tmp_path / "images.parquet", tmp_path / "certified.png")
    with Image.open(tmp_path / "certified.png") as picture:
        assert picture.format == "PNG" and picture.size == (840, 540)
        assert len(picture.convert("RGB").getcolors(2**20) or []) > 50


def test_nothing_certified_can_be_drawn(tmp_path: Path) -> None:
    by = Certification(0.25, n=60, alpha=0.05)
    certified = Certified([0], [1], [Certificate(1, 10, ABSTAIN)], by)
    write_certificates(certified, tmp_path / "images.parquet")
    draw_certified(Run(), certification_result(certified), tmp_path / "images.parquet", tmp_path / "certified.png")
    assert (tmp_path / "certified.png").stat().st_size > 1000


def test_table() -> None:
    certified, figures = result()
    out = io.StringIO()
    certified_table(Run(), figures, out)
    text = out.getvalue()
    assert f"ACR {certified.acr:.4f}" in text and "CERTIFY abstained on 20.0 %" in text
    assert "certified  l2 0 " in text and "note: trained without noise" in text
    line = next(line for line in text.splitlines() if "PREDICT  no attack" in line)
    assert "80.0 %" in line
