"""Run a function on n ranks of a gloo group, on this machine, and hear of every failure."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

IMPORTED_ONCE = ("torch.distributed", "torch._dynamo", "robustscale.engine.trainer", "cluster.ddp_backend")
"""By the process that ranks are forked from: importing them takes seconds, torch._dynamo's upon the first optimizer.
What can't be imported there is left out."""


class RankFailed(RuntimeError):
    """A rank raised, died or took too long; the message holds its traceback."""


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """[fn(rank, *args) for each rank], each rank a process of its own in one gloo group, one torch thread each.

    `fn` is a function at the top of a module and may use `torch.distributed`. Nothing leaves the loopback device.
    Raises RankFailed with the first failing rank's traceback, and ends the other ranks.
    """
    # The parent holds the store: port 0 lets the system choose, so no other process can take the port meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    pipes = [context.Pipe() for _ in range(world)]
    ranks = [
        context.Process(target=_rank, args=(fn, rank, world, store.port, timeout, pipes[rank][1], args), daemon=True)
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        results = _collect([ours for ours, _ in pipes], timeout)
        for ours, _ in pipes:
            ours.send("received")
        for process in ranks:
            process.join(timeout)
        return results
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankFailed(f"ranks {late} did not finish in {timeout:g} s")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                results[rank], failure = pipes[rank].recv()
            except EOFError:
                raise RankFailed(f"rank {rank} died without a word") from None
            if failure is not None:
                raise RankFailed(f"rank {rank} failed:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    fn: Callable[..., Any], rank: int, world: int, port: int, timeout: float, pipe: Connection, args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        limit = timedelta(seconds=timeout)
        store = dist.TCPStore("127.0.0.1", port, world, is_master=False, timeout=limit)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        result = fn(rank, *args)
    except Exception:  # noqa: BLE001  whatever it is, the parent raises it
        pipe.send((None, traceback.format_exc()))
        return
    pipe.send((result, None))
    # Tensors travel as shared memory that this process serves, so it must outlive their receipt.
    pipe.recv()
    dist.destroy_process_group()
