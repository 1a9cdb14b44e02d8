"""Metrics to JSON lines, TensorBoard, and whoever is watching."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from robustscale import untrusted
from robustscale.engine.callback import Callback
from robustscale.engine.folder import RunFolder, publish
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.fields import require


class Log(Callback):
    """Rank 0 writes every record once. On resuming, records after the checkpoint are dropped: they come again."""

    def __init__(self, folder: RunFolder, emit: Callable[[dict[str, Any]], None]) -> None:
        self.folder, self.emit = folder, emit
        self.writing = False

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.backend.rank > 0:
            return
        from torch.utils.tensorboard import SummaryWriter

        kept = [
            line for line in read_lines(self.folder) if line["step"] <= trainer.step and not _to_come(line, trainer)
        ]
        publish(self.folder.metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = self.folder.metrics.open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(self.folder.tensorboard), purge_step=trainer.step + 1)
        self.writing = True

    def after_step(self, trainer: Trainer) -> None:
        if trainer.reported:
            self._write(trainer.record)

    def after_epoch(self, trainer: Trainer) -> None:
        self._write(trainer.record)

    def on_fit_end(self, trainer: Trainer) -> None:
        self.close()

    def close(self) -> None:
        """However training ended: a process may live on, and train another run."""
        if self.writing:
            self.file.close()
            self.tensorboard.close()

    def _write(self, record: dict[str, Any]) -> None:
        if not self.writing:
            return
        self.file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if isinstance(value, float):
                tag = f"{record['event']}/{name}"
                self.tensorboard.add_scalar(tag, value, record["step"])
        self.emit(record)


def _to_come(line: dict[str, Any], trainer: Trainer) -> bool:
    """Of an epoch that was left after its last step: its record is made, once more, before the next step."""
    epoch = line.get("epoch")
    return line["event"] == "epoch" and isinstance(epoch, int) and epoch > trainer.epoch


def read_lines(folder: RunFolder) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without a torn last line."""
    remedy = "delete the line, or the file"
    try:
        records = [json.loads(line) for line in untrusted.read_lines(folder.metrics, remedy)]
        known = all(isinstance(record["event"], str) and isinstance(record["step"], int) for record in records)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{folder.metrics}: a damaged line ({str(error)[:100]}); {remedy}") from None
    require(known, f"{folder.metrics}: a line that is no record of a run; {remedy}")
    return records
