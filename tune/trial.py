"""What the process of one trial does: the same worker as pretraining, told to Ray Tune look by look."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.attempt import attempt, job, short
from robustscale.config import decode
from robustscale.engine.folder import RunFolder
from robustscale.errors import Diverged, InputError, WorkersFailed
from robustscale.run import Run
from tune.sweep import require_id

DYING = "stacks.txt"
"""In a trial's folder: where its process stood when it crashed, or when its watchdog ended it."""

GROUP = "placement_group"
"""In a trial's folder, while a group of workers trains it: what the group holds of the cluster."""

Emit = Callable[[dict[str, Any]], None]


def trial(config: Mapping[str, Any], *, sweep: str, gpu: bool, hang: float) -> None:
    """Ray Tune's function: trains what the searcher proposed, and goes on where an earlier attempt ended.

    Reports {"epoch", "sa", "ra", "flops", "seconds"} after each look at the held-out part, and with "finished" once
    everything is on the disk; {"failed": reason} for what another attempt would not mend. Where Tune stops it, the
    thread ends inside a report. Raises WorkersFailed, upon which Tune begins it again, where its workers died.
    """
    from ray import tune

    run = decode(Run, config["run"])
    folder = RunFolder(Path(sweep, "trials", require_id(config["id"])))

    def emit(record: dict[str, Any]) -> None:
        last = record.get("epoch") == run.epochs
        if record["event"] == "epoch" and "sa" in record and not last:
            tune.report(_report(record))

    try:
        if not (folder.path / "trial.json").exists():
            gc.collect()  # a network that was stopped here would stay on the GPU until Python looks for cycles
            with locked(folder):
                folder.write_run(run)
                options = {"data": RunFolder(sweep).read("data.json")}
                perform(job("trial", run, folder, options, gpu), run, emit, hang)
        figures = folder.read("trial.json")
        tune.report({**_report(figures), "n": figures["n"], "finished": True})
    except WorkersFailed:
        raise
    except (InputError, Diverged) as error:
        tune.report({"failed": str(error)})
    except Exception as error:  # noqa: BLE001 (a search goes on without a training that failed, and says why it did)
        tune.report({"failed": f"{type(error).__name__}: {short(error)}"})


def _report(figures: Mapping[str, Any]) -> dict[str, Any]:
    named = {"seconds": figures["worker_seconds"]}
    return {**{name: figures[name] for name in ("epoch", "sa", "ra", "flops")}, **named, "finished": False}


def perform(config: dict[str, Any], run: Run, emit: Emit, hang: float) -> None:
    """A task of cluster.worker, in this process where it has one worker. Raises WorkersFailed where workers died."""
    if run.cluster.workers == 1:
        from cluster.worker import alone

        with watchdog(Path(config["folder"]), hang) as alive:

            def watched(record: dict[str, Any]) -> None:
                emit(record)
                alive()

            alone(config, watched)
    else:
        _perform_group(config, run, emit, hang)


def _perform_group(config: dict[str, Any], run: Run, emit: Emit, hang: float) -> None:
    """Several workers: a Ray Train run of their own. Reports are made by this thread, as Tune wants it."""
    # What a trial that was stopped held comes back within seconds, what another job holds, when it likes.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(hang))
    records: queue.Queue[dict[str, Any] | BaseException | str | None] = queue.Queue()

    def train() -> None:
        try:
            records.put(attempt(config, run.cluster, records.put))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (raised again by the thread that waits)
            records.put(error)

    held = Path(config["folder"], GROUP)
    threading.Thread(target=train, daemon=True).start()
    while True:
        try:
            record = records.get(timeout=hang)
        except queue.Empty:
            raise WorkersFailed(f"hung: no word from the workers for {hang:g} s") from None
        if record is None:
            held.unlink(missing_ok=True)
            return
        if isinstance(record, BaseException):
            raise record
        if isinstance(record, str):
            raise WorkersFailed(record)
        if GROUP in record:
            held.write_text(record[GROUP])
        emit(record)


@contextlib.contextmanager
def locked(folder: RunFolder) -> Iterator[None]:
    """An attempt whose driver was killed may take seconds to end."""
    deadline = time.monotonic() + 60
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(folder.locked())
                break
            except InputError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield


@contextlib.contextmanager
def watchdog(folder: Path, seconds: float) -> Iterator[Callable[[], None]]:
    """End this process unless what is yielded is called often enough; its stacks are written to the folder then, and
    if it crashes. It is C that waits, so that a loop which holds the interpreter is ended too."""
    folder.mkdir(parents=True, exist_ok=True)
    stacks = folder / DYING
    with contextlib.ExitStack() as stack, stacks.open("w") as file:
        stack.callback(stacks.unlink)  # however it ends, unless the process does

        def alive() -> None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=file)

        faulthandler.enable(file)
        alive()
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.enable()  # on stderr, as Ray has it


def last_words(folder: Path, hang: float) -> str | None:
    """What the stacks of a process that died say of its end, on one line."""
    file = folder / DYING
    line = file.read_text().partition("\n")[0] if file.is_file() else ""
    if line.startswith("Timeout"):
        return f"hung: no step for {hang:g} s; its stacks are in {file}"
    return f"{line}; its stacks are in {file}" if line else None
