"""MixUp and CutMix: against their definitions, and alike for any number of workers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from robustscale.cli import parse_run
from robustscale.config import components, override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.mix import Mix, beta, boxes, mixed, partners
from robustscale.engine.rehearsal import rehearse
from robustscale.engine.step import TrainStep
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.noise import Noise
from robustscale.objectives.natural import Natural
from robustscale.run import Run, identity, same_result
from robustscale.testing.gloo import run_ranks
from robustscale.types import Batch, Objective, Progress, Share
from tests.engine.small import SPEC, MemoryLoader, golden_runs, small_run, train, train_rank

AT = Progress(seed=0, epoch=0, step=3, total_steps=10)
BOTH = Mix(mixup=0.4, cutmix=1.0, share=0.8)


def share_of(sizes: tuple[int, ...] = (16, 15), side: int = 12, classes: int = 10) -> Share:
    n = sum(sizes)
    index = 3 * torch.arange(n) + 5
    noise = Noise.of(1, index, "images")
    batch = Batch.of(noise.fold("x").uniform(3, side, side), noise.fold("y").below(classes), index)
    return Share(batch, sizes, n)


def recovered(share: Share, found: Batch, step: int = AT.step) -> tuple[Tensor, Tensor]:
    """(partner, λ), λ as the targets have it: nan where both labels are one."""
    other = partners(share, Noise.of(AT.seed, share.batch.index, "mix", step).fold("partner"))
    lam = found.target.gather(1, share.batch.y[:, None])[:, 0]
    return other, torch.where(share.batch.y == share.batch.y[other], torch.nan, lam)


def test_mixup_is_the_convex_combination() -> None:
    share = share_of()
    found = mixed(share, Mix(mixup=1.0), 10, AT).batch
    other, lam = recovered(share, found)
    known = ~lam.isnan()
    assert known.sum() > 20
    x = lam[:, None, None, None] * share.batch.x + (1 - lam)[:, None, None, None] * share.batch.x[other]
    torch.testing.assert_close(found.x[known], x[known], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.target.sum(1), torch.ones(31))
    dominant = torch.where(lam >= 0.5, share.batch.y, share.batch.y[other])
    assert torch.equal(found.y[known], dominant[known])
    assert 0 < (lam[known] < 0.5).sum() < known.sum()
    assert torch.equal(found.index, share.batch.index)


def authors_box(size: tuple[int, int], lam: float, cx: int, cy: int) -> tuple[int, int, int, int]:
    """rand_bbox of clovaai/CutMix-PyTorch for a given centre: rows from, to, columns from, to."""
    ratio = np.sqrt(1.0 - lam)
    height, width = int(size[0] * ratio), int(size[1] * ratio)
    rows = np.clip([cy - height // 2, cy + height // 2], 0, size[0])
    columns = np.clip([cx - width // 2, cx + width // 2], 0, size[1])
    return int(rows[0]), int(rows[1]), int(columns[0]), int(columns[1])


def test_boxes_are_the_authors() -> None:
    noise = Noise.of(0, torch.arange(300), "cutmix")
    got = boxes(noise, 1.0, 9, 14)
    lam = beta(noise.fold("lambda"), 1.0)
    rows, columns = noise.fold("row").below(9), noise.fold("column").below(14)
    for mask, one, cy, cx in zip(got, lam.tolist(), rows.tolist(), columns.tolist(), strict=True):
        top, bottom, left, right = authors_box((9, 14), one, cx, cy)
        expected = torch.zeros(9, 14, dtype=torch.bool)
        expected[top:bottom, left:right] = True
        assert torch.equal(mask, expected)


def test_cutmix_pastes_a_box_and_counts_its_pixels() -> None:
    share = share_of()
    found = mixed(share, Mix(cutmix=1.0), 10, AT).batch
    other, lam = recovered(share, found)
    its = (found.x == share.batch.x[other]).all(1)
    own = (found.x == share.batch.x).all(1)
    assert (its | own).all()
    apart = other != torch.arange(31)
    covered = 1 - its.double().mean((1, 2))
    known = apart & ~lam.isnan()
    torch.testing.assert_close(lam[known].double(), covered[known], rtol=0, atol=1e-6)
    assert ((lam[known] > 0) & (lam[known] < 1)).sum() > 10


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
def test_lambda_is_beta(alpha: float) -> None:
    lam = beta(Noise.of(0, torch.arange(20000), "beta"), alpha)
    assert lam.isfinite().all() and (lam >= 0).all() and (lam <= 1).all()
    assert stats.kstest(lam.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_partners_are_of_the_shard_and_of_the_kind() -> None:
    share = share_of((7, 1, 12, 0, 11))
    share = share._replace(batch=share.batch._replace(labelled=share.batch.index % 2 == 0))
    seen = set()
    for step in range(30):
        other = partners(share, Noise.of(0, share.batch.index, "mix", step).fold("partner"))
        shard = torch.arange(5).repeat_interleave(torch.tensor(share.sizes))
        assert torch.equal(other.sort().values, torch.arange(31)), "a permutation"
        assert torch.equal(shard[other], shard)
        assert torch.equal(share.batch.labelled[other], share.batch.labelled)
        seen |= {(i, int(j)) for i, j in enumerate(other)}
    # Every pair that may be, comes: 7 images are 4 and 3 of a kind, 12 twice 6, 11 are 6 and 5.
    assert len([pair for pair in seen if pair[0] < 7]) == 4 * 4 + 3 * 3


def test_shares_of_the_images() -> None:
    share = share_of((2000,), side=8)
    mix = Mix(mixup=1.0, cutmix=1.0, share=0.75, switch=1 / 3)
    assert mix.shares == pytest.approx((0.5, 0.25))
    lot = Noise.of(AT.seed, share.batch.index, "mix", AT.step).fold("kind").uniform()
    found = mixed(share, mix, 10, AT).batch
    same = (found.x == share.batch.x).flatten(1).all(1)
    assert torch.equal(found.x[lot >= 0.75], share.batch.x[lot >= 0.75])
    by_mixup = lot < mix.shares[0]
    assert same[by_mixup].float().mean() < 0.01
    pasted = (found.x != share.batch.x).any(1)[(lot >= mix.shares[0]) & (lot < 0.75)]
    assert pasted.any()
    assert mixed(share, Mix(mixup=1.0, share=0.0), 10, AT) is share
    assert mixed(share, Mix(), 10, AT) is share


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_workers_mixes_alike(world: int) -> None:
    run = small_run(batch_size=30, shards=4, cluster={"workers": 1})
    whole = [mixed(s, BOTH, 10, AT._replace(step=k)) for k, s in enumerate(MemoryLoader(run, 0, 1).epoch(1))]
    ranks = [MemoryLoader(run, rank, world).epoch(1) for rank in range(world)]
    for step, shares in enumerate(zip(*ranks, strict=True)):
        parts = [mixed(share, BOTH, 10, AT._replace(step=step)).batch for share in shares]
        for column, expected in zip(zip(*parts, strict=True), whole[step].batch, strict=True):
            assert torch.equal(torch.cat(column), expected)


def test_a_mix_is_of_the_step_and_the_seed() -> None:
    share = share_of()
    first = mixed(share, BOTH, 10, AT).batch.x
    assert torch.equal(first, mixed(share, BOTH, 10, AT._replace(epoch=7, total_steps=99)).batch.x)
    assert not torch.equal(first, mixed(share, BOTH, 10, AT._replace(step=4)).batch.x)
    assert not torch.equal(first, mixed(share, BOTH, 10, AT._replace(seed=1)).batch.x)


@pytest.mark.parametrize("mix", [{"mixup": 1.0}, {"cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_steps_loss_is_the_closed_form(mix: dict[str, float], smoothing: float) -> None:
    """λ CE(y1) + (1 - λ) CE(y2), and with smoothing s the mean over classes with the weight s."""
    run = small_run(objective="natural", mix=mix, label_smoothing=smoothing)
    network = build(run.model, SPEC, 0).double()
    step = TrainStep(run, network, LocalBackend())
    share = next(MemoryLoader(run, 0, 1).epoch(0))
    share = share._replace(batch=share.batch._replace(x=share.batch.x.double()))
    plain = mixed(share, Mix(**mix), 10, AT).batch
    other, lam = recovered(share, plain)
    lam = lam.nan_to_num(1.0).double()  # of one label both losses are one
    log_p = F.log_softmax(network.train()(plain.x), 1).detach()
    first, second = (F.nll_loss(log_p, y, reduction="none") for y in (share.batch.y, share.batch.y[other]))
    losses = (1 - smoothing) * (lam * first + (1 - lam) * second) - smoothing * log_p.mean(1)
    assert step(share, AT, 0.0).loss == pytest.approx(float(losses.mean()), rel=1e-5)


def test_attacks_see_the_mixed_image_and_the_dominant_label() -> None:
    run = small_run(mix={"mixup": 1.0})
    share = next(MemoryLoader(run, 0, 1).epoch(0))
    step = TrainStep(run, build(run.model, SPEC, 0), LocalBackend())
    seen: list[Batch] = []

    class Seeing(Natural):
        def perturb(self, model: Any, batch: Batch, at: Progress) -> Any:
            seen.append(batch)
            return super().perturb(model, batch, at)

    step.run = override(run, {})
    object.__setattr__(step.run, "objective", Seeing())
    step(share, AT, 0.0)
    expected = mixed(share, Mix(mixup=1.0), 10, AT).batch
    for got, wanted in zip(seen[0], expected, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(seen[0].y, expected.target.argmax(1))
    assert not torch.equal(seen[0].y, share.batch.y)


@pytest.mark.parametrize(
    "name", ["trades", *(pytest.param(n, marks=pytest.mark.slow) for n in components(Objective) if n != "trades")]
)
def test_every_objective_trains_on_mixes(name: str) -> None:
    run = override(golden_runs()[name], {"mix": {"mixup": 0.8, "cutmix": 1.0}, "epochs": 1})
    losses, state, trainer = train(run)
    rehearse(trainer.train_step, SPEC, 4)
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert all(bool(v.isfinite().all()) for v in state.values())
    assert losses != train(override(run, {"mix": {"mixup": 0.0, "cutmix": 0.0}}))[0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_training_on_mixes_ends_with_the_same_bits(world: int) -> None:
    run = small_run(
        mix={"mixup": 0.4, "cutmix": 1.0}, reduction="deterministic", shards=4, cluster={"workers": 1}, epochs=2
    )
    losses, state, _ = train(run)
    for found, its in run_ranks(train_rank, world, run, world):
        assert found == losses
        assert all(torch.equal(its[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mix": {"mixup": 2.0}}, r"mix.mixup: 2.0 is neither 0"),
        ({"mix": {"cutmix": -1.0}}, r"mix.cutmix: -1.0 is neither 0"),
        ({"mix": {"share": 1.5}}, r"mix.share: 1.5 is outside"),
        ({"mix": {"switch": -0.5}}, r"mix.switch: -0.5 is outside"),
        ({"mix": {"mixup": 1.0}, "batch_size": 12}, r"batch_size: 12 gives the 8 shards fewer than 2"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_run(**changes)


def test_an_older_identity_is_this_runs_where_nothing_is_mixed() -> None:
    run = small_run()
    older = json.loads(json.dumps(identity(run)))
    assert "mix" not in older
    assert same_result(older, run)
    assert not same_result(older, small_run(mix={"mixup": 0.2}))
    assert same_result(json.loads(json.dumps(identity(small_run(mix={"mixup": 0.2})))), small_run(mix={"mixup": 0.2}))


def test_the_command_line_sets_it() -> None:
    run = parse_run(["--mix.mixup", "0.8", "--mix.cutmix", "1"], "pretrain", "", Run())
    assert run.mix == Mix(mixup=0.8, cutmix=1.0)
