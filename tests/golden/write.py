"""Writes the golden traces anew: `python -m tests.golden.write`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.engine.small import golden_runs, golden_trace


def main() -> None:
    torch.set_num_threads(1)
    for name, run in golden_runs().items():
        losses = golden_trace(run)
        (Path(__file__).parent / f"{name}.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
