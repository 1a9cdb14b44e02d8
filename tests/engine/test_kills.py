"""SIGKILL at any moment: the run that goes on ends bitwise as the one that was never killed, in weights, optimizer,
averages, scaler, selection and every step's record."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engine.killed import attempt, digest, kill_all
from tests.engine.small import small_run

SAVING = {"every_steps": 1, "every_epochs": 1, "keep": 2}
PLAIN: dict[str, Any] = {"checkpoints": SAVING, "epochs": 5, "evaluation": {"monitor": {"steps": 1}}}
TRADES = {"name": "trades", "attack": {"threat": {"eps": 0.1}, "steps": 2}}
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one worker": (1, {}),
    "two workers": (2, {}),
    "deterministic": (2, {"reduction": "deterministic", "shards": 2}),
    "no BatchNorm": (2, {"model": "basic"}),
    "TRADES with an average": (2, {"objective": TRADES, "averaging": {"name": "ema", "decay": 0.9}}),
    "GradScaler": (1, {"precision": "fp16"}),
    "AWP with an average": (1, {"objective": "awp", "averaging": "swa"}),
    "AdamW, accumulated": (2, {"optimizer": "adamw", "accumulation": 2}),
}


def run_with_kills(kind: str, root: Path, num_kills: int, seed: int) -> int:
    """Kills made; asserts equality with an uninterrupted twin. Further runs are begun until there are enough."""
    world, changes = KINDS[kind]
    run = small_run(**{**PLAIN, "cluster": {"workers": world}, **changes})
    began = time.monotonic()
    assert attempt(run, world, root / "twin", None)
    seconds = time.monotonic() - began
    expected = digest(root / "twin")
    draw = random.Random(seed)
    kills = 0
    for number in range(4 * num_kills):
        folder = root / f"run-{number}"
        began = time.monotonic()

        def kill(pids: list[int], seconds: float = seconds) -> bool:
            time.sleep(draw.uniform(0, seconds))
            return kill_all(draw.choice([pids, pids[:1], pids[-1:]]))

        while kills < num_kills and not attempt(run, world, folder, kill):
            kills += 1
            began = time.monotonic()
        # The first took longer, or the machine was busier: a kill must not come after the end.
        seconds = min(seconds, time.monotonic() - began)
        if not (folder / "checkpoints").exists() or kills >= num_kills:
            assert attempt(run, world, folder, None)
        assert digest(folder) == expected, f"{kind}, run {number}, after {kills} kills"
        folders = [path.name for path in (folder / "checkpoints").iterdir()]
        assert len(folders) <= 2 and all(name.startswith("step-") for name in folders)
        if kills >= num_kills:
            break
    return kills


@pytest.mark.parametrize("kind", ["two workers"])
def test_a_few_kills(kind: str, tmp_path: Path) -> None:
    assert run_with_kills(kind, tmp_path, 2, seed=0) == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_many_kills(kind: str, tmp_path: Path) -> None:
    assert run_with_kills(kind, tmp_path, 63, seed=1) == 63
