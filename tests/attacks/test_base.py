"""What attacks share: input gradients, the model's modes while it is attacked, and goals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, Goal, attacking, input_gradient
from robustscale.attacks.base import score_of as examples
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Evaluation, Run, require_fit
from robustscale.testing.contracts import CLASSES, TinyNet, random_batch
from robustscale.types import DataSpec, Progress


def noise_of(n: int, seed: int = 0) -> Noise:
    return Noise.of(seed, torch.arange(n), "attack")


def test_input_gradient_is_each_examples_own() -> None:
    x = random_batch(4, dtype=torch.float64).x
    grad, values = input_gradient(lambda x: x.flatten(1).pow(3).sum(1), x)
    torch.testing.assert_close(grad, 3 * x**2)
    torch.testing.assert_close(values, x.flatten(1).pow(3).sum(1))
    assert not x.requires_grad and not values.requires_grad


def test_input_gradient_works_where_gradients_are_switched_off() -> None:
    x = random_batch(2).x
    with torch.no_grad():
        grad, _ = input_gradient(lambda x: x.flatten(1).sum(1), x)
    assert torch.equal(grad, torch.ones_like(x))


class Dropping(nn.Module):
    """BatchNorm, dropout and a frozen part: all that a mode touches."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.dropout = TinyNet(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.dropout(x))  # type: ignore[no-any-return]


def statistics(model: nn.Module) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
def test_attacking_restores_every_mode(mode: BatchNormMode) -> None:
    model = Dropping().train()
    model.net.bn1.eval()
    before = [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]
    with attacking(model, mode) as f:
        f(random_batch(4).x)
    assert [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()] == before


def test_attacking_restores_modes_after_an_error() -> None:
    model = Dropping().train()
    with pytest.raises(ZeroDivisionError), attacking(model, "batch"):
        raise ZeroDivisionError
    assert all(m.training for m in model.modules())
    assert model.net.bn1.track_running_stats


@pytest.mark.parametrize("mode, changes", [("eval", False), ("batch", False), ("train", True)])
def test_running_statistics_change_only_in_train(mode: BatchNormMode, changes: bool) -> None:
    model = TinyNet().train()
    before = statistics(model)
    with attacking(model, mode) as f:
        f(random_batch(4).x)
    assert changes != all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))


def test_eval_normalises_by_running_statistics_and_batch_by_the_batchs() -> None:
    x = random_batch(4).x
    model = TinyNet().train()
    with torch.no_grad():
        with attacking(model, "eval") as f:
            by_running = f(x)
        with attacking(model, "batch") as f:
            by_batch = f(x)
        assert torch.equal(by_running, TinyNet().eval()(x))
        assert torch.equal(by_batch, TinyNet().train()(x))
    assert not torch.allclose(by_running, by_batch)


def test_the_wrappers_inside_is_attacked() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = TinyNet()
    with attacking(Wrapper(model)) as f:
        assert f is model


def test_casts_cached_without_a_graph_are_forgotten() -> None:
    """Else, under autocast, the loss after an attack would give the weights no gradient."""
    model = nn.Linear(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with attacking(model) as f, torch.no_grad():
            f(torch.ones(1, 4))
        model(torch.ones(1, 4)).sum().backward()
    assert model.weight.grad is not None


# Goals


def logits_of(f: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return f(x)  # type: ignore[no-any-return]


def score_of(goal: Goal, n: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The goal's score on other images than the clean ones, log-probabilities there, and clean logits."""
    model, batch = TinyNet().eval(), random_batch(n)
    x_adv = random_batch(n, seed=1).x
    score = goal.score(model, batch.x, batch.y, noise_of(n, seed))
    with torch.no_grad():
        return score(x_adv), model(x_adv).log_softmax(1), logits_of(model, batch.x)


def test_true_label() -> None:
    score, log_p, _ = score_of(Goal())
    torch.testing.assert_close(score, -log_p.gather(1, random_batch(64).y[:, None])[:, 0])


def test_predicted_label_is_the_clean_images() -> None:
    score, log_p, clean = score_of(Goal("predicted"))
    torch.testing.assert_close(score, -log_p.gather(1, clean.argmax(1)[:, None])[:, 0])


def test_least_likely_target_is_the_clean_images() -> None:
    score, log_p, clean = score_of(Goal(target="least_likely"))
    torch.testing.assert_close(score, log_p.gather(1, clean.argmin(1)[:, None])[:, 0])


def test_numbered_target() -> None:
    score, log_p, _ = score_of(Goal(target=3))
    torch.testing.assert_close(score, log_p[:, 3])


@pytest.mark.parametrize("label", ["true", "predicted"])
def test_random_target_is_any_class_but_the_label(label: str) -> None:
    n = 2000
    goal = Goal(label, target="random")  # type: ignore[arg-type]
    score, log_p, clean = score_of(goal, n)
    target = (log_p - score[:, None]).abs().argmin(1)
    own = random_batch(n).y if label == "true" else clean.argmax(1)
    assert (target != own).all()
    shift = torch.bincount((target - own) % CLASSES, minlength=CLASSES)
    assert shift[0] == 0 and (shift[1:] > n / (CLASSES - 1) / 2).all()
    assert not torch.equal(score, score_of(goal, n, seed=1)[0])


@pytest.mark.parametrize(
    "goal, forwards", [(Goal(), 0), (Goal(target=1), 0), (Goal("predicted"), 1), (Goal(target="random"), 1)], ids=str
)
def test_a_goal_looks_at_the_clean_image_only_if_it_must(goal: Goal, forwards: int) -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x)
        return x.flatten(1)[:, :CLASSES]

    batch = random_batch(2)
    goal.score(f, batch.x, batch.y, noise_of(2))
    assert len(calls) == forwards


def test_kl_is_from_the_clean_prediction_to_the_attacked() -> None:
    """KL-PGD's score, in float64 and for some of the rows."""
    model, batch, x_adv = TinyNet().double().eval(), random_batch(5, dtype=torch.float64), random_batch(5, 1).x.double()
    score = Goal(loss="kl").score(model, batch.x, batch.y, noise_of(5))
    with torch.no_grad():
        p, q = model(batch.x).softmax(1), model(x_adv).softmax(1)
        expected = torch.stack([(p[i] * (p[i] / q[i]).log()).sum() for i in range(5)])
        torch.testing.assert_close(score(x_adv), expected, rtol=1e-10, atol=1e-14)
        rows = torch.tensor([3, 1])
        part = examples(score, batch.x, rows)(x_adv[rows])
        torch.testing.assert_close(part, expected[rows], rtol=1e-10, atol=1e-14)


def test_kl_pgd_finds_what_trades_does() -> None:
    batch, attack = random_batch(6), PGD(start="gaussian")
    at = Progress(seed=0, epoch=0, step=3, total_steps=10)
    found = [
        objective.perturb(TinyNet().train(), batch, at)
        for objective in (Trades(attack=attack), PgdAt(attack=attack, goal=Goal(loss="kl")))
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("goal", [{"target": 3}, {"target": "random"}, {"label": "predicted"}], ids=str)
def test_kl_takes_no_label(goal: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^loss: kl is the distance from the clean prediction"):
        Goal(loss="kl", **goal)


def test_kl_needs_a_random_start() -> None:
    with pytest.raises(InputError, match=r"^objective\.attack: starts from the image, where the kl is 0"):
        Run(objective=PgdAt(goal=Goal(loss="kl"), attack=PGD(start="none")))
    Run(objective=PgdAt(goal=Goal(loss="kl"), attack=PGD(start="gaussian")))


@pytest.mark.parametrize("target", [-1, -100])
def test_a_negative_class_is_refused(target: int) -> None:
    """-100 is cross_entropy's mark for examples to leave out: an attack that does nothing."""
    with pytest.raises(InputError, match="target"):
        Goal(target=target)


@pytest.mark.parametrize("target, least", [("none", 3), ("random", 4), (0, 4)])
def test_dlr_needs_the_logits_that_it_divides_by(target: Any, least: int) -> None:
    """Known once the data is: the third logit, and the fourth of the targeted one."""
    goal = Goal(loss="dlr", target=target)
    runs = {"objective": Run(objective=PgdAt(goal=goal)), "evaluation": Run(evaluation=Evaluation(goal=goal))}
    for path, run in runs.items():
        require_fit(run, DataSpec(1, 8, 8, least, (0.5,), (0.25,)))
        with pytest.raises(InputError, match=rf"^{path}\.goal\.loss: dlr divides .* has {least - 1} classes"):
            require_fit(run, DataSpec(1, 8, 8, least - 1, (0.5,), (0.25,)))


def test_fp16_autocast_leaves_fewer_confident_examples_unattacked() -> None:
    """Their gradients lie below fp16's smallest number; a plain backward loses them, and sign(0) is no step."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 8, 8, generator=generator)
    weight = 100 / 8 * torch.randn(10, 64, generator=generator)

    def logits(v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(v.flatten(1), weight)

    y = logits(x).argmax(1)
    with torch.autocast("cpu", torch.float16):
        grad, _ = input_gradient(lambda v: cross_entropy(logits(v), y), x)
        plain = x.clone().requires_grad_()
        (lost,) = torch.autograd.grad(cross_entropy(logits(plain), y).sum(), plain)

    def num_dead(g: torch.Tensor) -> int:
        return int((g == 0).flatten(1).all(1).sum())

    assert num_dead(grad) <= num_dead(lost) - 5
