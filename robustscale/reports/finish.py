"""What a person is shown when a run or an evaluation ends: pictures, the model card, a table."""

from __future__ import annotations

from typing import Any

import safetensors.torch

from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder, publish
from robustscale.evaluation.words import Attacker, name_of
from robustscale.reports.card import model_card
from robustscale.reports.curves import draw_curves
from robustscale.reports.eps_curve import draw_eps_curve
from robustscale.reports.figures import source_name
from robustscale.reports.gallery import draw_gallery
from robustscale.reports.tables import attacker_of, evaluation_table, result_table


def finish_run(folder: RunFolder) -> None:
    """Draw curves.png and examples.png, then write README.md. Safe to repeat."""
    run, data, result = folder.run(), folder.read("data.json"), folder.read("result.json")
    about, attack = f"{run.name}: {source_name(run)}", name_of(attacker_of(result))
    monitor = name_of(Attacker(run.evaluation.monitor, run.evaluation.goal))
    draw_curves(read_lines(folder), folder.path / "curves.png", f"{about}, RA under {monitor}")
    shown: dict[str, Any] = safetensors.torch.load_file(folder.gallery)
    title = f"{about}, first images of the test set under {attack}"
    draw_gallery(**shown, classes=data["classes"], path=folder.path / "examples.png", title=title)
    card = model_card(run, data, result, result["versions"], result["wall_seconds"], str(folder.path))
    publish(folder.path / "README.md", card.encode())


def show_result(folder: RunFolder) -> None:
    """Print the table of a finished run, and where it lies."""
    result_table(folder.run(), folder.read("data.json"), folder.read("result.json"))
    print(f"\n{folder.path}/")


def finish_evaluation(folder: RunFolder) -> None:
    """Draw evaluation/eps_curve.png; print the table."""
    run, data, evaluation = folder.run(), folder.read("data.json"), folder.read("evaluation/evaluation.json")
    draw_eps_curve(run, data, evaluation, folder.evaluation / "eps_curve.png")
    evaluation_table(run, data, evaluation)
    print(f"\n{folder.evaluation}/")
