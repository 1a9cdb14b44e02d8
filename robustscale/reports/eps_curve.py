"""RA over the radius of the attack."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustscale.evaluation.words import attack_name, norm_of, pixels, training_attack
from robustscale.reports.figures import BLUE, GREEN, VERMILLION, new_figure, plain, save, source_name
from robustscale.reports.tables import attacker_of
from robustscale.run import Run
from robustscale.threat import Threat


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
    attack = _attack(evaluation)
    axes.plot(eps, ra, color=VERMILLION, marker="o", label=f"RA under {attack}, an upper bound")
    clean: dict[str, Any] = {"color": BLUE, "marker": "D", "markersize": 8, "linestyle": "none"}
    axes.plot([0], [100 * evaluation["sa"]], **clean, clip_on=False, zorder=5, label="SA (no attack)")
    # None where nothing, or no single ball, was trained against.
    threat = getattr(training_attack(run.objective), "threat", None)
    if isinstance(threat, Threat) and norm_of(threat) == evaluation["norm"]:
        trained = threat.eps
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
        title=f"{run.name}: {source_name(run)}{_behind(evaluation)}, {attack} in {unit}, {evaluation['n']:,} images",
    )
    axes.legend(frameon=False)
    plain(axes)
    save(figure, path)


def _attack(evaluation: Mapping[str, Any]) -> str:
    """Of the sweep: `pgd-20`, or `eot-20 pgd-20` on a randomised network."""
    names = [entry["attack"] for entry in evaluation["sweep"] if entry["attack"]]
    return attack_name(attacker_of(evaluation["attacks"][names[0]]).attack) if names else "no attack"


def _behind(evaluation: Mapping[str, Any]) -> str:
    """What the network is read behind."""
    if "noise" not in evaluation:
        return ""
    return f" behind noise of sigma {pixels(evaluation['noise'])}"
