"""The log across interruptions."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustscale.engine.callbacks.log import Log, read_lines
from robustscale.engine.folder import RunFolder
from tests.engine.small import small_run, train
from tests.engine.test_trainer import StopAt


def test_a_resumed_run_keeps_the_records_before_its_checkpoint_and_no_other(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    run = small_run(checkpoints={"every_steps": 2})
    log, stop = Log(folder, lambda record: None), StopAt(4)
    with pytest.raises(KeyboardInterrupt):
        train(run, root=folder.checkpoints, callbacks=[log, stop])
    log.file.close()
    log.tensorboard.close()
    assert [record["step"] for record in read_lines(folder)] == [1, 2, 3, 3, 4]
    _, _, trainer = train(run, root=folder.checkpoints, callbacks=[Log(folder, lambda record: None)])
    records = [(record["event"], record["step"]) for record in read_lines(folder)]
    assert records == [
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("epoch", 3),
        *[("step", s) for s in (4, 5, 6)],
        ("epoch", 6),
    ]
    assert trainer.step == 6
