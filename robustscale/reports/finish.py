"""What a person is shown when a run or an evaluation ends: pictures, the model card, a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder, publish
from robustscale.errors import InputError
from robustscale.evaluation.certificates import certification_folder
from robustscale.evaluation.words import Attacker, name_of
from robustscale.reports.card import model_card
from robustscale.reports.certified import certified_table, draw_certified
from robustscale.reports.confusion import draw_confusion, forensics_table
from robustscale.reports.curves import draw_curves
from robustscale.reports.eps_curve import draw_eps_curve
from robustscale.reports.figures import source_name
from robustscale.reports.frontier_page import frontier_page
from robustscale.reports.frontier_plot import draw_frontier
from robustscale.reports.frontier_table import frontier_table
from robustscale.reports.gallery import draw_gallery
from robustscale.reports.plan import plan_table, planned, with_actual
from robustscale.reports.tables import attacker_of, evaluation_table, result_table
from robustscale.run import Run
from robustscale.untrusted import open_tensors

_ANEW = "restore it from a copy"


def finish_run(folder: RunFolder) -> None:
    """Draw curves.png and examples.png, then write README.md. Safe to repeat."""
    run = folder.run()
    with folder.reading("data.json") as data, folder.reading("result.json") as result:
        _draw_run(folder, run, data, result)


def _draw_run(folder: RunFolder, run: Run, data: dict[str, Any], result: dict[str, Any]) -> None:
    about, attack = f"{run.name}: {source_name(run)}", name_of(attacker_of(result))
    monitor = name_of(Attacker(run.evaluation.monitor, run.evaluation.goal))
    draw_curves(read_lines(folder), folder.path / "curves.png", f"{about}, RA under {monitor}")
    try:
        with open_tensors(folder.gallery, _ANEW) as file:
            shown: dict[str, Any] = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except FileNotFoundError:
        raise InputError(f"{folder.gallery}: missing; {_ANEW}") from None
    title = f"{about}, first images of the test set under {attack}"
    draw_gallery(**shown, classes=data["classes"], path=folder.path / "examples.png", title=title)
    plan = planned(folder, run)
    if plan is not None:
        with folder.reading("plan.json"):
            plan = with_actual(folder, run, plan, result)
        folder.write("plan.json", plan)
    card = model_card(run, data, result, result["versions"], result["wall_seconds"], folder.where, plan)
    publish(folder.path / "README.md", card.encode())


def show_result(folder: RunFolder) -> None:
    """Print the table of a finished run, and where it lies."""
    with folder.reading("data.json") as data, folder.reading("result.json") as result:
        result_table(folder.run(), data, result)
    plan = planned(folder, folder.run())
    if plan is not None:
        with folder.reading("plan.json"):
            plan_table(folder.run(), plan)
    print(f"\n{folder.where}/" + f"  (here: {folder.path}/)" * (folder.mirror is not None))


def finish_evaluation(folder: RunFolder, run: Run, where: Path) -> None:
    """Draw eps_curve.png, if there was a sweep, in `where` the results are; print the table. `run` is as judged: its
    model may be read at another λ or width than it was trained to answer at."""
    data, evaluation = folder.read("data.json"), folder.read(f"{where.name}/evaluation.json")
    curve = where / "eps_curve.png"
    # One of an earlier evaluation would stand beside figures that it does not show.
    curve.unlink(missing_ok=True)
    if len(evaluation["sweep"]) > 1:
        draw_eps_curve(run, data, evaluation, curve)
    evaluation_table(run, data, evaluation)
    print(f"\n{where}/")


def finish_certification(folder: RunFolder, sigma: float) -> None:
    """Draw certify-SIGMA/certified.png; print the table."""
    where = certification_folder(folder, sigma)
    run, result = folder.run(), folder.read(f"{where.name}/certify.json")
    draw_certified(run, result, where / "images.parquet", where / "certified.png")
    certified_table(run, result)
    print(f"\n{where}/")


def finish_forensics(folder: RunFolder) -> None:
    """Draw forensics/confusion.png; print the table."""
    run, result = folder.run(), folder.read("forensics/forensics.json")
    draw_confusion(run, result, folder.path / "forensics" / "confusion.png")
    forensics_table(run, result)
    print(f"\n{folder.path / 'forensics'}/")


def finish_frontier(folder: RunFolder, found: dict[str, Any]) -> None:
    """Write frontier.json and frontier.html, draw frontier.png; print the table."""
    folder.write("frontier.json", found)
    publish(folder.path / "frontier.html", frontier_page(found).encode())
    draw_frontier(found, folder.path / "frontier.png")
    frontier_table(found, folder.path / "frontier.html")
    print(f"\n{folder.path}/")
