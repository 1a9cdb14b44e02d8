"""Objects under a URL, by pyarrow's filesystems, or by fsspec's where pyarrow has none. Credentials come from the
environment, as each of these services looks for them; none is read from a URL.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from robustscale.errors import InputError
from robustscale.fields import require

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_PYARROW = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
_AT_ONCE = ("s3", "gcs", "abfs")
"""Where an object appears whole when its writing ends, and there are no folders; by `type_name` of the filesystem."""
_PIECE = 2**24
_SECRETS = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|^SIG")


class Unreachable(OSError):
    """An object could not be read or written now; it may be later. The message is one line and names the URL."""


class Found(NamedTuple):
    size: int
    mtime_ns: int | None
    """When it was written, by the other side's clock; None where that isn't told."""


def is_url(place: str | os.PathLike[str]) -> bool:
    return _URL.match(os.fspath(place)) is not None


def joined(place: str, name: str) -> str:
    """The path or URL of what lies in `place` under this name; a URL's query stays at its end."""
    if not is_url(place):
        return str(Path(place, name))
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def name_in(place: str) -> str:
    """The last part of a path or URL."""
    return PurePosixPath(urlsplit(place).path if is_url(place) else place).name


class Remote:
    """The objects below a URL, by names relative to it. Methods raise Unreachable, and FileNotFoundError where they say
    so; the first use raises InputError for a URL that no driver here understands."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _at(self) -> tuple[Any, str]:
        """The filesystem, and the path of the URL in it."""
        parts = urlsplit(self.url)
        # Not quoted: it holds a secret.
        named = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRETS.search(name.upper())]
        require(
            parts.password is None and parts.username in (None, "anonymous") and not named,
            f"{parts.scheme}://...@{parts.hostname}: a URL is kept and printed, so it must hold no credentials; put "
            "them into the environment",
        )
        return _filesystem(self.url, parts.scheme)

    @cached_property
    def _at_once(self) -> bool:
        return self._at[0].type_name in _AT_ONCE

    def list(self, folder: str = "") -> dict[str, Found]:
        from pyarrow.fs import FileSelector, FileType

        with self._told():
            files, root = self._at
            above = self._path(folder)
            infos = files.get_file_info(FileSelector(above, recursive=True, allow_not_found=True))
        # Some filesystems give paths without the slash that the root begins with, or the other way round.
        start = len(root.strip("/")) + 1
        return {
            info.path.strip("/")[start:]: Found(info.size, info.mtime_ns)
            for info in infos
            if info.type == FileType.File
        }

    def found(self, name: str) -> Found | None:
        from pyarrow.fs import FileType

        with self._told():
            info = self._at[0].get_file_info(self._path(name))
        return Found(info.size, info.mtime_ns) if info.type == FileType.File else None

    def read(self, name: str, limit: int = 2**20) -> bytes:
        """At most `limit` bytes of it. Raises FileNotFoundError."""
        with self._told(missing=True), self._at[0].open_input_stream(self._path(name)) as source:
            return bytes(source.read(limit))

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        with self._writing(name) as sink:
            sink.write(content)

    def upload(self, source: Path, name: str) -> None:
        """Whole or not at all, if the source can be read to its end. Raises FileNotFoundError where the source is
        gone."""
        with source.open("rb") as file, self._writing(name) as sink:
            shutil.copyfileobj(file, sink, _PIECE)

    def download(self, name: str, target: Path) -> None:
        """Raises FileNotFoundError, and OSError where the target can't be written."""
        with self._told(missing=True):
            source = self._at[0].open_input_stream(self._path(name))
        with source, target.open("wb") as file:
            # What goes wrong with the target is not told as if it were the URL's fault.
            while piece := self._piece(source):
                file.write(piece)

    def _piece(self, source: Any) -> bytes:
        with self._told():
            return bytes(source.read(_PIECE))

    def remove(self, name: str) -> None:
        """Nothing to remove is no error."""
        with contextlib.suppress(FileNotFoundError), self._told(missing=True):
            self._at[0].delete_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Once it is empty, where folders exist at all."""
        if not self._at_once:
            with contextlib.suppress(FileNotFoundError), self._told(missing=True):
                self._at[0].delete_dir(self._path(name))

    def require_usable(self) -> None:
        """Write an object, read it and remove it again; raises InputError."""
        name = f".probe-{secrets.token_hex(4)}"
        try:
            self.write(name, b"robustscale")
            read = self.read(name)
            self.remove(name)
        except (Unreachable, FileNotFoundError) as error:
            raise InputError(str(error)) from None
        require(read == b"robustscale", f"{self.url}: gives back other bytes than were written; take another --storage")

    def _path(self, name: str) -> str:
        return f"{self._at[1].rstrip('/')}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        with self._told():
            files, path = self._at[0], self._path(name)
            if self._at_once:
                with files.open_output_stream(path) as sink:
                    yield sink
                return
            folder, _, last = path.rpartition("/")
            files.create_dir(folder, recursive=True)
            beside = f"{folder}/.{last}.{secrets.token_hex(4)}.tmp"
            with files.open_output_stream(beside) as sink:
                yield sink
            files.move(beside, path)

    @contextlib.contextmanager
    def _told(self, missing: bool = False) -> Iterator[None]:
        """`missing`: that the object is not there is the caller's to judge."""
        try:
            yield
        except (InputError, Unreachable):
            raise
        except Exception as error:  # each of fsspec's drivers raises exceptions of its own
            if missing and isinstance(error, FileNotFoundError):
                raise
            what = f"{self.url}: cannot be used ({_reason(error)})"
            remedy = "check its name, the credentials in the environment, and the network"
            raise Unreachable(f"{what}; {remedy}") from error


def _filesystem(url: str, scheme: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        if scheme in _PYARROW:
            return FileSystem.from_uri(_bounded(url, scheme))  # type: ignore[no-any-return]
        import fsspec

        files, path = fsspec.core.url_to_fs(url)
        return PyFileSystem(FSSpecHandler(files)), path
    except ImportError as error:
        raise InputError(f"{url}: {scheme} needs a package that is not there ({_reason(error)}); install it") from None
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{url}: cannot be used ({_reason(error)}); take s3://, gs://, file:// or a folder") from None


def _bounded(url: str, scheme: str) -> str:
    """Google's driver would try for 15 minutes."""
    if scheme not in ("gs", "gcs") or "retry_limit_seconds" in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="&".join(filter(None, [parts.query, "retry_limit_seconds=30"]))))


def _reason(error: BaseException) -> str:
    """One line, without what the environment keeps secret."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name, value in os.environ.items():
        if _SECRETS.search(name.upper()) and len(value) >= 8:
            text = text.replace(value, f"${name}")
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-150:]}"
