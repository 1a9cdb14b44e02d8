"""Which files were read whole and found to be what was written: once for each file and machine.

Opening a file proves its tables alone; a bit that flipped in a pixel shows in the checksums of its pages, which cost a
second per GB. A marker in the home folder remembers them: of the inode, its size and its last change, so that anything
done to the file or its sidecar has it read again. Not beside the file: whoever gives a file away could give a marker
along, and data is often mounted read-only.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import filelock

from data_loaders.beton import Beton

log = logging.getLogger(__name__)


def verify_once(beton: Beton) -> None:
    """`Beton.verify`, unless this machine has done so. Of several processes one reads, the others wait.

    Raises `InputError`.
    """
    identity = beton.identity()
    marker = _folder() / hashlib.sha256(str(beton.path.resolve()).encode()).hexdigest()[:32]
    if _read(marker) == identity:
        return
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(marker.with_suffix(".lock")).acquire()
    except OSError as error:
        log.warning("%s: no room to remember (%s), so each process reads it whole", beton.path, error)
        beton.verify()
        return
    with lock:
        if _read(marker) != identity:
            beton.verify()
            _write(marker, identity)


def _folder() -> Path:
    return Path("~/.cache/robustscale/verified").expanduser()


def _read(marker: Path) -> str | None:
    try:
        return marker.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _write(marker: Path, identity: str) -> None:
    try:
        marker.write_text(identity)
    except OSError as error:
        log.warning("%s: can't be written to (%s), so the next run reads the file again", marker, error)
