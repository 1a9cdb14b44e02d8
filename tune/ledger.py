"""The ledger of a sweep: append-only, a checksum to every line, and the only truth about its trials.

A line is `CRC32 JSON\\n`: the record, and the checksum of its bytes in eight hex digits. A record is committed once
`append` returns: then it is on the disk, whole, under its checksum. Whatever else a file may hold (a line cut short by
a kill or a full disk, a flipped bit) fails its checksum and costs that line alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.untrusted import LINES, require_size

Record = dict[str, Any]

_PREFIX = re.compile(rb"[0-9a-f]{0,8}|[0-9a-f]{8} (\{.*)?")
"""How a line begins that was cut short."""


class Ledger:
    """The records of one file, which any number of processes may append to, each through a Ledger of its own.

    Opening it writes nothing; a file that is not there has no records yet. Raises InputError for a file that is no
    ledger, or that cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.damaged: list[int] = []
        """Numbers, from 1, of the lines that were skipped."""
        self._records: list[Record] = []
        self._num_lines = 0
        self._num_bytes = 0
        self._num_told = 0
        torn = self._read_on()
        require(
            bool(self._records) or (self._num_lines == 0 and _PREFIX.fullmatch(torn) is not None),
            f"{self.path}: no ledger of a sweep (no line of it bears out its checksum); take another --run-name",
        )
        self._warn()

    def append(self, record: Mapping[str, Any]) -> Record:
        """Add a record, with the time unless it has one, and return it once it is on the disk.

        Raises ValueError or TypeError for what is not JSON, numbers that are not finite among it; InputError if it
        cannot be written, and then the file is as it was.
        """
        record = {"kind": record["kind"], "time": time.time(), **record}
        line = _encode(record)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, fcntl.LOCK_EX) as fd:
                _commit(fd, line)
                if os.fstat(fd).st_size == len(line):
                    _sync(self.path.parent)  # A file is found again after a power cut only if its folder was synced.
        except OSError as error:
            raise InputError(
                f"{self.path}: a record cannot be written ({error.strerror or error}); those before it are intact: "
                "free space or make the folder writable, then go on with --resume"
            ) from error
        return record

    def records(self) -> list[Record]:
        """All committed records, in the order in which they were written; only new lines are read. Warns of damaged
        lines, once each."""
        self._read_on()
        self._warn()
        return list(self._records)

    def _read_on(self) -> bytes:
        """Read the whole lines that are new; returns what comes after the last of them."""
        try:
            require_size(self.path, "check the path and its owner", LINES)
            # Locked: a torn tail must not be exchanged for a new line halfway through the reading of it.
            with _locked(self.path, os.O_RDONLY, fcntl.LOCK_SH) as fd:
                new = _read(fd, self._num_bytes)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror or error}); check the path and its owner"
            ) from error
        *lines, torn = new.split(b"\n")
        for number, line in enumerate(lines, self._num_lines + 1):
            record = _decode(line)
            if record is None:
                self.damaged.append(number)
            else:
                self._records.append(record)
        self._num_lines += len(lines)
        self._num_bytes += len(new) - len(torn)
        return torn

    def _warn(self) -> None:
        new = self.damaged[self._num_told :]
        self._num_told = len(self.damaged)
        if new:
            which = ", ".join(map(str, new[:10])) + ", ..." * (len(new) > 10)
            warnings.warn(
                f"{self.path}: line {which}: damaged and skipped ({len(self.damaged)} in all), "
                f"the other {len(self._records)} records are intact; restore the file from a copy, or "
                "--resume: what is lost runs again",
                stacklevel=3,
            )


@contextlib.contextmanager
def _locked(path: Path, flags: int, lock: int) -> Iterator[int]:
    """A descriptor of its own for every use: those that a fork or a thread shares would share the lock, too."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, lock)
        yield fd
    finally:
        # Closing alone would leave it with a process that was forked meanwhile.
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _commit(fd: int, line: bytes) -> None:
    """Append a line and sync; raises OSError and leaves the committed lines if either fails."""
    end = os.fstat(fd).st_size
    if end and os.pread(fd, 1, end - 1) != b"\n":
        # Whoever wrote this died over it; glued to the new line it would take that one along.
        end = _read(fd).rfind(b"\n") + 1
        os.ftruncate(fd, end)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    except OSError:
        os.ftruncate(fd, end)
        raise


def _read(fd: int, start: int = 0) -> bytes:
    with open(fd, "rb", closefd=False) as file:
        file.seek(start)
        return file.read()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encode(record: Record) -> bytes:
    body = json.dumps(record, allow_nan=False, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _decode(line: bytes) -> Record | None:
    """The record of a line without its newline; None if the line is damaged."""
    body = line[9:]
    if line[:9] != b"%08x " % zlib.crc32(body):
        return None
    try:
        record = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and "kind" in record else None
