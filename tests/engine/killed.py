"""Training in processes of its own, to be killed at any moment. A module apart: a fork server imports it once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.tensorboard

from cluster.ddp_backend import DdpBackend
from robustscale.config import decode, encode
from robustscale.engine.backend import LocalBackend
from robustscale.engine.callbacks.averaging import Averager
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.callbacks.log import Log, read_lines
from robustscale.engine.callbacks.monitor import Monitor
from robustscale.engine.checkpoint import Store
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.models.network import build
from robustscale.run import Run
from robustscale.types import Backend
from tests.engine.small import SPEC, MemoryLoader

_TIMES = {"seconds", "images_per_second", "wait", "attack_seconds", "step_seconds", "slowest_attack_seconds"}
_TIMES |= {"slowest_rank"}


def fork_server() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def rank_main(rank: int, world: int, root: str, store: str, config: dict[str, Any]) -> None:
    """One rank of one attempt, which goes on from the last checkpoint."""
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the group is there already; Accelerate only looks
    if world > 1:
        limit = timedelta(seconds=60)
        dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=limit)
    backend: Backend = DdpBackend(cpu=True) if world > 1 else LocalBackend()
    run, folder = decode(Run, config), RunFolder(root)
    torch.use_deterministic_algorithms(run.reduction == "deterministic")
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.closing(Log(folder, lambda record: None)))
        saving = Checkpointing(run, Store(folder.checkpoints, run.checkpoints.keep), lambda record: None)
        stack.enter_context(contextlib.closing(saving))
        monitor = Monitor(run, folder, MemoryLoader(run, rank, world, num_examples=24))
        callbacks = [*Averager.of(run), monitor, log, saving]
        loader = MemoryLoader(run, rank, world)
        Trainer(run, build(run.model, SPEC, run.seed), loader, backend, callbacks).fit()


def attempt(run: Run, world: int, folder: Path, kill: Callable[[list[int]], bool] | None) -> bool:
    """Whether the attempt came to its end. `kill` is given the ranks' process ids, and says whether it killed any."""
    folder.mkdir(parents=True, exist_ok=True)
    store = str(folder / f"store-{time.monotonic_ns()}")
    context = fork_server()
    ranks = [context.Process(target=rank_main, args=(r, world, str(folder), store, encode(run))) for r in range(world)]
    for process in ranks:
        process.start()
    killed = kill is not None and kill([process.pid for process in ranks if process.pid is not None])
    deadline = time.monotonic() + 600  # they may share the machine
    for process in ranks:
        # Killed alone, a rank leaves others that end by themselves once their connection is gone.
        process.join(5 if killed else max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    Path(store).unlink(missing_ok=True)
    codes = [process.exitcode for process in ranks]
    assert killed or codes == [0] * world, f"exit codes {codes} without a kill"
    return codes == [0] * world


def kill_all(pids: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def digest(folder: Path) -> dict[str, Any]:
    """Of all that a run leaves: the newest checkpoint's tensors and state, best weights, and every step's record."""
    saved = Store(folder / "checkpoints", 1).latest()
    assert saved is not None
    state = json.loads(json.dumps(saved.state))
    del state["position"]["seconds"]
    lines = [{k: v for k, v in line.items() if k not in _TIMES} for line in read_lines(RunFolder(folder))]
    best = (folder / "weights" / "best.safetensors").read_bytes()
    files = {name: file.sha256 for name, file in saved.files.items() if name.endswith(".safetensors")}
    return {"files": files, "state": state, "lines": lines, "best": hashlib.sha256(best).hexdigest()}
