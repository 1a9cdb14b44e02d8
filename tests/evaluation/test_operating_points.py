"""Points of finished runs: what each is judged by, and that no network is judged but the one that is named."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.engine.backend import LocalBackend
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.final import evaluate_run
from robustscale.evaluation.images import Images
from robustscale.evaluation.joined_runs import (
    interpolated_network,
    kept_weights,
    require_same_data,
    require_same_model,
    statistics_path,
)
from robustscale.evaluation.mixture_attacks import PartsGoal, mixture_attackers
from robustscale.evaluation.operating_points import Emit, Judging, Parts, judge_points
from robustscale.evaluation.words import Attacker
from robustscale.models.conditional import Conditional
from robustscale.models.network import build
from robustscale.models.output_mixture import OutputMixture
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.run import Evaluation, Run
from robustscale.testing.gloo import run_ranks
from robustscale.threat import Linf
from robustscale.types import Backend, Model
from tests.engine.small import SPEC, MemoryLoader

TOLD = Conditional(Slimmable(ResNet(18, width=1 / 16), widths=(0.5, 1.0)), dimensions=8)


def run_of(model: Model) -> Run:
    threat = Linf(0.1)
    evaluation = Evaluation(attack=PGD(threat, steps=3), monitor=PGD(threat, steps=2), batch_size=40)
    return Run(name="small", model=model, evaluation=evaluation, batch_size=40, shards=4)


def folder_of(path: Path, model: Model, seed: int = 0) -> RunFolder:
    """A finished run's, of a network that was never trained, but whose BatchNorm has seen images."""
    folder, facts = RunFolder(path), {"fingerprint": "f"}
    folder.write_run(run_of(model))
    folder.write("data.json", {"spec": SPEC._asdict(), "train": facts, "test": facts, "held_out": 24})
    folder.write("result.json", {"weights": "last"})
    network = build(model, SPEC, seed)
    with torch.no_grad():
        for k in range(20):
            network(MemoryLoader(run_of(model), 0, 1, 64).x + k / 100)
    folder.save_weights("last", network, epoch=1, step=1)
    return folder


def parts_of(run: Run, backend: Backend) -> Parts:
    def loader(n: int) -> MemoryLoader:
        return MemoryLoader(run, backend.rank, backend.world, n)

    return Parts(loader(24), loader(30), loader(96))


def judged(
    folders: list[RunFolder],
    kind: str,
    at: list[dict[str, Any]],
    backend: Backend | None = None,
    emit: Emit = lambda record: None,
) -> Any:
    run, backend = folders[0].run(), backend or LocalBackend()
    options = {
        "kind": kind,
        "at": at,
        "folders": [str(folder.path) for folder in folders],
        "weights": ["last"] * len(folders),
        "judging": dataclasses.asdict(Judging(steps=2, full_steps=2)),
    }
    return list(judge_points(run, folders[0], parts_of(run, backend), backend, emit, options))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return folder_of(tmp_path_factory.mktemp("runs") / "told", TOLD)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    root = tmp_path_factory.mktemp("runs")
    return [folder_of(root / name, ResNetCifar(8, base=4), seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize("lam, width", [(0.2, 0.5), (0.0, 1.0)])
def test_a_sweep_finds_what_evaluate_finds(told: RunFolder, lam: float, width: float) -> None:
    at = [{"lam": 1.0, "width": 1.0}, {"lam": lam, "width": width}]
    point = judged([told], "lambda", at)[1]
    inner = dataclasses.replace(TOLD.model, width=width)  # type: ignore[type-var]
    run = dataclasses.replace(told.run(), model=dataclasses.replace(TOLD, model=inner, lam=lam))
    options = {"noise": None, "noise_draws": 1, "weights": "last", "eps_linf": None, "eps_l2": None}
    options |= {"attacks": ("fgsm",), "point": "-there"}
    test = parts_of(run, LocalBackend()).test
    assert test is not None
    evaluate_run(run, told, test, LocalBackend(), lambda record: None, options)
    found = told.read("evaluation-there/evaluation.json")
    assert point["at"] == at[1]
    assert (point["test"]["sa"], point["test"]["n"], point["test"]["ball"]) == (found["sa"], 30, "linf 0.1")
    assert point["test"]["ra"] == found["attacks"]["pgd-3 linf 0.1"]["ra"]
    assert point["test"]["attacks"] == {"pgd-3 linf 0.1": point["test"]["ra"]}
    assert (point["attack"], point["n"]) == ("apgd-2 linf 0.1", 24)
    assert point["sa_interval"][0] <= point["sa"] <= point["sa_interval"][1]


def test_progress_names_its_point(pair: list[RunFolder]) -> None:
    records: list[dict[str, Any]] = []
    judged(pair, "mixture", [{"alpha": 1.0}], emit=records.append)
    messages = [record["message"] for record in records if record["event"] == "judge"]
    assert messages and set(messages) == {"at alpha 1.0"}


def test_the_ends_of_both_joins_are_the_runs(pair: list[RunFolder]) -> None:
    runs = judged(pair, "runs", [{"run": 0}, {"run": 1}])
    weights = judged(pair, "interpolation", [{"t": 0}, {"t": 0.5}, {"t": 1}])
    outputs = judged(pair, "mixture", [{"alpha": 0}, {"alpha": 1}])
    for alone, t, alpha in zip(runs, weights[::2], outputs, strict=True):
        assert {**alone, "at": None} == {**t, "at": None}
        assert (alone["sa"], alone["test"]["sa"]) == (alpha["sa"], alpha["test"]["sa"])
        pgd = "pgd-3 linf 0.1"
        assert alone["test"]["attacks"][pgd] == alpha["test"]["attacks"][pgd] >= alpha["test"]["ra"]
    assert len(outputs[0]["test"]["attacks"]) == 4


def test_what_is_taken_is_what_was_judged(pair: list[RunFolder]) -> None:
    """The network that an export gets has the statistics of the judged one, or there is none."""
    a, b = pair
    statistics_path(a, b, 0.25).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"judge it: python -m robustscale.frontier --interpolate .* --at 0.25"):
        interpolated_network(a, b, 0.25, None)
    point = judged(pair, "interpolation", [{"t": 0.25}])[0]
    network = interpolated_network(a, b, 0.25, None)
    parts = parts_of(a.run(), LocalBackend())
    examples = judge(network, parts.held_out, {}, LocalBackend(), 0)
    assert examples.right.double().mean().item() == point["sa"]
    stored = safetensors.torch.load_file(statistics_path(a, b, 0.25))
    assert stored and all(torch.equal(network.state_dict()[name], value) for name, value in stored.items())
    assert not torch.equal(network.state_dict()[min(stored)], a.network("last").state_dict()[min(stored)])
    before = b.weights_path("last").read_bytes()
    b.save_weights("last", build(ResNetCifar(8, base=4), SPEC, 7), epoch=1, step=1)
    try:
        with pytest.raises(InputError, match="of other weights"):
            interpolated_network(a, b, 0.25, None)
    finally:
        b.weights_path("last").write_bytes(before)


def judge_rank(rank: int, world: int, paths: list[str], kind: str, at: list[dict[str, Any]]) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already
    from cluster.ddp_backend import DdpBackend

    return judged([RunFolder(path) for path in paths], kind, at, DdpBackend(cpu=True))


@pytest.mark.slow
def test_two_workers_judge_as_one(pair: list[RunFolder]) -> None:
    at = [{"t": 0.0}, {"t": 0.4}]
    alone = judged(pair, "interpolation", at)
    stored = statistics_path(pair[0], pair[1], 0.4).read_bytes()
    for found in run_ranks(judge_rank, 2, 2, [str(folder.path) for folder in pair], "interpolation", at):
        assert found == alone
    assert statistics_path(pair[0], pair[1], 0.4).read_bytes() == stored


def test_the_parts_of_a_mixture_cannot_hide() -> None:
    """g is a linear network so sure of itself that the mixture's loss has no gradient of it; it decides alone."""

    class Linear(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.rows = nn.Parameter(scale * torch.eye(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.rows.T

    class Constant(nn.Module):
        """Right, whatever is done to the image, and with a gradient that moves all pixels alike."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            away = -1e-3 * x.flatten(1).sum(1, keepdim=True)
            return torch.cat([away + 1, 0 * away, 0 * away, 0 * away], 1)

    x = torch.tensor([0.6, 0.42, 0.3, 0.3]).view(1, 1, 2, 2).repeat(3, 1, 1, 1)
    y = torch.zeros(3, dtype=torch.int64)
    mixture = OutputMixture(Linear(3000.0), Constant(), 0.3)

    def left(attacker: Attacker) -> float:
        examples = judge(mixture, Images(x, y), {"attack": attacker}, LocalBackend(), 0)
        return examples.robust("attack").double().mean().item()

    whole, parts, dlr = mixture_attackers(mixture, Linf(0.1), 4, 10, 3)
    assert isinstance(parts.goal, PartsGoal) and parts.targets == dlr.targets == 3
    assert whole == Attacker(APGD(Linf(0.1), 10)) and dlr.goal == Goal(loss="dlr")
    assert left(whole) == 1 and left(parts) == 0


def test_runs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    a, b = (folder_of(tmp_path / name, ResNetCifar(8, base=4)) for name in "ab")
    require_same_data(a, b)
    data = json.loads((b.path / "data.json").read_text())
    b.write("data.json", {**data, "test": {"fingerprint": "g"}})
    with pytest.raises(InputError, match="another test set"):
        require_same_data(a, b)
    b.write("data.json", {**data, "held_out": 10})
    with pytest.raises(InputError, match=r"holds out 10 images and .* 24"):
        require_same_data(a, b)
    b.write("data.json", {**data, "spec": {**data["spec"], "classes": 9}})
    with pytest.raises(InputError, match="images of"):
        require_same_data(a, b)
    b.write_run(run_of(ResNetCifar(14, base=4)))
    with pytest.raises(InputError, match=r"model.depth is 8 in .*, 14 in"):
        require_same_model(a, b)


def test_a_training_of_a_search_stands_for_its_last_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ResNetCifar(8, base=4))
    assert (kept_weights(folder, None), kept_weights(folder, "best")) == ("last", "best")
    (folder.path / "result.json").unlink()
    with pytest.raises(InputError, match="did not get so far"):
        kept_weights(folder, None)
    folder.write("trial.json", {})
    assert kept_weights(folder, None) == "last"
