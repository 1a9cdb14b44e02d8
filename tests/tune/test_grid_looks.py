"""What the monitor found, read off the log of a training."""

from __future__ import annotations

import json
from pathlib import Path

from robustscale.engine.folder import RunFolder
from robustscale.run import Run
from tune.grid_node import Log, _read_looks


def test_looks_are_the_epochs_that_were_judged(tmp_path: Path) -> None:
    """With evaluation.every 2 the first epoch is not."""
    folder = RunFolder(tmp_path)
    folder.write("data.json", {"held_out": 64})
    lines = [
        {"event": "step", "step": 1, "epoch": 0, "ra": 0.9},
        {"event": "epoch", "step": 10, "epoch": 1, "loss": 2.0},
        {"event": "epoch", "step": 20, "epoch": 2, "loss": 1.5, "sa": 0.5, "ra": 0.25},
        {"event": "epoch", "step": 40, "epoch": 4, "loss": 1.0, "sa": 0.625, "ra": 0.375},
    ]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = _read_looks({}, Run(), folder, Log(tmp_path / "node.jsonl", "0"))
    assert found == {"n": 64, "epochs": {"2": {"sa": 0.5, "ra": 0.25}, "4": {"sa": 0.625, "ra": 0.375}}}
