"""Where an Optuna study is kept, for dashboards: a journal file, or a database by its URL."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from robustscale.errors import InputError
from robustscale.untrusted import LINES, require_size
from tune.spaces import Space, difference

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, AssertionError, OptunaError)
"""What Optuna raises over a journal with a line that is damaged, or gone."""


class _Journal(JournalFileBackend):
    """Optuna's journal file without its fsync, once for every attribute: the ledger has it all, and a search would
    spend more time on the disk than Tune does on a trial."""

    def __init__(self, path: Path) -> None:
        self._path, self._one_writer = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), lock_obj=self._one_writer)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._locked(), self._path.open("ab") as file:
            file.write(lines.encode())

    def cut_torn_tail(self) -> None:
        """A line without an end is a dead writer's: whoever lives holds the lock while writing. The next record would
        be glued to it, and the journal unreadable for good."""
        with self._locked(), self._path.open("rb+") as file:
            last = deque(file, maxlen=1)
            if last and not last[0].endswith(b"\n"):
                file.truncate(file.seek(0, 2) - len(last[0]))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._one_writer.acquire()
        try:
            yield
        finally:
            self._one_writer.release()


def clear(storage: BaseStorage, name: str, ours: Mapping[str, Any], where: str) -> None:
    """Delete this sweep's own study of an earlier start. Raises InputError, and changes nothing, where it is not."""
    found = next((study for study in storage.get_all_studies() if study.study_name == name), None)
    if found is None:
        return
    study_id = storage.get_study_id_from_name(name)
    theirs, place = found.user_attrs, f"{readable(where)}: the study {name!r} there is"
    # One without trials may have been left by a start that was killed before it had signed it.
    if "space" not in theirs and storage.get_n_trials(study_id):
        raise InputError(f"{place} none of a search of ours; take another --run-name, or another storage")
    if theirs.get("space", ours["space"]) != ours["space"]:
        raise InputError(
            f"{place} of another space; take another --run-name, or another storage\n"
            f"{difference(Space.from_text(theirs['space']), Space.from_text(ours['space']))}"
        )
    if theirs.get("sweep", ours["sweep"]) != ours["sweep"]:
        raise InputError(f"{place} another search's, with this space; take another --run-name, or another storage")
    storage.delete_study(study_id)


def readable(storage: str) -> str:
    """The storage as it may be shown: no password."""
    scheme, separator, rest = storage.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{host}" if separator else storage


def open_storage(storage: str, mend: Path) -> BaseStorage:
    """An Optuna storage to write: by URL a database, else a journal file. One in the folder `mend` is nobody else's,
    and what a killed driver left of it is mended. Raises InputError."""
    return _database(storage) if "://" in storage else _open_journal(Path(storage), mend)


def existing_storage(storage: str) -> BaseStorage:
    """An Optuna storage to read, maybe while somebody writes it. Raises InputError where none is there."""
    path = storage.removeprefix("sqlite:///")
    if "://" not in path and not Path(path).is_file():
        raise InputError(f"{storage}: is not there; give the storage of a search that was started")
    if "://" in storage:
        return _database(storage)
    require_size(Path(storage), "give the storage of a search that was started", LINES)
    try:
        return JournalStorage(JournalFileBackend(storage))
    except (OSError, *_DAMAGED) as error:
        raise _not_a_journal(storage, error) from error


def _database(url: str) -> RDBStorage:
    options: dict[str, Any] = {"pool_pre_ping": True}  # between two trials a database may close the connection
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}  # one writer at a time; the others wait
    with reachable(url):
        for _ in range(4):
            try:
                return RDBStorage(url, engine_kwargs=options)
            except DBAPIError:  # where two searches make the tables of a new database, one of them finds some there
                time.sleep(0.5)
        return RDBStorage(url, engine_kwargs=options)


@contextlib.contextmanager
def reachable(storage: str) -> Iterator[None]:
    """Of what a database may answer, one line. RuntimeError: its tables are of another Optuna."""
    try:
        yield
    except (ImportError, RuntimeError, SQLAlchemyError, StorageInternalError) as error:
        raise _unreachable(storage, error) from error


def _unreachable(storage: str, error: BaseException) -> InputError:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split("\n")[0].split())
    remedy = "install its driver" if isinstance(cause, ImportError) else "give sqlite:////PATH or postgresql://..."
    return InputError(f"{readable(storage)}: cannot be used as Optuna's storage ({reason}); {remedy}, or a file's path")


def _open_journal(path: Path, mend: Path) -> JournalStorage:
    ours = path.parent.resolve() == mend.resolve()
    if ours:
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.lock").unlink(missing_ok=True)  # a killed driver's: Optuna would wait 30 s for it
    try:
        journal = _Journal(path)
        journal.cut_torn_tail()
        return JournalStorage(journal)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); check its owner") from error
    except _DAMAGED as error:
        if not ours:
            raise _not_a_journal(path, error) from error
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
    path.rename(aside)
    warnings.warn(f"{path}: was damaged, and is rebuilt from the ledger; the old one is {aside.name}", stacklevel=5)
    return JournalStorage(_Journal(path))


def _not_a_journal(path: str | Path, error: BaseException) -> InputError:
    what = f"{type(error).__name__}: {error}"
    return InputError(f"{path}: is no Optuna journal, or a damaged one ({what}); move it away: searches rebuild theirs")
