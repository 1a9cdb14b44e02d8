"""A run that diverges goes back and on at a lower rate: driver, worker and checkpoints together, on one worker that is
this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import launch as driver
from cluster.attempt import job
from cluster.launch import Launch
from cluster.worker import alone
from robustscale import pretrain
from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder
from robustscale.errors import Diverged
from robustscale.run import Run

SMALL = "digits --run-name run --epochs 2 --model.base 4 --evaluation.monitor.steps 1 --evaluation.attack.steps 1"
SMALL += " --log-every 1 --checkpoints.every-steps 2"
# A step of this rate leaves weights of which no loss is finite; a rollback makes it 0.05.
WILD = "--optimizer.lr 1e18 --divergence.skip 2 --divergence.rollback-lr 5e-20"
Pretrain = Callable[[str], list[str]]


class Alone(Launch):
    def _attempt(self, reason: str) -> str | None:
        alone(job(self.task, self.run, self.folder, self._options(), gpu=False), self.show)
        return None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def pretrained(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretrain]:
    """Runs the door without a cluster; returns what it said."""
    said: list[str] = []

    def launched(task: str, run: Run, folder: RunFolder, show: Any) -> None:
        def hear(record: dict[str, Any]) -> None:
            said.append(record.get("message", ""))

        Alone(task, run, folder, hear, {}, False, None).run_on()  # type: ignore[arg-type]

    def door(options: str) -> list[str]:
        said.clear()
        place = f"--storage {tmp_path} --data.root {data}"
        monkeypatch.setattr(sys, "argv", ["pretrain", *f"{SMALL} {place} {options}".split()])
        assert pretrain.main() == 0
        return said

    monkeypatch.setattr(driver, "launch", launched)
    threads = torch.get_num_threads()
    yield door
    torch.set_num_threads(threads)


def rates(folder: RunFolder) -> list[float]:
    return [line["lr"] for line in read_lines(folder) if line["event"] == "step"]


@pytest.mark.filterwarnings("ignore")
def test_it_goes_back_and_ends_at_a_lower_rate(pretrained: Pretrain, tmp_path: Path) -> None:
    told = [line for line in pretrained(f"{WILD} --divergence.rollbacks 1") if "going back" in line]
    assert len(told) == 1 and "training diverged (step 4: loss" in told[0] and "images" in told[0]
    folder = RunFolder(tmp_path / "run")
    assert folder.rollbacks()[0]["message"].startswith("step 4")
    assert max(rates(folder)) == pytest.approx(0.05, rel=0.05), "no record of the steps that were taken back is left"
    result = folder.read("result.json")
    assert result["rollbacks"] == 1 and result["skipped_steps"] == 0


@pytest.mark.filterwarnings("ignore")
def test_it_gives_up_in_time_and_begins_anew_at_the_whole_rate(pretrained: Pretrain, tmp_path: Path) -> None:
    """As the message asks: with another rate, under the same name. Nothing of the run that diverged is left then."""
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Diverged, match=r"lower optimizer\.lr"):
        pretrained(f"{WILD} --divergence.rollbacks 2 --divergence.rollback-lr 0.5")
    assert len(folder.rollbacks()) == 2 and not folder.has_checkpoint()
    pretrained("--optimizer.lr 0.1")
    assert folder.rollbacks() == [] and max(rates(folder)) == pytest.approx(0.1, rel=0.05)
    assert folder.read("result.json")["rollbacks"] == 0
