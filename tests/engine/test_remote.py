"""URLs, and one clear line for what can't be reached. What lies under them: test_mirror.py."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustscale.engine import remote as remotes
from robustscale.engine.remote import Found, Remote, Unreachable, is_url, joined, name_in
from robustscale.errors import InputError
from tests.engine.object_stores import KEYS, s3_server, s3_url


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["file", "memory", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "s3":
        return Remote(s3_url(request.getfixturevalue("s3"), tmp_path.name))
    return Remote(f"{request.param}://{'/test' if request.param == 'memory' else ''}{tmp_path}/there")


def test_objects_are_written_found_read_and_removed(remote: Remote, tmp_path: Path) -> None:
    assert remote.list() == {} == remote.list("a")
    (tmp_path / "source").write_bytes(b"12")
    remote.upload(tmp_path / "source", "a/b/c.bin")
    remote.write("d.json", b"1")
    remote.write("d.json", b"345")
    assert {name: found.size for name, found in remote.list().items()} == {"a/b/c.bin": 2, "d.json": 3}
    assert list(remote.list("a")) == ["a/b/c.bin"]
    assert remote.found("d.json") == remote.list()["d.json"]
    assert remote.found("none") is None
    assert remote.read("d.json", 2) == b"34"
    remote.download("a/b/c.bin", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"12"
    for _ in range(2):
        remote.remove("a/b/c.bin")
    remote.remove_folder("a")
    remote.remove_folder("a")
    assert list(remote.list()) == ["d.json"]
    for missing in (lambda: remote.read("none"), lambda: remote.download("none", tmp_path / "x")):
        with pytest.raises(FileNotFoundError):
            missing()


def test_probe_leaves_nothing(remote: Remote) -> None:
    remote.require_usable()
    assert remote.list() == {}


def test_large_object_is_whole(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 50_000
    (tmp_path / "large").write_bytes(content)
    monkeypatch.setattr(remotes, "_PIECE", 1_000_003)
    remote.upload(tmp_path / "large", "large")
    remote.download("large", tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == content
    assert remote.found("large") == Found(len(content), remote.list()["large"].mtime_ns)


def test_file_is_replaced_in_one_go(tmp_path: Path) -> None:
    """A reader holds the old one."""
    remote = Remote(f"file://{tmp_path}")
    remote.write("a.json", b"old")
    with (tmp_path / "a.json").open("rb") as reader:
        remote.write("a.json", b"new")
        assert reader.read() == b"old"
    assert list(remote.list()) == ["a.json"]


def test_names_and_queries() -> None:
    assert is_url("s3://b") and is_url("S3://b")  # a folder of that name is never meant
    assert is_url("file:///x")
    assert not any(map(is_url, ("runs", "/a/b", "~/x", "a:b", "C://x", "./s3://b", Path("runs"))))
    assert joined("s3://b/p/?scheme=http", "run") == "s3://b/p/run?scheme=http"
    assert joined("s3://b", "run") == "s3://b/run"
    assert joined("/a/b", "run") == "/a/b/run"
    assert name_in("s3://b/p/run?scheme=http") == "run" == name_in("a/run/")


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://key:secret-of-mine@bucket/runs", r"s3://\.\.\.@bucket: .*must hold no credentials"),
        ("s3://secret-of-mine@bucket/runs", r"s3://\.\.\.@bucket: .*must hold no credentials"),
        ("s3://bucket/runs?colour=red", "Unexpected query parameter"),
        ("nonsense://bucket/runs", "Protocol not known: nonsense.*take s3://"),
        ("file:///proc/runs", "/proc/runs.*check its name"),
        pytest.param(
            "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http",
            "connect.*check its name, the credentials",
            marks=pytest.mark.slow,
        ),
        ("gs://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1", "check its name"),
    ],
)
def test_what_cannot_be_used_is_one_line(url: str, message: str) -> None:
    begun = time.monotonic()
    with pytest.raises(InputError, match=message) as error:
        Remote(url).require_usable()
    assert "\n" not in str(error.value)
    assert "secret-of-mine" not in str(error.value)
    assert time.monotonic() - begun < 60


def test_missing_bucket_is_one_line(s3: str) -> None:
    with pytest.raises(InputError, match=r"NO_SUCH_BUCKET.*check its name"):
        Remote(s3_url(s3, "x").replace("//runs/", "//no-such-bucket/")).require_usable()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(InputError, match=r"sftp needs a package that is not there .*paramiko"):
        Remote("sftp://host/runs").require_usable()


def test_secrets_of_the_environment_are_not_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_ACCESS_KEY", "AKIA-not-for-eyes")
    with pytest.raises(Unreachable, match=r"\$SOME_ACCESS_KEY is wrong") as error, Remote("file:///x")._told():
        raise OSError("key AKIA-not-for-eyes\n is wrong")
    assert "AKIA" not in str(error.value)


def test_google_is_not_waited_for_a_quarter_of_an_hour() -> None:
    assert remotes._bounded("gs://b/x?scheme=http", "gs") == "gs://b/x?scheme=http&retry_limit_seconds=30"
    assert remotes._bounded("gs://b/x", "gs") == "gs://b/x?retry_limit_seconds=30"
    assert remotes._bounded("gs://b/x?retry_limit_seconds=9", "gs") == "gs://b/x?retry_limit_seconds=9"
    assert remotes._bounded("s3://b/x", "s3") == "s3://b/x"
