"""A sweep's folder: the one place that knows its layout, and what it was begun with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from robustscale.config import decode, encode, shown
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.run import Run, identity
from robustscale.run import difference as run_difference
from robustscale.untrusted import is_there
from tune.ledger import Ledger
from tune.settings import Settings
from tune.spaces import Space, difference

SCHEMA = 1
_ID = re.compile(r"[0-9a-f]{16}")


class Sweep(RunFolder):
    """ledger.jsonl, optuna.journal, trials/, ray/, frontier.json and what is drawn from it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.ledger_path = self.path / "ledger.jsonl"
        self.journal = self.path / "optuna.journal"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> Sweep:
        sweep = cls(path)
        if not is_there(sweep.ledger_path):
            raise InputError(f"{path}: not a search's folder (it has no ledger.jsonl); give the folder that it printed")
        sweep.require_whole()
        return sweep

    def ledger(self) -> Ledger:
        return Ledger(self.ledger_path)

    def begin(self, run: Run, space: Space, settings: Settings) -> None:
        """Say what is searched, in the ledger's first record, and by which options from now on. Raises InputError
        where that record says something else."""
        self.require_same(run, space, settings)
        ledger = self.ledger()
        records = ledger.records()
        if self.header(records) is None:
            ledger.append(
                {
                    "kind": "sweep",
                    "schema": SCHEMA,
                    "run": encode(run),
                    "space": space.as_text(),
                    "settings": settings.identity(),
                }
            )
        if _options(records) != settings.options():
            ledger.append({"kind": "options", "options": settings.options()})

    def header(self, records: list[dict[str, Any]]) -> dict[str, Any] | None:
        return next((record for record in records if record["kind"] == "sweep"), None)

    def begun(self) -> tuple[Run, Space, Settings]:
        """What this folder searches: the recipe, the space, and the settings it was last given."""
        records = self.ledger().records()
        header, options = self.header(records), _options(records)
        if header is None:
            raise InputError(f"{self.ledger_path}: its first line is damaged; restore it from a copy")
        with self.as_written():
            settings = Settings.of(header["settings"]) if options is None else Settings.read(options)
            return decode(Run, header["run"]), Space.from_text(header["space"]), settings

    def require_same(self, run: Run, space: Space, settings: Settings) -> None:
        """Raise InputError where this folder holds a search of something else; it need not be there."""
        header = self.header(self.ledger().records()) if self.ledger_path.exists() else None
        if header is None:
            return
        other = "take another --run-name"
        with self.as_written():
            before, whole = Space.from_text(header["space"]), decode(Run, header["run"])
            dict(header["settings"])
        if before.as_text() != space.as_text():
            raise InputError(f"{self.path}: holds a search of another space; {other}\n{difference(before, space)}")
        for name, value in settings.identity().items():
            if header["settings"].get(name) != value:
                raise InputError(f"{self.path}: {name} was {header['settings'].get(name)!r}, now {value!r}; {other}")
        if identity(whole) != identity(run):
            raise InputError(f"{self.path}: holds another search ({run_difference(whole, run)}); {other}")

    @contextlib.contextmanager
    def as_written(self) -> Iterator[None]:
        """A line's checksum tells damage, not who wrote it."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.ledger_path}: not what a search writes; restore it from a copy") from error

    def trial(self, trial: str) -> RunFolder:
        return RunFolder(self.path / "trials" / require_id(trial))


def _options(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Those of the last start."""
    return next((record["options"] for record in reversed(records) if record["kind"] == "options"), None)


def require_id(trial: str) -> str:
    """Raises InputError for what is no trial's ID, and so might name another folder."""
    require(_ID.fullmatch(trial) is not None, f"ledger.jsonl: {shown(trial)} is no trial's ID; restore it from a copy")
    return trial


def trial_id(run: Run) -> str:
    """Of configuration, seed and budget: what determines a training's result."""
    canonical = json.dumps(identity(run), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
