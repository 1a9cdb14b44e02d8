"""Gaussian noise at inference: what is averaged, what is drawn, and who is fooled by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import Goal
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.evaluation.noise_defence import Defence, Noisy
from robustscale.evaluation.suite import default_suite, reported
from robustscale.noise import Noise, drawing, randomised
from robustscale.run import Evaluation, Run
from robustscale.testing.contracts import TinyNet, random_batch
from robustscale.testing.linear import Linear
from robustscale.threat import Linf
from robustscale.types import DataSpec

SHAPE = (1, 8, 8)


def streams(index: Tensor) -> Noise:
    return Noise.of(0, index, "test")


def test_probabilities_are_averaged_over_draws() -> None:
    """log(1/n Σ softmax f(x + σ z)), in float64, with the same draws."""
    batch, model = random_batch(6, dtype=torch.float64), TinyNet().double().eval()
    noise = streams(batch.index)
    with drawing(noise), torch.no_grad():
        found = Noisy(model, 0.3, 3)(batch.x)
        draws = [noise.fold("draw", k).normal(*SHAPE).double() for k in (1, 2, 3)]
        mean = torch.stack([model(batch.x + 0.3 * z).softmax(1) for z in draws]).mean(0)
    torch.testing.assert_close(found, mean.log(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6, dtype=torch.float64))


def test_draws_are_fresh_reproducible_and_of_each_example() -> None:
    batch, network = random_batch(5), Noisy(TinyNet().eval(), 0.2)
    assert randomised(network) and not randomised(network.network)
    with drawing(streams(batch.index)), torch.no_grad():
        first, second = network(batch.x), network(batch.x)
    assert not torch.equal(first, second)
    with drawing(streams(batch.index)), torch.no_grad():
        assert torch.equal(network(batch.x), first)
    part = batch.rows(slice(2, 4))
    with drawing(streams(part.index)), torch.no_grad():
        torch.testing.assert_close(network(part.x), first[2:4])


def test_noise_is_not_clipped() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return x.flatten(1)

    x = torch.zeros(200, *SHAPE)
    with drawing(streams(torch.arange(200))):
        Noisy(Spy(), 0.1)(x)
    assert float(seen[0].min()) < -0.1
    assert float(seen[0].std()) == pytest.approx(0.1, rel=0.02)


def test_eot_finds_what_a_single_draw_hides() -> None:
    """A small slope under a large one that changes sign within the noise: one draw's gradient points anywhere, the mean
    of many does not. What the first leaves standing is no robustness."""

    class Ridges(nn.Module):
        """A linear network behind a wave that has a slope of its own at every point, and none on average."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear.random(2, SHAPE)

        def forward(self, x: Tensor) -> Tensor:
            wave = (x * 40).sin().flatten(1).sum(1) / 40
            return self.linear(x) + torch.stack([wave, -wave], 1)

    batch = random_batch(64)
    batch = batch._replace(y=Linear.random(2, SHAPE)(batch.x).argmax(1))
    network = Noisy(Ridges(), 0.2).requires_grad_(False)
    # One step: PGD averages a little over its own steps, which see different draws.
    fgsm = FGSM(Linf(0.1))
    loss = {}
    for name, attack in (("blind", fgsm), ("eot", EOT(fgsm, 40))):
        with drawing(streams(batch.index)):
            x_adv = attack(
                Goal().score(network, batch.x, batch.y, streams(batch.index)), batch.x, noise=streams(batch.index)
            )
        with drawing(streams(batch.index).fold("judge")), torch.no_grad():
            other = torch.stack([network(x_adv) for _ in range(50)]).exp().mean(0)
        loss[name] = float(-other.gather(1, batch.y[:, None]).log().mean())
    assert loss["eot"] > loss["blind"] + 0.02


def test_suite_attacks_it_averaged_and_blind() -> None:
    run = Run(evaluation=Evaluation(attack=PGD(Linf(0.1), steps=3), eot=7))
    spec = DataSpec(1, 8, 8, 10, (0.5,), (0.2,))
    suite = default_suite(run, spec, kinds=("fgsm",), randomised=True, blind=True)
    blind = reported(run)[0]
    assert suite.attacks[blind].attack == run.evaluation.attack
    assert suite.attacks[suite.reported].attack == EOT(PGD(Linf(0.1), steps=3), 7) and suite.reported != blind
    assert blind not in default_suite(run, spec, kinds=("fgsm",), randomised=True).attacks
    assert any("noise without EOT: " + blind in note for note in Defence(0.1).notes(blind))


def test_results_are_kept_beside_the_plain_ones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    places = [Defence(), Defence(0.1), Defence(0.1, 8), Defence(0.25)]
    names = [defence.results(folder).name for defence in places]
    assert names == ["evaluation", "evaluation-noise-0.1", "evaluation-noise-0.1-draws-8", "evaluation-noise-0.25"]
    assert Defence().protect(model := TinyNet()) is model and Defence().notes("pgd") == []


@pytest.mark.parametrize("sigma", [0.0, -0.1, float("nan"), float("inf")])
def test_refuses_noise_that_is_none(sigma: float) -> None:
    with pytest.raises(InputError, match="is no standard deviation above 0"):
        Noisy(TinyNet(), sigma)


def test_refuses_no_draws() -> None:
    with pytest.raises(InputError, match="noise_draws: 0 is below 1"):
        Noisy(TinyNet(), 0.1, 0)
    with pytest.raises(InputError, match="without noise"):
        Defence(None, 4).require()
