"""Which attack made an image: clues, detector, and the whole of it on digits."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import decode
from robustscale.errors import InputError
from robustscale.evaluation.clues import clues_of, eight_bits, level_frequencies, median
from robustscale.evaluation.detector import Detector, load_detector, save_detector
from robustscale.evaluation.forensics import (
    Case,
    clue_names,
    gather_case,
    identify,
    investigate,
    named_suspects,
    network_digest,
    notes_on,
    radii,
    report_of,
    require_reference,
    train_detector,
    usual_suspects,
)
from robustscale.evaluation.noise_defence import Noisy
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.noise import Noise
from robustscale.objectives.natural import Natural
from robustscale.reports.confusion import draw_confusion, forensics_table
from robustscale.run import Evaluation, Run
from robustscale.testing.contracts import TinyNet, random_batch
from robustscale.threat import L2, Linf
from robustscale.types import Attack, Batch, DataSpec, Share
from tests.engine.small import SPEC, MemoryLoader, small_run

EPS = 0.15


class Part:
    """Some digits, in batches of 32, in order."""

    def __init__(self, first: int, n: int) -> None:
        whole = MemoryLoader(small_run(), 0, 1, 400)
        index = torch.arange(first, first + n)
        self.batch = Batch.of(whole.x[index], whole.y[index], index)
        self.num_examples, self.num_batches = n, -(-n // 32)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for rows in torch.arange(self.num_examples).split(32):
            yield Share(self.batch.rows(rows), (len(rows),), len(rows))


@functools.cache
def reference() -> nn.Module:
    """A network that knows digits 0..199 well."""
    network, batch = build(Basic(channels=8, hidden=32), SPEC), Part(0, 200).batch
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(batch.x), batch.y).backward()
        optimizer.step()
    return network.eval()


def test_tells_attacks_apart_on_images_that_it_has_not_seen(tmp_path: Path) -> None:
    """Well above chance, reproducibly, from a saved detector as from the one in memory."""
    network, suspects = reference(), named_suspects(["fgsm:linf", "pgd:l2"], EPS, 1.0)
    detector, levels, result = train_detector(
        network, Part(0, 96), Part(200, 64), suspects, EPS, 0, lambda record: None
    )
    assert result["classes"] == ["clean", "fgsm linf", "pgd l2"] and result["chance"] == 1 / 3
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum(1).tolist() == [64, 64, 64]
    assert result["accuracy"] == pytest.approx(float(confusion.diag().sum()) / 192)
    assert result["accuracy"] > 0.75 and result["accuracy_interval"][0] > 1 / 3
    assert result["false_alarms"] == pytest.approx(1 - float(confusion[0, 0]) / 64)
    assert result["fooled"]["fgsm linf"] > result["fooled"]["clean"]
    assert decode(Attack, result["attacks"]["pgd l2"]["attack"]) == PGD(L2(1.0))
    again = train_detector(network, Part(0, 96), Part(200, 64), suspects, EPS, 0, lambda record: None)
    assert again[2] == result and torch.equal(again[0].weight, detector.weight)

    facts = {"classes": result["classes"], "clues": clue_names(), "eps": EPS, "seed": 0}
    save_detector(tmp_path / "detector.safetensors", detector, levels, facts)
    loaded, its_levels, its_facts = load_detector(tmp_path / "detector.safetensors", clue_names())
    x = Part(250, 1).batch.x
    x_adv = FGSM(Linf(EPS))(lambda v: -network(v)[:, int(network(x).argmax())], x, noise=Noise.of(0, torch.zeros(1)))
    said = []
    for name, image in (("clean", x), ("fgsm", x_adv)):
        Image.fromarray((255 * image[0, 0]).round().byte().numpy()).save(tmp_path / f"{name}.png")
        found = identify(tmp_path / f"{name}.png", network, SPEC, loaded, its_levels, its_facts)
        assert sum(found.values()) == pytest.approx(1)
        said.append(max(found, key=lambda k: found[k]))
    assert said == ["clean", "fgsm linf"]

    more = {"eps": EPS, "eps_l2": 1.0, "weights": "last", "notes": []}
    draw_confusion(small_run(), {**result, **more}, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
    with (tmp_path / "table.txt").open("w") as file:
        forensics_table(small_run(), {**result, **more}, file)
    assert "Chance is 33.3 %" in (tmp_path / "table.txt").read_text()


def test_clues_are_finite_and_of_each_image_alone() -> None:
    batch, model = random_batch(6), TinyNet().eval()
    x = torch.cat([eight_bits(batch.x), torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)])
    noise = Noise.of(0, torch.arange(8), "clues")
    together = investigate(model, x, noise, EPS, torch.full((256,), 1 / 256))
    assert together.shape == (8, len(clue_names())) and bool(together.isfinite().all())
    alone = investigate(model, x[2:3], noise.rows(torch.tensor([2])), EPS, torch.full((256,), 1 / 256))
    torch.testing.assert_close(alone, together[2:3], rtol=1e-4, atol=1e-4)


def test_some_clues_by_hand() -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1.0
    assert torch.equal(median(x), torch.zeros_like(x))
    levels = level_frequencies([x])
    assert levels[0] == 24 / 25 and levels[255] == 1 / 25
    clues = clues_of(lambda v: v.flatten(1)[:, :3], x, Noise.of(0, torch.zeros(1)), 0.1, levels)
    assert float(clues["black"]) == pytest.approx(24 / 25) and float(clues["white"]) == pytest.approx(1 / 25)
    assert float(clues["residual largest"]) == 1
    assert sum(float(clues[f"spectrum {k}"]) for k in range(4)) == pytest.approx(1)
    # Equal steps in half of the pixels are flat, a single pixel is not.
    steps = 0.5 + 0.1 * (2 * Noise.of(0, torch.zeros(1), "signs").below(2, 1, 8, 8) - 1)
    even = clues_of(lambda v: v.flatten(1)[:, :3], steps, Noise.of(0, torch.zeros(1)), 0.1, levels)
    assert float(clues["residual flatness"]) == pytest.approx(1 / 25)
    assert float(even["residual flatness"]) > 0.25


def test_detector_is_the_minimum_of_a_convex_function() -> None:
    """Its gradient vanishes, so that there is nothing that a seed could change."""
    noise = Noise.of(0, torch.arange(200), "detector")
    y = noise.below(3)
    clues = noise.fold("clues").normal(4) + y[:, None]
    detector = Detector.fit(clues, y, 3)
    weight, bias = detector.weight.clone().requires_grad_(), detector.bias.clone().requires_grad_()
    copy = Detector(detector.mean, detector.scale, weight, bias)
    loss = -copy.probabilities(clues).gather(1, y[:, None]).log().mean() + 1e-3 * weight.square().sum()
    grads = torch.autograd.grad(loss, (weight, bias))
    assert max(float(g.abs().max()) for g in grads) < 1e-5
    assert float((detector.probabilities(clues).argmax(1) == y).double().mean()) > 0.6


def test_detector_of_a_pure_guess_is_at_chance() -> None:
    """Clues that say nothing give nothing: the reported accuracy is honest."""
    noise = Noise.of(0, torch.arange(300), "chance")
    detector = Detector.fit(noise.normal(5), torch.arange(300) % 3, 3, penalty=1e-2)
    fresh = Noise.of(1, torch.arange(900), "chance").normal(5)
    right = detector.probabilities(fresh).argmax(1) == torch.arange(900) % 3
    assert 0.26 < float(right.double().mean()) < 0.41


def test_radii_are_the_runs_or_derived() -> None:
    spec = DataSpec(1, 8, 8, 10, (0.5,), (0.2,))
    run = Run(evaluation=Evaluation(attack=PGD(Linf(0.1))))
    assert radii(run, spec, None, None) == pytest.approx((0.1, 0.1 * (64 / 12) ** 0.5))
    assert radii(run, spec, 0.2, None) == pytest.approx((0.2, 0.2 * (64 / 12) ** 0.5))
    assert radii(run, spec, 0.2, 0.7) == (0.2, 0.7)
    assert radii(Run(evaluation=Evaluation(attack=PGD(L2(1.0)))), spec, None, None)[1] == 1.0


def test_radii_that_leave_no_trace_are_refused() -> None:
    for linf, l2 in ((0.0, None), (0.1, 0.0)):
        with pytest.raises(InputError, match="leaves no trace"):
            radii(Run(), SPEC, linf, l2)


def test_suspects_by_name() -> None:
    found = named_suspects(["fgsm", "pgd:l2", "carlini_wagner:l2"], 0.1, 0.5)
    assert list(found) == ["fgsm linf", "pgd l2", "carlini_wagner l2"]
    assert found["pgd l2"].attack == PGD(L2(0.5)) and found["carlini_wagner l2"].goal.loss == "margin"
    assert len(usual_suspects(0.1, 0.5)) == 5
    for name in ("pgdd", "pgd:l3", "eot:linf", "eot", "mixture"):
        with pytest.raises(InputError, match="attacks"):
            named_suspects([name], 0.1, 0.5)


def test_a_randomised_reference_is_refused() -> None:
    require_reference(TinyNet())
    with pytest.raises(InputError, match="reference: its network draws noise"):
        require_reference(Noisy(TinyNet(), 0.1))


def test_interval_of_a_perfect_detector_is_not_a_point() -> None:
    """Ten images, all guessed right, prove no more than ten right guesses do."""
    suspects = named_suspects(["fgsm"], EPS, 1.0)
    y = torch.arange(2).repeat(10)
    clues = torch.stack([y.double(), 1 - y.double()], 1)
    perfect = Detector.fit(clues, y, 2)
    result = report_of(perfect, Case(clues, y, torch.zeros(2)), suspects)
    assert result["accuracy"] == 1 and result["accuracy_interval"] == pytest.approx([0.7225, 1], abs=1e-3)


def test_a_robust_reference_is_remarked_on() -> None:
    assert "trained against pgd-10" in notes_on(Run())[0]
    assert notes_on(Run(objective=Natural())) == []


def test_a_detector_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    with pytest.raises(InputError, match="missing; the same command without --image"):
        load_detector(path, ["a"])
    path.write_bytes(b"{}")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        load_detector(path, ["a"])
    detector = Detector.fit(torch.eye(4), torch.arange(4) % 2, 2)
    save_detector(path, detector, torch.zeros(256), {"clues": ["a"]})
    with pytest.raises(InputError, match="reads other clues"):
        load_detector(path, ["b"])
    assert json.dumps(load_detector(path, ["a"])[2])
    assert network_digest(TinyNet(0)) != network_digest(TinyNet(1))


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    facts = {"classes": ["clean"], "eps": 0.1, "seed": 0}
    detector = Detector.fit(torch.eye(2), torch.arange(2), 2)
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no image")
    # More pixels than Pillow takes without suspicion, in a small file.
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name, message in (
        ("wide.png", "8x9 pixels, the reference takes 8x8"),
        ("text.png", "cannot be read"),
        ("bomb.png", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            identify(tmp_path / name, TinyNet(), SPEC, detector, torch.zeros(256), facts)


def test_case_holds_an_image_in_all_its_versions() -> None:
    suspects = named_suspects(["fgsm"], EPS, 1.0)
    case = gather_case(reference(), Part(200, 40), suspects, EPS, torch.zeros(256), 0, lambda record: None)
    assert case.y.tolist() == [0, 1] * 40 and len(case.clues) == 80
    detector = Detector.fit(case.clues, case.y, 2)
    assert report_of(detector, case, suspects)["images"] == 40


def test_eight_bits_are_those_of_a_file() -> None:
    x: Tensor = torch.arange(256) / 255
    assert torch.equal(eight_bits(x), x) and torch.equal(eight_bits(x + 0.4 / 255), x)
