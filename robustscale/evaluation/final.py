"""What is read from the test set: once at the end of training, and again by `python -m robustscale.evaluate`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking, relaxing
from robustscale.config import encode
from robustscale.engine.folder import RunFolder, Weights, publish
from robustscale.engine.versions import versions
from robustscale.evaluation.accuracy import exact_float32, judge, num_draws
from robustscale.evaluation.noise_defence import Defence
from robustscale.evaluation.result import run_result, write_examples
from robustscale.evaluation.suite import default_suite, reported, suite_result
from robustscale.evaluation.verdicts import Asked
from robustscale.evaluation.words import Attacker
from robustscale.models.network import build
from robustscale.noise import Noise, drawing, randomised
from robustscale.run import Run
from robustscale.types import Backend, Loader

Emit = Callable[[dict[str, Any]], None]

NUM_SHOWN = 10
"""Test images in the gallery: the first ones of the file, whatever becomes of them."""


def read_test_set(
    run: Run,
    folder: RunFolder,
    which: Weights,
    test: Loader,
    backend: Backend,
    emit: Emit,
    seconds: float,
    training: Mapping[str, Any],
) -> None:
    """Judge the finished run under its own evaluation attack; writes result.json last, which makes the run finished.

    `training`: facts of it for the result.
    """
    started = time.monotonic()
    network = build(run.model, folder.spec()).to(backend.device)
    facts = _load(which, network, folder, backend)
    name, attacker = reported(run, randomised=randomised(network))
    everything = torch.arange(test.num_examples)
    examples = judge(
        network,
        test,
        {name: attacker},
        backend,
        run.seed,
        draws=run.evaluation.draws,
        expected=everything,
        report=emit,
    )
    if backend.rank == 0:
        _save_gallery(network, test, name, attacker, run, folder)
        result = run_result(examples, name, attacker, weights=which, step=facts["step"], epoch=facts["epoch"])
        held_out = {k: facts[k] for k in ("held_out_sa", "held_out_ra") if k in facts}
        took = time.monotonic() - started
        times = {"wall_seconds": seconds + took, "test_seconds": took}
        more = {"workers": backend.world, **times, "versions": versions()} | _drawn(network, run)
        folder.write("result.json", {**result, **held_out, **training, **more})
    backend.barrier()


def _load(which: Weights, network: nn.Module, folder: RunFolder, backend: Backend) -> dict[str, Any]:
    """Rank 0's weights on every worker: the working copy of another machine has none yet, or older ones. The facts are
    on rank 0 alone."""
    facts = folder.load_weights(which, network) if backend.rank == 0 else {}
    if backend.world > 1:
        for tensor in network.state_dict().values():
            tensor.copy_(backend.gather(tensor)[0])
    return facts


def _drawn(network: nn.Module, run: Run) -> dict[str, int]:
    """{"draws": ...} of a randomised network, one included: its figures are of a draw all the same."""
    return {"draws": num_draws(network, run.evaluation.draws)} if randomised(network) else {}


def _save_gallery(network: nn.Module, test: Loader, name: str, attacker: Attacker, run: Run, folder: RunFolder) -> None:
    """The first images of the test set, clean and attacked, with what the network sees in them."""
    batch = next(itertools.islice(test.epoch(0), 1)).batch
    batch = type(batch)(*(column[:NUM_SHOWN] for column in batch))
    noise = Noise.of(run.seed, batch.index, "evaluate", name)
    with attacking(network, relax=False) as f, exact_float32(batch.x.device):
        asked = Asked(f, run.seed)
        with drawing(noise.fold("network")), relaxing(f):
            x_adv = attacker.attack(attacker.goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)
        predicted, predicted_adv = (asked.predictions(x, batch.index)[:, 0] for x in (batch.x, x_adv))
    shown: dict[str, Tensor] = {
        "images": batch.x,
        "adversarial": x_adv,
        "labels": batch.y,
        "predicted": predicted,
        "predicted_adv": predicted_adv,
    }
    publish(folder.gallery, safetensors.torch.save({k: v.contiguous().cpu() for k, v in shown.items()}))


def evaluate_run(
    run: Run, folder: RunFolder, test: Loader, backend: Backend, emit: Emit, options: Mapping[str, Any]
) -> None:
    """The suite of attacks on the test set; writes evaluation.json and examples.parquet to RUN/evaluation, or beside it
    where the network is read behind noise."""
    started = time.monotonic()
    defence = Defence(options["noise"], options["noise_draws"])
    bare = build(run.model, folder.spec()).to(backend.device)
    facts = folder.load_weights(options["weights"], bare)
    network = defence.protect(bare)
    suite = default_suite(
        run,
        folder.spec(),
        linf=options["eps_linf"],
        l2=options["eps_l2"],
        kinds=options["attacks"],
        randomised=randomised(network),
        blind=options["noise"] is not None,
    )
    examples = judge(
        network,
        test,
        suite.attacks,
        backend,
        run.seed,
        draws=run.evaluation.draws,
        expected=torch.arange(test.num_examples),
        report=emit,
    )
    if backend.rank == 0:
        where = defence.results(folder, options["point"])
        where.mkdir(parents=True, exist_ok=True)
        write_examples(examples, where / "examples.parquet")
        found = suite_result(examples, suite)
        result = {
            **found,
            "notes": [*found["notes"], *defence.notes(reported(run)[0])],
            **({} if defence.noise is None else defence._asdict()),
            **_drawn(network, run),
            "model": encode(run.model),
            "weights": options["weights"],
            "epoch": facts["epoch"],
            "step": facts["step"],
            "workers": backend.world,
            "wall_seconds": time.monotonic() - started,
            "versions": versions(),
        }
        folder.write(f"{where.name}/evaluation.json", result)
    backend.barrier()
