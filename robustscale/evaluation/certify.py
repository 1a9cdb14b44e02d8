"""Certify test images of a run: on all its workers, resumable, and each image once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustscale.attacks.base import attacking
from robustscale.config import component_name, encode
from robustscale.engine.folder import RunFolder, publish, unwritable
from robustscale.engine.versions import versions
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import exact_float32
from robustscale.evaluation.certificates import (
    Certification,
    Certified,
    certification_folder,
    certification_result,
    chosen,
    write_certificates,
)
from robustscale.evaluation.smoothing import Certificate, Smoothed
from robustscale.fields import require
from robustscale.models.network import build
from robustscale.reports.progress import duration
from robustscale.run import Run
from robustscale.types import Backend, Batch, Loader
from robustscale.untrusted import read_lines

Emit = Callable[[dict[str, Any]], None]


def require_certifiable(network: nn.Module) -> None:
    """Raise InputError for a network that draws noise of its own, whose draws may be shared by a whole batch: the bound
    on the probability needs independent ones."""
    layers = sorted({type(m).__name__ for m in network.modules() if getattr(m, "randomised", False)})
    require(
        not layers,
        f"run: its network draws noise of its own ({', '.join(layers)}); a certificate needs draws that are "
        "independent of each other, so certify a network without such layers",
    )


def trained_noise(run: Run, sigma: float) -> str | None:
    """What a person should know if the run was not trained with this noise."""
    found = set(_sigmas(encode(run.objective)))
    if sigma in found:
        return None
    if found:
        return (
            f"trained with sigma {', '.join(f'{s:g}' for s in sorted(found))}, certified with {sigma:g}; as a rule "
            "the radii are largest where both are equal"
        )
    return (
        f"the objective {component_name(run.objective)} trains without noise; a network that has never seen noise "
        "takes noisy images for noise, and few certificates come of it: train with --objective rat "
        f"--objective.sigma {sigma:g}"
    )


def _sigmas(data: Any) -> Iterator[float]:
    if isinstance(data, dict):
        if isinstance(data.get("sigma"), (int, float)):
            yield float(data["sigma"])
        for part in data.values():
            yield from _sigmas(part)
    elif isinstance(data, list):
        for part in data:
            yield from _sigmas(part)


def certify_images(
    smoothed: Smoothed,
    by: Certification,
    loader: Loader,
    backend: Backend,
    keep: Callable[[list[list[int]]], None],
) -> None:
    """Certify every image of the loader, on all workers together, one image a worker at a time.

    `keep` is given, on rank 0, the rows [id, label, top, hits, predicted] of each round, as soon as it is over.
    """
    for share in loader.epoch(0):
        batch = share.batch
        # Workers' shares differ by one image at most, and every worker takes part in every round.
        for turn in range(-(-share.total // backend.world)):
            row = [-1] * 5
            if turn < len(batch.y):
                row = _certify_one(smoothed, by, batch, turn)
            rows = backend.gather(torch.tensor(row, device=backend.device)).tolist()
            if backend.rank == 0:
                keep([r for r in rows if r[0] >= 0])


def _certify_one(smoothed: Smoothed, by: Certification, batch: Batch, at: int) -> list[int]:
    index = int(batch.index[at])
    return [index, int(batch.y[at]), *smoothed.certify(batch.x[at], index, by.n0, by.n, by.alpha)]


class Kept:
    """Certificates on disk, a line an image as soon as it is certified. They depend on nothing but the image, the
    weights and the noise: another choice of images, another attempt and another number of workers use them too."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, list[int]]:
        """By id; without a torn last line."""
        remedy = "delete the line, or the file"
        try:
            rows = [json.loads(line) for line in read_lines(self.path, remedy)]
            whole = all(len(row) == 5 and all(isinstance(number, int) for number in row) for row in rows)
            require(whole, f"{self.path}: a line is no row of five numbers; {remedy}")
            return {row[0]: row for row in rows}
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path}: a damaged line ({str(error)[:100]}); {remedy}") from None

    def mend(self) -> None:
        """Drop a torn last line, so that the next is not written behind it."""
        rows = self.read().values()
        publish(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def append(self, rows: list[list[int]]) -> None:
        try:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            raise unwritable(self.path, error) from error


def certify_run(
    run: Run,
    folder: RunFolder,
    num_examples: int,
    loader_of: Callable[[list[int]], Loader],
    backend: Backend,
    emit: Emit,
    options: Mapping[str, Any],
) -> None:
    """Certify test images; writes RUN/certify-SIGMA/certify.json and images.parquet, and goes on where it was ended."""
    started = time.monotonic()
    by = Certification(**options["by"])
    network = build(run.model, folder.spec()).to(backend.device)
    facts = folder.load_weights(options["weights"], network)
    where = certification_folder(folder, by.sigma)
    ids = chosen(num_examples, options["every"], options["images"])
    kept = Kept(where / f"certificates-{_key(run, folder, by, options['weights'])}.jsonl")
    if backend.rank == 0:
        kept.mend()
    todo = _missing(kept, ids, backend)
    with attacking(network, relax=False) as f, exact_float32(backend.device):
        smoothed = Smoothed(f, folder.spec().classes, by.sigma, run.seed, by.batch)
        if todo:
            _announce(smoothed, by, len(ids), len(todo), folder, backend, emit)
            progress = _Progress(by, len(todo), backend.world, emit)
            smoothed = dataclasses.replace(smoothed, report=progress)
            certify_images(smoothed, by, loader_of(todo), backend, kept.append)
    if backend.rank == 0:
        certified = _certified(kept, ids, by)
        write_certificates(certified, where / "images.parquet")
        facts = {"weights": options["weights"], "epoch": facts["epoch"], "step": facts["step"]}
        notes = [note for note in [trained_noise(run, by.sigma)] if note is not None]
        more = {"workers": backend.world, "wall_seconds": time.monotonic() - started, "versions": versions()}
        result = {**certification_result(certified), "new": len(todo), **facts, "notes": notes, **more}
        folder.write(f"{where.name}/certify.json", result)
    backend.barrier()


def _key(run: Run, folder: RunFolder, by: Certification, weights: str) -> str:
    """Of everything a certificate depends on, but for the image."""
    content = folder.weights_path(weights).read_bytes()
    test = folder.read("data.json")["test"]["fingerprint"]
    data = {**dataclasses.asdict(by), "batch": None, "seed": run.seed, "model": encode(run.model), "test": test}
    text = json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(content).digest() + text).hexdigest()[:16]


def _missing(kept: Kept, ids: list[int], backend: Backend) -> list[int]:
    """What is still to be certified: as rank 0 sees the disk, since another node may see an older state of it."""
    backend.barrier()
    there = kept.read() if backend.rank == 0 else {}
    mask = torch.tensor([i not in there for i in ids], device=backend.device)
    return [i for i, wanted in zip(ids, backend.gather(mask)[0].tolist(), strict=True) if wanted]


class _Progress:
    """Of rank 0, in draws of all workers; they go at one pace, since each round waits for the slowest."""

    def __init__(self, by: Certification, images: int, world: int, emit: Emit) -> None:
        self.total, self.done, self.world, self.emit = images * (by.n0 + by.n), 0, world, emit

    def __call__(self, draws: int) -> None:
        self.done = min(self.total, self.done + draws * self.world)
        self.emit({"event": "certifying", "done": self.done, "total": self.total})


def _announce(
    smoothed: Smoothed, by: Certification, images: int, todo: int, folder: RunFolder, backend: Backend, emit: Emit
) -> None:
    """What it will cost, before it costs it."""
    spec = folder.spec()
    x = torch.full((spec.channels, spec.height, spec.width), 0.5, device=backend.device)
    draws = min(by.batch, by.n)
    smoothed.counts(x, 0, "warm up", draws)
    started = time.monotonic()
    smoothed.counts(x, 0, "warm up", draws)
    pace = draws / max(time.monotonic() - started, 1e-9)
    forwards = todo * (by.n0 + by.n)
    had = f" ({images - todo:,} more are certified already)" if todo < images else ""
    emit(
        {
            "event": "note",
            "message": f"{todo:,} images{had} x {by.n0 + by.n:,} draws = {forwards:,} forwards: about "
            f"{duration(forwards / (pace * min(backend.world, todo)))} at {pace:,.0f} a second and worker; "
            f"no radius can exceed {by.largest_radius:.3f}",
        }
    )


def _certified(kept: Kept, ids: list[int], by: Certification) -> Certified:
    there = kept.read()
    rows = [there[i] for i in ids]
    return Certified(ids, [row[1] for row in rows], [Certificate(*row[2:]) for row in rows], by)
