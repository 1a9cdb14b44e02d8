"""RA over the radius of the attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustscale.evaluation.words import norm_of, pixels, threat_of, training_attack
from robustscale.reports.figures import BLUE, GREEN, VERMILLION, new_figure, plain, save, source_name
from robustscale.run import Run


def draw_eps_curve(run: Run, data: Mapping[str, Any], evaluation: Mapping[str, Any], path: Path) -> None:
    """A PNG of the sweep in evaluation.json, as measured, with 95 % bands, SA at 0, and the eps of training if it was
    in the same norm."""
    sweep = evaluation["sweep"]
    eps = [entry["eps"] for entry in sweep]
    ra = [100 * entry["ra"] for entry in sweep]
    low, high = ([100 * entry["ra_interval"][side] for entry in sweep] for side in (0, 1))
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    axes.fill_between(eps, low, high, color=VERMILLION, alpha=0.18, linewidth=0, label="95 % interval (Wilson)")
    axes.plot(eps, ra, color=VERMILLION, marker="o", label="RA under PGD-20")
    clean: dict[str, Any] = {"color": BLUE, "marker": "D", "markersize": 8, "linestyle": "none"}
    axes.plot([0], [100 * evaluation["sa"]], **clean, clip_on=False, zorder=5, label="SA (no attack)")
    attack = training_attack(run.objective)
    if attack is not None and norm_of(threat_of(attack)) == evaluation["norm"]:
        trained = threat_of(attack).eps
        axes.axvline(trained, color="0.35", linestyle=":", label=f"trained at eps = {pixels(trained)}")
    chance = 100 / len(data["classes"])
    axes.axhline(chance, color=GREEN, linestyle="--", linewidth=1, label=f"chance, {chance:.3g} %")
    for x, y in zip(eps, ra, strict=True):
        axes.annotate(f"{y:.1f}", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8)
    axes.set_xticks(eps, [entry["eps_text"] for entry in sweep])
    unit = {"linf": "ℓ∞", "l2": "ℓ2"}[evaluation["norm"]]
    axes.set(
        xlabel=f"{unit} radius eps, in [0, 1] pixels",
        ylabel="accuracy on the test set, %",
        ylim=(0, 105),
        xlim=(0, max(eps) * 1.03 or 1),
        title=f"{run.name}: {source_name(run)}, PGD-20 in {unit}, {evaluation['n']:,} images",
    )
    axes.legend(frameon=False)
    plain(axes)
    save(figure, path)
