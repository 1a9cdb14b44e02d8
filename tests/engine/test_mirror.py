"""A run under a URL: what is pushed and pulled, and what a crash, damage or another machine makes of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustscale.engine import mirror as mirrors
from robustscale.engine.checkpoint import Store
from robustscale.engine.folder import RunFolder
from robustscale.engine.manifest import MANIFEST
from robustscale.engine.mirror import Mirror, MirroredStore
from robustscale.engine.remote import Remote, Unreachable
from robustscale.errors import InputError
from tests.engine.object_stores import KEYS, mirrored_in, s3_server, s3_url
from tests.engine.stores import check, groups, state

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for a run; the working copies of this machine lie in tmp_path."""
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    if request.param == "s3":
        for name, value in KEYS.items():
            monkeypatch.setenv(name, value)
        return s3_url(request.getfixturevalue("s3"), f"{tmp_path.name}/run")
    return f"{request.param}://{'/test' if request.param == 'memory' else ''}{tmp_path}/there/run"


def save(mirror: Mirror, step: int, keep: int = 2, keep_best: int = 0) -> Path:
    store = MirroredStore(mirror, mirror.local / "checkpoints", keep, keep_best)
    return store.save(step, groups(step), state(step))


def elsewhere(url: str, folder: Path, which: mirrors.Which = "all") -> Mirror:
    """The run, pulled to another machine."""
    with mirrored_in(folder):
        mirror = Mirror(url)
        mirror.pull(which)
    return mirror


def steps(mirror: Mirror) -> list[str]:
    return sorted(path.name for path in (mirror.local / "checkpoints").glob("step-*"))


# --- To and fro


def test_what_one_machine_pushed_another_pulls(url: str, tmp_path: Path) -> None:
    one = Mirror(url)
    one.pull()
    files = {"run.json": b"{}", "weights/best.safetensors": bytes(1000), "tensorboard/events": b""}
    for name, content in files.items():
        (one.local / name).parent.mkdir(parents=True, exist_ok=True)
        (one.local / name).write_bytes(content)
    save(one, 3)
    other = elsewhere(url, tmp_path / "other")
    assert other.local != one.local
    assert all((other.local / name).read_bytes() == content for name, content in files.items())
    assert check(other.local / "checkpoints") == 3


def test_only_what_changed_goes_over_the_wire(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, uploads, downloads = Mirror(url), [], []
    mirror.pull()
    upload, download = Remote.upload, Remote.download
    monkeypatch.setattr(Remote, "upload", lambda self, path, name: (uploads.append(name), upload(self, path, name)))
    monkeypatch.setattr(Remote, "download", lambda self, name, to: (downloads.append(name), download(self, name, to)))
    for name in ("a.json", "b.json"):
        (mirror.local / name).write_text("1")
    mirror.push()
    assert uploads == ["a.json", "b.json"]
    (mirror.local / "b.json").write_text("22")
    mirror.push()
    mirror.push()
    assert uploads == ["a.json", "b.json", "b.json"]
    mirror.pull()
    # fsspec's memory doesn't tell when a file was written.
    assert downloads == ([] if url.startswith(("s3", "file")) else ["a.json", "b.json"])


def test_result_is_pushed_when_all_else_is_there(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, uploads = Mirror(url), []
    mirror.pull()
    monkeypatch.setattr(Remote, "upload", lambda self, path, name: uploads.append(name))
    for name in ("result.json", "zebra.json", "a.json"):
        (mirror.local / name).write_text("1")
    mirror.push()
    assert uploads == ["a.json", "zebra.json", "result.json"]


def test_what_is_removed_here_is_removed_there_and_nothing_else(url: str, tmp_path: Path) -> None:
    one = Mirror(url)
    one.pull()
    for name in ("stale.png", "kept.json"):
        (one.local / name).write_text("1")
    one.push()
    other = elsewhere(url, tmp_path / "other")
    (other.local / "of the other.json").write_text("1")
    other.push()
    (one.local / "stale.png").unlink()
    one.push()
    assert sorted(Mirror(url).remote.list()) == ["kept.json", "of the other.json"]


def test_working_copy_that_is_removed_takes_nothing_with_it(url: str) -> None:
    """As by one who clears ~/.cache during a run of days."""
    mirror = Mirror(url)
    (mirror.local / "weights").mkdir(parents=True)
    (mirror.local / "run.json").write_text("{}")
    save(mirror, 1)
    mirror.pull("all")
    there = mirror.remote.list()
    shutil.rmtree(mirror.local)
    with pytest.raises(InputError, match=r"this working copy of .* was removed while it was in use"):
        mirror.push()
    with pytest.raises(InputError, match="was removed"):
        save(mirror, 2)
    assert mirror.remote.list() == there
    again = Mirror(url)
    with again._flock(mirrors.PULLING), pytest.raises(InputError, match="was removed"):
        mirror.push()  # while another process has begun to pull
    again.pull("all")
    assert mirror.remote.list() == there
    assert steps(again) == ["step-00000001"]


@pytest.mark.parametrize("url", ["s3://bucket/runs/x/..", "file:///runs/..", "s3://"])
def test_url_without_a_name_of_its_own(url: str) -> None:
    with pytest.raises(InputError, match="has no name of its own"):
        RunFolder(url)


def test_what_was_not_pushed_is_not_the_run(url: str) -> None:
    mirror = Mirror(url)
    mirror.pull()
    (mirror.local / "result.json").write_text("of a run that was killed before it was pushed")
    Store(mirror.local / "checkpoints", 2).save(9, groups(9), state(9))
    again = Mirror(url)
    again.pull("all")
    assert not (again.local / "result.json").exists()
    assert steps(again) == []


def test_names_of_one_machine_and_hostile_names_stay_where_they_are(url: str, tmp_path: Path) -> None:
    mirror = Mirror(url)
    mirror.pull()
    for name in (".lock", "ray/state", "stacks/rank-0.txt", "run.json"):
        (mirror.local / name).parent.mkdir(exist_ok=True)
        (mirror.local / name).write_text("1")
    mirror.push()
    assert list(mirror.remote.list()) == ["run.json"]
    mirror.pull()
    assert (mirror.local / "stacks/rank-0.txt").exists()
    for name in ("../out.json", "a/../../out.json", "/out.json", "a//out.json", "./out.json", ".lock"):
        assert not mirrors._mirrored(name)
    assert not (tmp_path / "out.json").exists()


def test_objects_whose_names_lead_out_of_the_copy_are_left_alone(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 takes any name."""
    for name, value in {**KEYS, "ROBUSTSCALE_MIRRORS": str(tmp_path / "here")}.items():
        monkeypatch.setenv(name, value)
    import boto3

    client = boto3.client("s3", endpoint_url=s3)
    for name in ("run.json", "../../out.json", "x/../../../out.json", "checkpoints/../../../out.json"):
        client.put_object(Bucket="runs", Key=f"hostile/run/{name}", Body=b"{}")
    client.close()
    mirror = Mirror(s3_url(s3, "hostile/run"))
    mirror.pull("all")
    found = [path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".")]
    assert found == ["run.json"]


# --- Checkpoints


def test_checkpoints_there_are_those_that_the_store_keeps(url: str) -> None:
    mirror = Mirror(url)
    mirror.pull("all")
    for step in (1, 2, 3, 4):
        save(mirror, step, keep=2, keep_best=1)
    found = {name.split("/")[1] for name in mirror.remote.list("checkpoints")}
    assert found == {"step-00000001", "step-00000003", "step-00000004"} == set(steps(mirror))


def test_pruning_goes_on_from_another_machine(url: str, tmp_path: Path) -> None:
    mirror = Mirror(url)
    mirror.pull("all")
    for step in (1, 2, 3):
        save(mirror, step, keep_best=1)
    other = elsewhere(url, tmp_path / "other")
    save(other, 4, keep_best=1)
    assert {name.split("/")[1] for name in other.remote.list("checkpoints")} == {
        f"step-0000000{step}" for step in (1, 3, 4)
    }


def test_all_checkpoints_are_pulled_or_none(url: str, tmp_path: Path) -> None:
    mirror = Mirror(url)
    mirror.pull("all")
    save(mirror, 1)
    save(mirror, 2)
    assert sorted(steps(elsewhere(url, tmp_path / "other", "all"))) == ["step-00000001", "step-00000002"]
    assert steps(elsewhere(url, tmp_path / "third", "none")) == []


def test_manifest_comes_last_and_goes_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for method in ("upload", "write", "remove"):
        real = getattr(Remote, method)

        def noted(self: Remote, *args: object, method: str = method, real=real) -> None:  # noqa: ANN001
            calls.append((method, next(str(a) for a in args[::-1] if isinstance(a, str))))
            real(self, *args)

        monkeypatch.setattr(Remote, method, noted)
    mirror = Mirror(url)
    mirror.pull("all")
    for step in (1, 2):
        save(mirror, step, keep=1)
    of_first = [(method, name.rpartition("/")[2]) for method, name in calls if "step-00000001" in name]
    assert of_first[:4] == [
        *(("upload", name) for name in ("model.safetensors", "optimizer.safetensors", "state.json")),
        ("write", MANIFEST),
    ]
    assert of_first[4] == ("remove", MANIFEST)
    assert len(of_first) == 8


@pytest.mark.parametrize("what", ["model.safetensors", "state.json", MANIFEST, "torn", "missing"])
def test_damaged_object_is_found_and_the_checkpoint_before_it_used(url: str, tmp_path: Path, what: str) -> None:
    mirror = Mirror(url)
    mirror.pull("all")
    for step in (1, 2):
        save(mirror, step)
    name = f"checkpoints/step-00000002/{'model.safetensors' if what in ('torn', 'missing') else what}"
    content = mirror.remote.read(name)
    if what == "missing":
        mirror.remote.remove(name)
    else:
        mirror.remote.write(name, content[:-1] if what == "torn" else content[:40] + b"#" + content[41:])
    other = elsewhere(url, tmp_path / "other", "all")
    with pytest.warns(UserWarning, match=r"step-00000002 is not used: .*; step-00000001 is used instead"):
        assert check(other.local / "checkpoints") == 1
    # Trained to that step again it is whole again, although its manifest is the same.
    save(other, 2)
    assert check(elsewhere(url, tmp_path / "third").local / "checkpoints") == 2


def test_damaged_working_copy_is_pulled_again(url: str) -> None:
    mirror = Mirror(url)
    mirror.pull("all")
    path = save(mirror, 1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"#")
    again = Mirror(url)
    again.pull("all")
    assert check(again.local / "checkpoints") == 1


PUSHER = """
import os, signal, sys
from pathlib import Path
from robustscale.engine.mirror import Mirror, MirroredStore
from robustscale.engine.remote import Remote
from tests.engine.stores import groups, state

url, count = sys.argv[1], int(sys.argv[2])
mirror = Mirror(url)
mirror.pull("all")
store = MirroredStore(mirror, mirror.local / "checkpoints", 1)
store.save(1, groups(1), state(1))

def counted(real):
    def call(*args):
        global count
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        count -= 1
        return real(*args)
    return call

for method in ("write", "upload", "remove", "found", "list"):
    setattr(Remote, method, counted(getattr(Remote, method)))
(mirror.local / "metrics.jsonl").write_text("up to step 2")
store.save(2, groups(2), state(2))
"""


@pytest.mark.parametrize("count", [3, 9])
def test_killed_in_mid_push_the_checkpoint_before_or_the_new_one_is_there(s3: str, tmp_path: Path, count: int) -> None:
    _killed_at(s3_url(s3, f"{tmp_path.name}/run"), tmp_path, count)


@pytest.mark.slow
def test_killed_before_each_request_of_a_push(s3: str, tmp_path: Path) -> None:
    for count in range(100):
        if not _killed_at(s3_url(s3, f"{tmp_path.name}/{count}"), tmp_path / str(count), count):
            assert count > 10
            return
    raise AssertionError("the push never ended")


def _killed_at(url: str, tmp_path: Path, count: int) -> bool:
    """Whether it was; then the run goes on from another machine, with a sound checkpoint and the metrics up to it."""
    env = os.environ | KEYS | {"ROBUSTSCALE_MIRRORS": str(tmp_path / "killed"), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", PUSHER, url, str(count)], env=env, timeout=120, check=False)
    assert ended.returncode in (0, -signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in KEYS.items():
            patch.setenv(name, value)
        other = elsewhere(url, tmp_path / "other")
        step = check(other.local / "checkpoints")
        assert step in (1, 2)
        assert step == 1 or (other.local / "metrics.jsonl").read_text() == "up to step 2"
        save(other, 2, keep=1)
        assert check(elsewhere(url, tmp_path / "third").local / "checkpoints") == 2
        assert len(other.remote.list("checkpoints")) == 4
    return ended.returncode != 0


# --- Several at once


def test_pull_leaves_alone_what_another_process_works_on(url: str, tmp_path: Path) -> None:
    worker = Mirror(url)
    worker.pull()
    (worker.local / "metrics.jsonl").write_text("1\n")
    worker.push()
    with worker.working("all", pushes=False):
        (worker.local / "metrics.jsonl").write_text("1\n2\n")
        (worker.local / "new.json").write_text("2")
        other = elsewhere(url, tmp_path / "other")
        (other.local / "evaluation.json").write_text("3")
        other.push()
        reader = Mirror(url)
        reader.pull()
        here = {path.name: path.read_text() for path in reader.local.iterdir() if path.name[0] != "."}
    assert here == {"metrics.jsonl": "1\n2\n", "new.json": "2", "evaluation.json": "3"}


def test_files_are_pushed_while_rank_0_works_and_at_its_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "EVERY", 0.05)
    mirror = Mirror(url)
    with mirror.working("none", pushes=True):
        (mirror.local / "metrics.jsonl").write_text("1\n")
        until = time.monotonic() + 20
        while mirror.remote.found("metrics.jsonl") is None and time.monotonic() < until:
            time.sleep(0.05)
        assert mirror.remote.read("metrics.jsonl") == b"1\n"
        monkeypatch.setattr(mirrors, "EVERY", 1000.0)
        time.sleep(0.2)
        (mirror.local / "result.json").write_text("{}")
    assert mirror.remote.read("result.json") == b"{}"


def test_attempt_that_was_cut_off_writes_no_checkpoint(url: str, tmp_path: Path) -> None:
    driver = Mirror(url)
    driver.pull()
    (driver.local / mirrors.WRITER).write_text('{"attempt": "one"}')
    driver.push()
    with mirrored_in(tmp_path / "worker"):
        rank = Mirror(url)
    with rank.working("all", pushes=False):
        save(rank, 1)
        (driver.local / mirrors.WRITER).write_text('{"attempt": "another"}')
        driver.push()
        (rank.local / "metrics.jsonl").write_text("of the first")
        with pytest.raises(InputError, match="another attempt has begun"):
            save(rank, 2)
    assert check(elsewhere(url, tmp_path / "third").local / "checkpoints") == 1
    assert rank.remote.found("metrics.jsonl") is None


def test_attempt_that_is_cut_off_in_mid_push_leaves_no_manifest(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, upload = Mirror(url), Remote.upload
    mirror.remote.write(mirrors.WRITER, b"one")

    def cut_off(self: Remote, path: Path, name: str) -> None:
        upload(self, path, name)
        self.write(mirrors.WRITER, b"another")

    monkeypatch.setattr(Remote, "upload", cut_off)
    with (
        mirror.working("all", pushes=False),
        pytest.raises(InputError, match="another attempt has begun"),
    ):
        save(mirror, 1)
    assert not mirror.has_checkpoint()


# --- What fails


def test_outage_is_waited_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "PATIENCE", 2.0)
    mirror, failing, write = Mirror(url), [True] * 2, Remote.write
    mirror.pull("all")

    def flaky(self: Remote, name: str, content: bytes) -> None:
        if failing:
            failing.pop()
            raise Unreachable(f"{self.url}: cannot be used (down)")
        write(self, name, content)

    monkeypatch.setattr(Remote, "write", flaky)
    with pytest.warns(UserWarning, match="down.*; trying for 2 s"):
        save(mirror, 1)
    assert not failing
    assert mirror.has_checkpoint()


def test_outage_without_an_end_is_told_with_the_copy_that_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    monkeypatch.setattr(mirrors, "PATIENCE", 0.3)
    mirror = Mirror(f"file://{tmp_path}/there/run")
    mirror.pull("all")
    (tmp_path / "there").write_text("no folder any more")
    with pytest.warns(UserWarning, match="trying for"), pytest.raises(InputError, match=r"tried for 0.3 s.*/here/"):
        save(mirror, 1)
    assert check(mirror.local / "checkpoints") == 1


def test_full_disk_under_the_working_copy_is_not_blamed_on_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").write_text("no folder")
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    with pytest.raises(InputError, match=r"here.*cannot be written \(.*ROBUSTSCALE_MIRRORS"):
        Mirror(f"file://{tmp_path}/there/run").pull()


# --- A run's folder


def test_run_folder_of_a_url_reads_and_writes_a_working_copy(url: str, tmp_path: Path) -> None:
    folder = RunFolder(url)
    with folder.locked():
        folder.pull()
        folder.write("run.json", {"name": "x"})
        folder.push()
    with mirrored_in(tmp_path / "other"):
        found = RunFolder.existing(url)
    assert found.where == url
    assert found.path.is_relative_to(tmp_path / "other")
    assert found.read("run.json") == {"name": "x"}
    assert not found.has_checkpoint()
    mirror = folder.mirror
    assert mirror is not None
    assert list(mirror.remote.list()) == ["run.json"]


def test_what_is_missing_is_made_under_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on in the working copy would be another one."""
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    folder = RunFolder(f"file://{tmp_path}/there/run")
    with pytest.raises(InputError, match=f"--resume file://{tmp_path}/there/run"):
        folder.read("result.json")


def test_a_store_that_stops_answering_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))

    def down(self: Remote, folder: str = "") -> None:
        raise Unreachable(f"{self.url}: cannot be used (down)")

    monkeypatch.setattr(Remote, "list", down)
    with pytest.raises(InputError, match=r"cannot be used \(down\)"):
        RunFolder(f"file://{tmp_path}/there/run").has_checkpoint()


def test_folder_under_a_url_that_is_no_run_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="not a run's folder"):
        RunFolder.existing(url)


def test_file_that_takes_another_s_place_during_a_push_is_pushed_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, as weights are."""
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    mirror, utime = Mirror(f"file://{tmp_path}/there/run"), os.utime
    mirror.pull()
    path = mirror.local / "best.safetensors"
    path.write_text("one")

    def meanwhile(place: int | Path, ns: tuple[int, int]) -> None:
        monkeypatch.setattr(os, "utime", utime)
        beside = path.with_name(".tmp")
        beside.write_text("two")
        beside.replace(path)
        utime(place, ns=ns)

    monkeypatch.setattr(os, "utime", meanwhile)
    mirror.push()
    mirror.push()
    assert mirror.remote.read("best.safetensors") == b"two"


def test_pushes_of_two_threads_do_not_meet(url: str) -> None:
    mirror = Mirror(url)
    mirror.pull("all")
    stop = threading.Event()

    def push_on() -> None:
        while not stop.is_set():
            mirror.push()

    thread = threading.Thread(target=push_on)
    thread.start()
    for step in range(1, 6):
        (mirror.local / "metrics.jsonl").write_text(f"up to {step}")
        save(mirror, step)
    stop.set()
    thread.join(20)
    assert mirror.remote.read("metrics.jsonl") == b"up to 5"
    assert {name.split("/")[1] for name in mirror.remote.list("checkpoints")} == {"step-00000004", "step-00000005"}
