"""DeepSpeed in the process group of Ray Train."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.conftest import SMALL, Command


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2"])
def test_the_engine_that_was_asked_for_is_the_one_that_ran(
    ray_head: dict[str, str], tmp_path: Path, command: Command, engine: str
) -> None:
    args = [*SMALL, "--storage", tmp_path, "--run-name", engine, "--data.root", ray_head["TEST_CACHE"]]
    done = command("robustscale.pretrain", *args, "--cluster.engine", engine, env=ray_head)
    assert done.returncode == 0, done.stdout
    assert "deepspeed" not in done.stdout.lower(), "it talks to the person"
    result = RunFolder(tmp_path / engine).read("result.json")
    assert result["engine"] == engine
    assert 0 <= result["ra"] <= result["sa"] <= 1
