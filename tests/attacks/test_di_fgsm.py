"""DI²-FGSM and M-DI²-FGSM: the transform, its draws, and what they share with MI-FGSM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustscale.attacks.di_fgsm import DIFGSM, Diverse, placed
from robustscale.attacks.m_di_fgsm import MDIFGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.testing.contracts import TinyNet, random_batch
from robustscale.threat import Linf


def attack_noise(n: int, seed: int = 0) -> Noise:
    return Noise.of(seed, torch.arange(n), "attack")


def resized_and_padded(x: Tensor, rows: int, columns: int, top: int, left: int) -> Tensor:
    """By the operations that public code uses, for one image (C, H, W)."""
    height, width = x.shape[-2:]
    small = F.interpolate(x[None], size=[rows, columns], mode="bilinear", align_corners=False)[0]
    return F.pad(small, [left, width - columns - left, top, height - rows - top])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14)])
def test_placed_is_interpolation_and_zero_padding(shape: tuple[int, int, int]) -> None:
    x = torch.rand(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = [(shape[1], shape[2], 0, 0), (7, 9, 2, 5), (5, 11, 0, 3), (1, 2, 4, 1)]
    found = placed(x, *(torch.tensor(part) for part in zip(*places, strict=True)))
    for image, place, expected in zip(found, places, x, strict=True):
        torch.testing.assert_close(image, resized_and_padded(expected, *place), rtol=0, atol=1e-13)


def transforms(n: int, side: int, p: float, rate: float) -> Tensor:
    """(n, 1, side, side): T of an image of ones, as the score sees it."""
    seen = []

    def score(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    Diverse(score, attack_noise(n), p, rate)(torch.ones(n, 1, side, side))
    return seen[0]


def test_sizes_and_places_are_drawn_uniformly() -> None:
    n, side = 12000, 10
    seen = transforms(n, side, p=1.0, rate=0.8)[:, 0] > 0.5
    rows, columns = seen.any(2), seen.any(1)
    size = rows.sum(1)
    assert torch.equal(size, columns.sum(1)) and size.unique().tolist() == [8, 9]
    assert (size == 8).double().mean().item() == pytest.approx(0.5, abs=0.02)
    top, left = rows[size == 8].int().argmax(1), columns[size == 8].int().argmax(1)
    counts = torch.bincount(3 * top + left, minlength=9) / len(top)
    torch.testing.assert_close(counts, torch.full((9,), 1 / 9), rtol=0, atol=0.02)


def test_p_is_the_share_of_images_that_are_transformed() -> None:
    untouched = (transforms(8000, 10, p=0.3, rate=0.8) == 1).flatten(1).all(1)
    assert untouched.double().mean().item() == pytest.approx(0.7, abs=0.02)


def test_an_image_that_is_not_square_keeps_its_shape() -> None:
    seen: list[Tensor] = []

    def score(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    Diverse(score, attack_noise(500), 1.0, 0.5)(torch.ones(500, 1, 10, 20))
    rows, columns = (seen[0][:, 0] > 0.5).any(2).sum(1), (seen[0][:, 0] > 0.5).any(1).sum(1)
    assert torch.equal(2 * rows, columns) and rows.unique().tolist() == [5, 6, 7, 8, 9]


def test_every_call_draws_anew_and_every_run_the_same() -> None:
    x = random_batch(4).x

    def run() -> tuple[Tensor, Tensor]:
        diverse = Diverse(lambda x: x.flatten(1).pow(2).sum(1), attack_noise(4), 1.0, 0.6)
        return diverse(x), diverse(x)

    (first, second), again = run(), run()
    assert not torch.equal(first, second)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_the_papers_recursion(mu: float, seed: int) -> None:
    """In float64: equations 5, 6 and 8 with the transforms that were drawn, by public code's operations."""
    model, batch = TinyNet(seed).double().eval(), random_batch(3, seed, torch.float64)
    noise, steps, eps = attack_noise(3, seed), 3, 0.1
    attack = MDIFGSM(Linf(eps), steps=steps, mu=mu, p=0.7, resize_rate=0.5)
    found = attack(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=noise)
    x_adv, g = batch.x, torch.zeros_like(batch.x)
    for k in range(steps):
        draw = noise.fold("diversity", k)
        rows = 4 + draw.fold("size").below(4)
        top, left = (((8 - rows + 1) * draw.fold(side).uniform()).floor().int() for side in ("top", "left"))
        leaf = x_adv.clone().requires_grad_()
        images = [
            resized_and_padded(leaf[i], int(rows[i]), int(rows[i]), int(top[i]), int(left[i]))
            if draw.fold("coin").uniform()[i] < 0.7
            else leaf[i]
            for i in range(3)
        ]
        (grad,) = torch.autograd.grad(cross_entropy(model(torch.stack(images)), batch.y).sum(), leaf)
        g = mu * g + grad / grad.abs().sum((1, 2, 3), keepdim=True)
        x_adv = (x_adv + eps / steps * g.sign()).clamp(batch.x - eps, batch.x + eps).clamp(0, 1)
    torch.testing.assert_close(found, x_adv, rtol=0, atol=1e-12)


def test_without_a_transform_they_are_iterated_and_momentum_fgsm() -> None:
    batch, model = random_batch(4), TinyNet().eval()

    def run(attack: DIFGSM | MDIFGSM | MIFGSM) -> Tensor:
        return attack(lambda x: cross_entropy(model(x), batch.y), batch.x, noise=attack_noise(4))

    assert torch.equal(run(DIFGSM(p=0.0)), run(MIFGSM(mu=0.0)))
    assert torch.equal(run(MDIFGSM(p=0.0)), run(MIFGSM()))
    assert torch.equal(run(MDIFGSM(mu=0.0)), run(DIFGSM()))
    assert not torch.equal(run(MDIFGSM()), run(DIFGSM()))


@pytest.mark.parametrize("cls", [DIFGSM, MDIFGSM])
@pytest.mark.parametrize(
    "field", [{"steps": 0}, {"step_size": -1.0}, {"p": 1.1}, {"resize_rate": 1.0}, {"resize_rate": 0.0}], ids=str
)
def test_senseless_fields_are_refused(cls: type, field: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(field))):
        cls(**field)


def test_momentum_is_checked_too() -> None:
    with pytest.raises(InputError, match="mu: -1"):
        MDIFGSM(mu=-1)
