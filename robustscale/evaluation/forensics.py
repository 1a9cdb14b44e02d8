"""Attack forensics: argmax_a p(a | clues of the image), a an attack or `clean`, p a multinomial logistic regression.

A clean-trained network is the reference: attacks are run against it, and a detector learns to tell their images, and
clean ones, apart by the clues they leave (`clues`). It knows the attacks it was trained on and no others.
`python -m robustscale.forensics REFERENCE_RUN`.

Use: to sort images that are suspected already, where the likely attacks and their radii are known.
Breaks: any other attack is taken for one it knows, and an attacker who knows the detector can attack it too.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustscale.attacks.base import Goal, attacking, boundary_attack
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import component_name, components, decode, encode, unknown
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import classify, exact_float32
from robustscale.evaluation.clues import clues_of, eight_bits, level_frequencies
from robustscale.evaluation.detector import Detector
from robustscale.evaluation.result import wilson
from robustscale.evaluation.suite import other_radius
from robustscale.evaluation.words import Attacker, attack_name, norm_of, threat_of, training_attack
from robustscale.fields import require
from robustscale.noise import Noise, randomised
from robustscale.run import Run
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Attack, Batch, DataSpec, Forward, Loader

SCHEMA = 1
CLEAN = "clean"
Report = Callable[[dict[str, Any]], None]
Suspects = Mapping[str, Attacker]
"""By name; the class of an image that none of them made is CLEAN."""


def usual_suspects(eps: float, eps_l2: float) -> Suspects:
    """One of each family: a single step, many, with momentum, in the other norm, and the smallest perturbation."""
    linf, l2 = Linf(eps), L2(eps_l2)
    attackers = [
        Attacker(FGSM(linf)),
        Attacker(PGD(linf, steps=20)),
        Attacker(MIFGSM(linf)),
        Attacker(PGD(l2, steps=20)),
        # Short, since every image is attacked: its trace is that it ends on the boundary, not how small it got.
        Attacker(CarliniWagner(l2, steps=40, search_steps=3, c=1.0), Goal(loss="margin")),
    ]
    return {_short(a): a for a in attackers}


def _short(attacker: Attacker) -> str:
    """`pgd linf`: a picture has no room for more."""
    threat = getattr(attacker.attack, "threat", None)
    name = component_name(attacker.attack) or ""
    return f"{name} {norm_of(threat)}" if isinstance(threat, Threat) else name


def named_suspects(names: Sequence[str], eps: float, eps_l2: float) -> Suspects:
    """`NAME` or `NAME:NORM`, NAME an attack, NORM a threat model (linf by default). Raises InputError."""
    return {_short(a): a for a in (_named(name, eps, eps_l2) for name in names)}


def _named(text: str, eps: float, eps_l2: float) -> Attacker:
    name, _, norm = text.partition(":")
    if name not in components(Attack):
        raise unknown("attacks", name, components(Attack))
    threats = components(Threat)
    if norm and norm not in threats:
        raise unknown("attacks", norm, threats)
    data: dict[str, Any] = {"name": name}
    if any(field.name == "threat" for field in dataclasses.fields(components(Attack)[name])):
        norm = norm or "linf"
        data["threat"] = {"name": norm, "eps": eps_l2 if norm == "l2" else eps}
    else:
        # Those inside would keep radii of their own, whatever was asked for.
        raise InputError(f"attacks: {name} is made of other attacks; name one of those")
    attack = decode(Attack, data)  # type: ignore[type-abstract]
    return Attacker(attack, Goal(loss="margin") if boundary_attack(attack) else Goal())


def radii(run: Run, data: DataSpec, linf: float | None, l2: float | None) -> tuple[float, float]:
    """In linf and l2: as given, else of the run's evaluation attack, the other derived from it as in evaluation."""
    threat = threat_of(run.evaluation.attack)
    own = linf if isinstance(threat, Linf) else l2
    if own is not None:
        threat = dataclasses.replace(threat, eps=own)
    eps, _why = other_radius(threat, data)
    pair = (threat.eps, eps) if isinstance(threat, Linf) else (eps, threat.eps)
    found = (pair[0] if linf is None else linf), (pair[1] if l2 is None else l2)
    require(min(found) > 0, f"eps: {min(found)!r} leaves no trace that could be told; take one above 0, as 8/255")
    return found


@dataclass(frozen=True)
class Case:
    """Images of every class, by their clues; rows of one image follow each other: clean, then each suspect's."""

    clues: Tensor
    """(N · classes, clues) float64."""
    y: Tensor
    """(N · classes,): 0 is clean, k the k-th suspect."""
    fooled: Tensor
    """(classes,): the share that the reference misclassifies, of each class."""


def clue_names() -> list[str]:
    """In the order of a detector's columns; found by looking at a blank image."""
    clues = clues_of(
        lambda x: x.flatten(1)[:, :2], torch.zeros(1, 1, 3, 3), Noise.of(0, torch.zeros(1)), 0.1, torch.zeros(256)
    )
    return list(clues)


def investigate(f: Forward, x: Tensor, noise: Noise, eps: float, levels: Tensor) -> Tensor:
    """(N, clues) float64 on the CPU, of images as they come."""
    clues = clues_of(f, eight_bits(x), noise, eps, levels)
    return torch.stack([clue.double().cpu() for clue in clues.values()], 1)


def gather_case(
    network: nn.Module, loader: Loader, suspects: Suspects, eps: float, levels: Tensor, seed: int, report: Report
) -> Case:
    """Attack every image of a loader (of one process) by every suspect, and look for clues."""
    clues, fooled, done = [], [], 0
    with attacking(network, relax=False) as f:
        for share in loader.epoch(0):
            batch = share.batch
            with exact_float32(batch.x.device):
                images = [batch.x, *_attacked(f, batch, suspects, seed)]
                # Keyed by what is looked at, not only by the image: a file that comes in later has no id.
                noise = Noise.of(seed, batch.index, "forensics")
                looked = [investigate(f, x, noise.fold("class", k), eps, levels) for k, x in enumerate(images)]
                wrong = [classify(f, eight_bits(x)) != batch.y for x in images]
            clues.append(torch.stack(looked, 1).flatten(0, 1))
            fooled.append(torch.stack(wrong, 1).cpu())
            done += len(batch.y)
            report({"event": "attacking", "done": done, "total": loader.num_examples})
    together = torch.cat(fooled).double()
    return Case(torch.cat(clues), torch.arange(len(suspects) + 1).repeat(len(together)), together.mean(0))


def _attacked(f: Forward, batch: Batch, suspects: Suspects, seed: int) -> list[Tensor]:
    images = []
    for name, attacker in suspects.items():
        noise = Noise.of(seed, batch.index, "forensics", name)
        score = attacker.goal.score(f, batch.x, batch.y, noise)
        images.append(attacker.attack(score, batch.x, noise=noise).detach())
    return images


def report_of(detector: Detector, case: Case, suspects: Suspects) -> dict[str, Any]:
    """forensics.json: the confusion matrix on images that the detector was not trained on, and figures of it.

    The accuracy's interval treats each image with all its versions as one observation: they resemble each other. It is
    Wilson's, of as many independent guesses as would vary by as much.
    """
    names = [CLEAN, *suspects]
    k = len(names)
    guess = detector.probabilities(case.clues).argmax(1)
    confusion = torch.bincount(case.y * k + guess, minlength=k * k).view(k, k)
    per_image = (guess == case.y).double().view(-1, k).mean(1)
    accuracy, n = float(per_image.mean()), len(per_image)
    variance = float(per_image.var(correction=0))
    # Where all images are alike their variance tells nothing, and each counts as one guess.
    alone = min(n * k, round(n * accuracy * (1 - accuracy) / variance)) if variance else n
    alarms = (guess != 0).view(-1, k).double().mean(0)
    return {
        "schema": SCHEMA,
        "classes": names,
        "confusion": confusion.tolist(),
        "images": n,
        "accuracy": accuracy,
        "accuracy_interval": list(wilson(accuracy * alone, alone)),
        "chance": 1 / k,
        "false_alarms": float(alarms[0]),
        "detected": dict(zip(suspects, alarms[1:].tolist(), strict=True)),
        "fooled": dict(zip(names, case.fooled.tolist(), strict=True)),
        "attacks": {
            name: {"attack": encode(attacker.attack), "goal": encode(attacker.goal)}
            for name, attacker in suspects.items()
        },
    }


def train_detector(
    network: nn.Module, train: Loader, test: Loader, suspects: Suspects, eps: float, seed: int, report: Report
) -> tuple[Detector, Tensor, dict[str, Any]]:
    """Learn from attacks on the images of `train`, report on those of `test`: detector, levels, report_of."""
    levels = level_frequencies([share.batch.x for share in train.epoch(0)])
    learnt = gather_case(network, train, suspects, eps, levels, seed, report)
    detector = Detector.fit(learnt.clues, learnt.y, len(suspects) + 1)
    judged = gather_case(network, test, suspects, eps, levels, seed, report)
    return detector, levels, {**report_of(detector, judged, suspects), "trained_on": train.num_examples}


def require_reference(network: nn.Module) -> None:
    """Raise InputError for a network that draws noise of its own: its responses to one image would differ each time."""
    require(
        not randomised(network),
        "reference: its network draws noise of its own, so that a clue would be another one each time; take a run of a "
        "network without such layers",
    )


def notes_on(run: Run) -> list[str]:
    """What weakens the figures."""
    attack = training_attack(run.objective)
    if attack is None:
        return []
    return [
        f"the reference was trained against {attack_name(attack)}; a clean-trained one responds more to attacks "
        "(--objective natural)"
    ]


def identify(
    path: Path, network: nn.Module, spec: DataSpec, detector: Detector, levels: Tensor, facts: Mapping[str, Any]
) -> dict[str, float]:
    """The probability of each class for an image file. Raises InputError where it does not fit the reference."""
    x = read_image(path, spec)
    noise = Noise.of(facts["seed"], torch.zeros(1, dtype=torch.int64), "forensics")
    with attacking(network, relax=False) as f, exact_float32(x.device):
        clues = investigate(f, x, noise, facts["eps"], levels)
    return dict(zip(facts["classes"], detector.probabilities(clues)[0].tolist(), strict=True))


def read_image(path: Path, spec: DataSpec) -> Tensor:
    """(1, C, H, W) in [0, 1]. Raises InputError for other sizes: to rescale would wipe the traces out."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L" if spec.channels == 1 else "RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error}); give a PNG") from None
    if pixels.shape[:2] != (spec.height, spec.width):
        raise InputError(
            f"{path}: {pixels.shape[0]}x{pixels.shape[1]} pixels, the reference takes {spec.height}x{spec.width}; "
            "give the image as the network was given it"
        )
    x = torch.from_numpy(pixels.copy()).view(spec.height, spec.width, spec.channels)
    return x.permute(2, 0, 1)[None].float() / 255


def network_digest(network: nn.Module) -> str:
    """Of the weights: a detector serves the reference whose responses it has learnt, and no other."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
