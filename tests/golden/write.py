"""Writes the golden traces anew: `python -m tests.golden.write`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from robustscale.config import components
from robustscale.types import Objective
from tests.engine.small import small_run, train


def main() -> None:
    torch.set_num_threads(1)
    for name in components(Objective):
        attack = {} if name == "natural" else {"attack": {"threat": {"name": "linf", "eps": 0.1}}}
        losses, _, _ = train(small_run(objective={"name": name, **attack}))
        (Path(__file__).parent / f"{name}.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
