"""FLOPs against closed forms, against torch's own counter, and against steps that were counted as they were made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from robustscale.attacks.base import Goal
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mixture import Mixture
from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.attacks.worst_of import WorstOf
from robustscale.config import components
from robustscale.engine.backend import LocalBackend
from robustscale.engine.flops import flops_of, look_flops, outcomes, step_flops
from robustscale.engine.step import TrainStep
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.noise import Noise
from robustscale.objectives.awp import Awp
from robustscale.objectives.eps_warmup import EpsWarmup
from robustscale.objectives.mixed import Mixed
from robustscale.objectives.natural import Natural
from robustscale.objectives.oat import Oat
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.rat import Rat
from robustscale.objectives.trades import Trades
from robustscale.objectives.weak_to_strong import WeakToStrong
from robustscale.run import Evaluation, Run
from robustscale.testing.linear import Linear
from robustscale.threat import Linf
from robustscale.types import Batch, Objective, Progress, Share
from tests.engine.small import SPEC, small_run

LINEAR = 2 * 64 * 10
"""A forward of the linear model for one image; its input gradient and its weight gradient cost the same."""


def linear() -> Linear:
    return Linear.random(10, (1, 8, 8))


def of(objective: Objective, network: nn.Module, **changes: Any) -> float:
    return step_flops(replace(small_run(**changes), objective=objective), network, SPEC)


def attack(steps: int) -> PGD:
    return PGD(Linf(0.1), steps=steps)


def gaussian(steps: int) -> PGD:
    return PGD(Linf(0.1), steps=steps, start="gaussian")


@pytest.mark.parametrize("steps", [1, 7])
def test_linear_model_in_closed_form(steps: int) -> None:
    k = steps
    assert of(Natural(), linear()) == 2 * LINEAR
    # K (forward, input gradient), then forward and weight gradient.
    assert of(PgdAt(attack(k)), linear()) == (2 * k + 2) * LINEAR
    assert of(PgdAt(attack(k), beta=0.5), linear()) == (2 * k + 4) * LINEAR
    # K + 3 forwards, K input gradients, two weight gradients.
    assert of(Trades(gaussian(k)), linear()) == (2 * k + 5) * LINEAR
    # A second pass of the loss.
    assert of(Awp(PgdAt(attack(k))), linear()) == (2 * k + 4) * LINEAR


class Convolutions(nn.Module):
    """Two convolutions, the second of stride 2, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).flatten(1))  # type: ignore[no-any-return]


FIRST = 2 * 6 * 8 * 8 * 1 * 9
FORWARD = FIRST + 2 * 8 * 4 * 4 * 6 * 9 + 2 * 8 * 4 * 4 * 10


def test_convolutions_in_closed_form() -> None:
    """An input gradient costs a forward; a full backward two, but for the first layer's input gradient."""
    network = Convolutions()
    assert flops_of(lambda: network(torch.rand(5, 1, 8, 8))) == 5 * FORWARD
    backward = 2 * FORWARD - FIRST
    assert of(Natural(), network) == FORWARD + backward
    # The 17 F that PGD-7 is known to cost, less the first layer's input gradient in the last backward.
    assert of(PgdAt(attack(7)), network) == 7 * 2 * FORWARD + FORWARD + backward == 17 * FORWARD - FIRST
    assert of(Trades(gaussian(10)), network) == (10 + 3) * FORWARD + 10 * FORWARD + 2 * backward


def test_agrees_with_torchs_counter() -> None:
    network = build(small_run().model, SPEC).train()

    def step() -> None:
        F.cross_entropy(network(torch.rand(4, 1, 8, 8)), torch.arange(4)).backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert flops_of(step) == counter.get_total_flops() > 0


@torch.inference_mode()
def test_operations_that_arrive_whole_are_counted() -> None:
    layer, x = nn.Linear(64, 10), torch.rand(3, 64)
    assert flops_of(lambda: layer(x)) == flops_of(lambda: torch.matmul(x, torch.rand(64, 10))) == 3 * LINEAR


def test_attention_is_counted_by_its_products() -> None:
    n, tokens, width = 2, 5, 8
    attention = nn.MultiheadAttention(width, 2, batch_first=True).eval()
    x = torch.rand(n, tokens, width)
    projections, products = 4 * 2 * n * tokens * width * width, 2 * 2 * n * tokens * tokens * width
    with torch.no_grad():
        assert flops_of(lambda: attention(x, x, x, need_weights=False)) == projections + products
        layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True).eval()
        assert flops_of(lambda: layer(x)) == projections + products + 2 * 2 * n * tokens * width * 16


def run_of(name: str) -> Run:
    """Small; every image of OAT draws λ = 1."""
    plain = name in ("natural", "awp", "fgsm_regularization", "mat_rand", "mat_max")
    changes: dict[str, Any] = {"name": name} if plain else {"name": name, "attack": {"steps": 2}}
    if name == "eps_warmup":
        changes = {"name": name, "objective": {"attack": {"steps": 2}}}
    elif name == "weak_to_strong":  # of stages that cost the same, as every step does
        changes = {"name": name, "stages": {"0": {"attack": "fgsm"}, "1": {"attack": {"name": "pgd", "steps": 1}}}}
    if not name.startswith("oat"):
        data = {"unlabelled": "in memory"} if name.startswith("rst") else {}
        return small_run(objective=changes, data=data)
    resnet = {"name": "resnet", "depth": 18, "width": 1 / 16}
    slimmable = {"name": "slimmable", "model": resnet, "widths": [0.5, 1.0]}
    inner = {"oat": {"name": "resnet_cifar", "depth": 8, "base": 4}, "oats": slimmable}[name]
    return small_run(objective={**changes, "lambdas": [1.0]}, model={"name": "conditional", "model": inner})


def counted(run: Run, network: nn.Module, n: int, step: int = 0) -> int:
    """Of a real step on n images."""
    train_step = TrainStep(run, network, LocalBackend())
    batch = Batch.of(torch.rand(n, 1, 8, 8), torch.arange(n) % 10, torch.arange(n))
    batch = batch._replace(labelled=batch.index % 2 == 0)
    return flops_of(lambda: train_step(Share(batch, (n,), n), Progress(0, 0, step, 100), 0.1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "oats" else ()) for name in components(Objective)]
)
def test_every_objective_costs_what_a_real_step_costs(name: str) -> None:
    run = run_of(name)
    network = build(run.model, SPEC)
    # A triplet's distances are of all pairs, which are few against the network's products.
    tolerance = 1e-3 if name == "triplet" else 0
    assert step_flops(run, network, SPEC) == pytest.approx(counted(run, network, 12) / 12, rel=tolerance, abs=0)


@pytest.mark.parametrize("name", ["awp", "rst"])
def test_nothing_is_left_behind(name: str) -> None:
    run = replace(run_of(name), label_smoothing=0.1)
    network = build(run.model, SPEC).eval()
    network.body.requires_grad_()
    next(network.parameters()).grad = torch.ones_like(next(network.parameters()))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, look = step_flops(run, network, SPEC), look_flops(run, network, SPEC)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert [p.grad is None for p in network.parameters()].count(False) == 1
    assert not any(m.training for m in network.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert (first, look) == (step_flops(run, network, SPEC), look_flops(run, network, SPEC))


def test_precision_and_reduction_do_not_change_the_count() -> None:
    run = run_of("pgd_at")
    network = build(run.model, SPEC)
    usual = step_flops(run, network, SPEC)
    assert step_flops(replace(run, precision="bf16", clip=1.0), network, SPEC) == usual
    assert step_flops(replace(run, reduction="deterministic"), network, SPEC) == usual
    assert step_flops(run, network.double(), SPEC) == usual


def test_oat_costs_its_attack_where_lambda_is_above_zero() -> None:
    run = run_of("oat")
    network = build(run.model, SPEC)

    def at(*lambdas: float) -> float:
        return step_flops(replace(run, objective=Oat(attack(2), lambdas)), network, SPEC)

    none, every = at(0.0), at(0.2, 1.0)
    # Clean one forward, and attacked four more, of which two end at the input; the first layer's own is left out there.
    assert every == pytest.approx((2 * 2 + 3 + 3) / 3 * none, rel=0.02)
    assert at(0.0, 0.1, 0.2, 0.3, 0.4, 1.0) == pytest.approx(none / 6 + every * 5 / 6)
    # The real draws of a batch, weighted so, make its real cost.
    oat = replace(run, objective=Oat(attack(2)))
    drawn = Noise.of(0, torch.arange(24), "lambda", 5).below(6) > 0
    expected = int(drawn.sum()) * every + int((~drawn).sum()) * none
    assert 0 < drawn.sum() < 24
    assert counted(oat, network, 24, step=5) == expected


def test_draws_are_weighted_by_their_probability() -> None:
    mixed = PgdAt(attack(3), beta=0.25, natural_batches=True)
    assert of(mixed, linear()) == pytest.approx((0.25 * 2 + 0.75 * 8) * LINEAR)
    random = PgdAt(RandomOf((attack(1), attack(5)), weights=(3.0, 1.0)))
    assert of(random, linear()) == pytest.approx((0.75 * 4 + 0.25 * 12) * LINEAR)
    assert of(Awp(PgdAt(attack(1)), start=0.4), linear()) == pytest.approx((0.4 * 4 + 0.6 * 6) * LINEAR)
    staged = WeakToStrong((PgdAt(FGSM()), PgdAt(attack(3))), (0.75,))
    assert of(EpsWarmup(staged), linear()) == pytest.approx((0.75 * 4 + 0.25 * 8) * LINEAR)
    nested = Awp(random, start=0.4)
    assert len(outcomes(nested)) == 4
    assert sum(p for p, _ in outcomes(nested)) == pytest.approx(1)
    assert of(nested, linear()) == pytest.approx((0.75 * 4 + 0.25 * 12 + 0.6 * 2) * LINEAR)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_share_of_the_batch_costs_its_share(share: float) -> None:
    run = small_run(objective={"name": "fgsm_pgd", "share": share, "attack": {"steps": 4}})
    assert isinstance(run.objective, Mixed)
    assert step_flops(run, linear(), SPEC) == pytest.approx((share * 2 + (1 - share) * 8 + 2) * LINEAR)


def test_what_an_example_draws_costs_its_share() -> None:
    random = RandomOf((FGSM(), attack(5)), per="sample", weights=(1.0, 3.0))
    assert of(PgdAt(random), linear()) == (0.25 * 2 + 0.75 * 10 + 2) * LINEAR
    assert of(PgdAt(Mixture((FGSM(), attack(5)))), linear()) == (0.5 * 2 + 0.5 * 10 + 2) * LINEAR
    assert of(PgdAt(WorstOf((random, attack(1)))), linear()) == (0.25 * 2 + 0.75 * 10 + 2 + 2 + 2) * LINEAR


def test_an_attack_that_ends_early_is_counted_on_synthetic_images() -> None:
    def look(early_abort: bool) -> float:
        monitor = CarliniWagner(steps=40, search_steps=2, lr=0.5, early_abort=early_abort)
        evaluation = Evaluation(attack=monitor, goal=Goal(loss="margin"), monitor=monitor)
        return look_flops(replace(small_run(), evaluation=evaluation), linear(), SPEC)

    most = (2 + 2 * 2 * 40) * LINEAR
    assert look(early_abort=False) == most > look(early_abort=True) > most / 4


def test_what_is_paid_once_a_batch_is_left_out() -> None:
    run = replace(run_of("natural"), model=SpectralNorm(Basic(4, 8)))
    network, plain = build(run.model, SPEC), build(Basic(4, 8), SPEC)
    assert step_flops(run, network, SPEC) == step_flops(replace(run, model=Basic(4, 8)), plain, SPEC)


def test_look_in_closed_form() -> None:
    """Clean, APGD's steps + 1 forwards and steps input gradients, and the attacked images once more."""
    run = small_run(evaluation={"monitor": {"name": "apgd", "steps": 10, "threat": {"eps": 0.1}}})
    assert look_flops(run, linear(), SPEC) == (1 + 2 * 10 + 1 + 1) * LINEAR
    assert look_flops(run, linear().double(), SPEC) == (1 + 2 * 10 + 1 + 1) * LINEAR
    pgd = small_run(evaluation={"monitor": {"name": "pgd", "steps": 4}})
    assert look_flops(pgd, linear(), SPEC) == (1 + 2 * 4 + 1) * LINEAR


def test_look_asks_a_randomised_network_several_times() -> None:
    run = replace(small_run(evaluation={"monitor": {"steps": 2}, "draws": 3}), model=NoiseNet(Basic(4, 8)))
    run = replace(run, objective=Rat(attack(1)))
    network = build(run.model, SPEC)
    forward = flops_of(lambda: network.eval()(torch.rand(6, 1, 8, 8))) / 6
    assert look_flops(run, network, SPEC) == (3 + 2 * 2 + 3) * forward


@pytest.mark.gpu
def test_count_on_a_gpu_is_that_on_a_cpu() -> None:
    run = run_of("trades")
    network = build(run.model, SPEC)
    before = step_flops(run, network, SPEC), look_flops(run, network, SPEC)
    state = torch.cuda.get_rng_state()
    network = network.cuda()
    assert (step_flops(run, network, SPEC), look_flops(run, network, SPEC)) == before
    assert torch.equal(torch.cuda.get_rng_state(), state)
