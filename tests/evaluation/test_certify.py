"""Certificates of a run's test images: figures, resuming, and any number of workers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor, nn

from data_loaders.order import Order
from robustscale.config import encode
from robustscale.engine.backend import LocalBackend
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.evaluation.certificates import (
    Certification,
    Certified,
    certification_result,
    chosen,
    write_certificates,
)
from robustscale.evaluation.certify import certify_run, require_certifiable, trained_noise
from robustscale.evaluation.noise_defence import Noisy
from robustscale.evaluation.smoothing import ABSTAIN, Certificate
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.noise import Noise
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from robustscale.types import Batch, DataSpec, Share

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.37,))
BY = {"sigma": 0.25, "n0": 8, "n": 60, "alpha": 0.05, "batch": 25}


class Images:
    """These ids of an endless data set, cut among the workers as the real loaders cut."""

    def __init__(self, ids: list[int], rank: int, world: int) -> None:
        self.num_examples, self.num_batches = len(ids), -(-len(ids) // 4)
        self.order = Order(torch.tensor(ids).numpy(), 4, world, rank, world, 0, shuffle=False)

    def epoch(self, epoch: int, start: int = 0) -> Any:
        for cut in self.order.epoch(epoch, start):
            index = torch.from_numpy(cut.rows)
            noise = Noise.of(0, index, "images")
            batch = Batch.of(noise.uniform(1, 8, 8), noise.fold("y").below(10), index)
            yield Share(batch, cut.sizes, cut.total)


class GlooBackend(LocalBackend):
    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def barrier(self) -> None:
        dist.barrier()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.write_run(Run(model=Basic()))
    folder.write("data.json", {"spec": SPEC._asdict(), "test": {"fingerprint": "0"}})
    folder.save_weights("last", build(Basic(), SPEC), step=3, epoch=1)
    return folder


def certify(
    path: Path, rank: int = 0, world: int = 1, images: int | None = None, *, num_examples: int = 7, **by: Any
) -> list[dict[str, Any]]:
    """What was reported."""
    said: list[dict[str, Any]] = []
    backend = GlooBackend(rank, world) if world > 1 else LocalBackend()
    options = {"by": {**BY, **by}, "every": 1, "images": images, "weights": "last"}
    folder = RunFolder(path)
    certify_run(folder.run(), folder, num_examples, lambda ids: Images(ids, rank, world), backend, said.append, options)
    return said


def on_rank(rank: int, world: int, path: str) -> None:
    certify(Path(path), rank, world)


def results(folder: RunFolder) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    table = pq.read_table(folder.path / "certify-0.25" / "images.parquet").to_pylist()
    result = folder.read("certify-0.25/certify.json")
    return table, {k: v for k, v in result.items() if k not in ("workers", "wall_seconds", "batch", "new")}


@pytest.mark.parametrize("world", [2, 3])
def test_workers_and_batch_change_nothing(folder: RunFolder, world: int, tmp_path: Path) -> None:
    """7 images over 2 or 3 workers: shares are uneven, and some rounds have fewer images than workers."""
    certify(folder.path)
    alone = results(folder)
    for file in (folder.path / "certify-0.25").iterdir():
        file.unlink()
    run_ranks(on_rank, world, world, str(folder.path))
    assert results(folder) == alone
    for file in (folder.path / "certify-0.25").iterdir():
        file.unlink()
    certify(folder.path, batch=1)
    assert results(folder) == alone
    assert [row["index"] for row in alone[0]] == list(range(7))


def test_what_is_certified_is_not_certified_again(folder: RunFolder) -> None:
    def drawn(said: list[dict[str, Any]]) -> int:
        return max((r["total"] for r in said if r["event"] == "certifying"), default=0)

    assert drawn(certify(folder.path, images=3)) == 3 * 68
    (kept,) = (folder.path / "certify-0.25").glob("certificates-*.jsonl")
    with kept.open("a") as file:
        file.write("[3, 1, ")  # the process ended while it wrote
    said = certify(folder.path)
    assert drawn(said) == 4 * 68 and "4 images (3 more are certified already)" in said[0]["message"]
    assert drawn(certify(folder.path)) == 0
    whole = results(folder)
    kept.unlink()
    certify(folder.path)
    assert results(folder) == whole
    # Other weights, or another sigma, are other certificates.
    folder.save_weights("last", build(Basic(), SPEC, seed=1), step=3, epoch=1)
    assert drawn(certify(folder.path)) == 7 * 68
    assert drawn(certify(folder.path, n=61)) == 7 * 69
    # So is another seed: it is what the draws are keyed by.
    folder.write_run(dataclasses.replace(folder.run(), seed=1))
    assert drawn(certify(folder.path)) == 7 * 68


def test_cost_is_told_before_the_first_image(folder: RunFolder) -> None:
    said = certify(folder.path)
    assert said[0]["event"] == "note"
    assert "7 images x 68 draws = 476 forwards: about " in said[0]["message"]
    steps = [r["done"] for r in said[1:]]
    assert steps == sorted(steps) and steps[-1] == 476
    assert said[-1] == {"event": "certifying", "done": 476, "total": 476}


def test_damaged_line_is_refused(folder: RunFolder) -> None:
    certify(folder.path, images=2)
    (kept,) = (folder.path / "certify-0.25").glob("certificates-*.jsonl")
    whole = kept.read_text()
    for line, message in (("{", "damaged line"), ("5", "damaged line"), ("[1, 2]", "no row of five"), ("{}", "no row")):
        kept.write_text(line + "\n" + whole)
        with pytest.raises(InputError, match=message):
            certify(folder.path)


CERTIFICATES = [
    Certificate(1, 60, 1),  # right, at the largest radius
    Certificate(1, 60, 1),  # as sure, and wrong
    Certificate(1, 45, ABSTAIN),  # right, less sure, and too close a race for PREDICT
    Certificate(1, 30, ABSTAIN),  # not above a half
]


def radius_of(hits: int) -> float:
    return float(0.25 * stats.norm.ppf(stats.beta.ppf(0.05, hits, 60 - hits + 1)))


def test_acr_and_certified_accuracy(tmp_path: Path) -> None:
    """ACR = 1/N Σ radius · [right and certified]; at radius r, the share certified there or beyond."""
    certified = Certified([0, 1, 2, 3], [1, 2, 1, 1], CERTIFICATES, Certification(**BY))
    largest = radius_of(60)
    assert certified.radius.tolist() == pytest.approx([largest, 0, radius_of(45), 0], rel=1e-12)
    assert certified.acr == pytest.approx((largest + radius_of(45)) / 4)
    edges = (0, radius_of(45) - 1e-9, radius_of(45) + 1e-9, largest - 1e-9, largest + 1e-9)
    accuracy = [certified.accuracy(r).value for r in edges]
    assert accuracy == [0.5, 0.5, 0.25, 0.25, 0]
    result = json.loads(json.dumps(certification_result(certified), allow_nan=False))
    assert result["abstained"] == 1 and result["predict"]["abstained"] == 2 and result["predict"]["accuracy"] == 0.25
    assert [entry["radius"] for entry in result["certified"]] == [0, 0.125, 0.25, 0.375]
    write_certificates(certified, tmp_path / "images.parquet")
    table = pq.read_table(tmp_path / "images.parquet").to_pydict()
    assert table["certified"] == [1, 1, 1, None] and table["predicted"] == [1, 1, None, None]
    assert table["radius"] == pytest.approx([largest, largest, radius_of(45), None])


def test_images_are_spread_over_the_test_set() -> None:
    assert chosen(10_000, None, None) == list(range(0, 10_000, 20))
    assert chosen(360, None, None) == list(range(360))
    assert chosen(100, 30, None) == [0, 30, 60, 90]
    assert chosen(100, 30, 2) == [0, 30]


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Certification(0.0), "sigma: 0 is no noise"),
    (lambda: Certification(-0.1), "sigma: -0.1 is no standard deviation"),
    (lambda: Certification(float("nan")), "sigma: nan"),
    (lambda: Certification(0.1, n0=0), "n0: 0 is below 1"),
    (lambda: Certification(0.1, n=0), "n: 0 is below 1"),
    (lambda: Certification(0.1, n=9), "n: 9 draws prove nothing at alpha 0.001, even if all agree; take at least 10"),
    (lambda: Certification(0.1, alpha=0.5), "alpha: 0.5 is outside"),
    (lambda: Certification(0.1, batch=0), "batch: 0 is below 1"),
    (lambda: chosen(10, 0, None), "every: 0 is below 1"),
    (lambda: chosen(10, None, 0), "images: 0 is below 1"),
    (lambda: require_certifiable(Noisy(nn.Flatten(), 0.1)), r"draws noise of its own \(Noisy\)"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_ten_draws_are_enough_where_nine_are_not() -> None:
    assert Certification(0.1, n=10).largest_radius > 0


def test_hints_at_training_without_noise() -> None:
    hint = trained_noise(Run(), 0.25)
    assert hint is not None and "pgd_at trains without noise" in hint and "--objective.sigma 0.25" in hint
    require_certifiable(build(Basic(), SPEC))
    assert "sigma" not in json.dumps(encode(Run().objective))
