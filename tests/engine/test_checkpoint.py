"""The store must give the old state or the new one, whatever happens to the process, the disk or the files.

Run as a script (`python test_checkpoint.py FOLDER`) it is the crash test's driver: it forks a child for every
file-system operation of a save, which dies there, and prints what the store held afterwards, as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustscale.engine.checkpoint import Store
from robustscale.engine.manifest import Broken, verify
from robustscale.engine.optim import SGD, AdamW
from robustscale.engine.tensors import flatten_optimizer, restore_optimizer
from robustscale.errors import Diverged, InputError
from robustscale.noise import Noise
from robustscale.types import Optimizer

Groups = dict[str, dict[str, Tensor]]


def groups(step: int, size: int = 300) -> Groups:
    weights = Noise.of(step, torch.arange(2), "weights").normal(size)
    model = {"conv.weight": weights, "steps": torch.tensor(step)}
    return {"model": model, "optimizer": {"0.momentum_buffer": weights / 3}}


def state(step: int) -> dict[str, Any]:
    return {"position": {"epoch": step // 10, "step": step}, "best": None, "lr": 0.1 / 3}


def save(root: Path, step: int, keep: int = 2) -> Path:
    return Store(root, keep).save(step, groups(step), state(step))


def check(root: Path) -> int:
    """The step that the store gives, after comparing all of it with what was saved."""
    saved = Store(root, 2).latest()
    assert saved is not None
    assert saved.state == state(saved.step)
    for group, tensors in groups(saved.step).items():
        found = saved.tensors(group)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    return saved.step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# --- Saving and reading


def test_empty_store_has_no_latest(tmp_path: Path) -> None:
    assert Store(tmp_path / "none", 1).latest() is None


def test_save_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    folder = save(root, 120)
    assert folder == root / "step-00000120"
    assert names(folder) == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert check(root) == 120


def test_manifest_states_size_and_hash_of_every_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    manifest = json.loads((folder / "MANIFEST.json").read_bytes())
    assert (manifest["schema"], manifest["step"], manifest["parent"]) == (1, 2, 1)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        content = (folder / name).read_bytes()
        assert manifest["files"][name] == [len(content), hashlib.sha256(content).hexdigest()]
    assert len(manifest["files"]) == 3


def test_equal_state_makes_equal_bytes(tmp_path: Path) -> None:
    for root in ("a", "b"):
        save(tmp_path / root, 5)
    for file in (tmp_path / "a/step-00000005").iterdir():
        assert file.read_bytes() == (tmp_path / "b/step-00000005" / file.name).read_bytes()


def test_tied_viewed_strided_and_empty_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    image = base.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    tensors = {"a": base, "tied": base, "view": base[3:9], "image": image, "t": base.view(4, 6).t(), "e": base[:0]}
    tensors |= {"bool": base > 3, "bf16": base.bfloat16(), "scalar": base.double()[3]}
    Store(tmp_path, 1).save(1, {"model": tensors, "nothing": {}}, {})
    saved = Store(tmp_path, 1).latest()
    assert saved is not None and saved.tensors("nothing") == {}
    for name, found in saved.tensors("model").items():
        assert found.dtype == tensors[name].dtype and torch.equal(found, tensors[name])


def test_a_later_change_does_not_reach_what_was_read(tmp_path: Path) -> None:
    save(tmp_path, 1)
    saved = Store(tmp_path, 1).latest()
    assert saved is not None
    model = saved.path / "model.safetensors"
    flip_bit(model, 8 * model.stat().st_size - 4)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged.*remove this folder"):
        saved.tensors("model")
    with pytest.raises(InputError, match=r"has no ema\.safetensors, only model\.safetensors"):
        saved.tensors("ema")


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_newest_are_kept(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path, keep)
    steps = (3, 20, 100, 1000, 99_999_999, 100_000_000)
    for step in steps:
        store.save(step, groups(step), state(step))
    assert {int(name.removeprefix("step-")) for name in names(tmp_path)} == set(steps[-keep:])
    assert check(tmp_path) == 100_000_000


def test_only_verified_ones_count_as_kept(tmp_path: Path) -> None:
    store = Store(tmp_path, 2)
    for step in (1, 2, 3):
        store.save(step, groups(step), state(step))
    # The same instance: that it saw step 3 whole must not count once the file has changed.
    flip_bit(tmp_path / "step-00000003" / "model.safetensors", 8000)
    store.save(4, groups(4), state(4))
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    shutil.rmtree(tmp_path / "step-00000004")
    with pytest.warns(UserWarning, match="step-00000002 is used instead"):
        assert check(tmp_path) == 2


def test_saving_again_leaves_what_verifies(tmp_path: Path) -> None:
    before = save(tmp_path, 7).stat()
    Store(tmp_path, 2).save(7, groups(8), state(8))
    assert (tmp_path / "step-00000007").stat().st_ino == before.st_ino
    assert check(tmp_path) == 7


def test_saving_again_moves_aside_what_does_not(tmp_path: Path) -> None:
    save(tmp_path, 6)
    flip_bit(save(tmp_path, 7) / "state.json", 9)
    save(tmp_path, 7)
    assert check(tmp_path) == 7
    (aside,) = tmp_path.glob(".corrupt-step-00000007-*")
    assert (aside / "state.json").is_file()
    for step in (8, 9):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000008", "step-00000009"], "kept aside only as long as its neighbours"


def test_unfinished_work_and_nothing_else_is_tidied_up(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0").mkdir()
    (tmp_path / ".tmp-0" / "model.safetensors").write_bytes(b"half")
    for other in ("step-1", "notes", "step-00000001-old"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-00000900").write_text("a file, not a folder")
    for step in (1, 2, 3):
        save(tmp_path, step)
    kept = ["notes", "step-00000001-old", "step-00000002", "step-00000003", "step-00000900", "step-1"]
    assert names(tmp_path) == kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    save(tmp_path, 1)
    tensors = groups(2)
    tensors["optimizer"]["0.momentum_buffer"][1, 7] = value
    with pytest.raises(Diverged, match=r"step 2: optimizer 0\.momentum_buffer is not finite"):
        Store(tmp_path, 2).save(2, tensors, state(2))
    with pytest.raises(Diverged, match="step 2: the state holds a number that is not finite"):
        Store(tmp_path, 2).save(2, groups(2), {"scale": value})
    assert names(tmp_path) == ["step-00000001"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep: 0 is below 1"):
        Store(tmp_path, 0)
    for group in ("../model", "Model", "", "a.b"):
        with pytest.raises(InputError, match=r"group: .* will not do"):
            Store(tmp_path, 1).save(1, {group: {}}, {})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be read .*give a folder"):
        Store(tmp_path / "file", 1).latest()


# --- Damage


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def mutant(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    at = int(rng.integers(len(content)))
    kind = rng.integers(6)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        page = at // 512 * 512
        return content[:page] + bytes(len(content[page : page + 512])) + content[page + 512 :]
    if kind == 3:
        return content + content[:at] + b" "
    if kind == 4:
        return content[:at] + content[at + 1 :]
    return others[int(rng.integers(len(others)))]


def test_no_mutant_is_accepted(tmp_path: Path) -> None:
    """Bit flips, truncation, zeroed pages, growth, lost bytes, swapped files, other steps' and other runs' files."""
    save(tmp_path / "run", 1)
    newest = save(tmp_path / "run", 2)
    Store(tmp_path / "other", 1).save(2, groups(9), state(9))
    files = sorted(newest.iterdir())
    pool = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    rng, tried = np.random.default_rng(0), 0
    for file in files:
        foreign = sorted({content for content in pool.values() if content != pool[file]})
        for _ in range(200):
            content = mutant(rng, pool[file], foreign)
            if content == pool[file]:
                continue
            tried += 1
            file.write_bytes(content)
            # A whole manifest of another run speaks of other contents: the first of those is named then.
            named = r"\w+\.\w+" if file.name == "MANIFEST.json" else file.name
            with pytest.warns(UserWarning, match=rf"step-00000002 is not used: {named} .*step-00000001 is used"):
                assert check(tmp_path / "run") == 1
        file.write_bytes(pool[file])
    assert tried >= 700
    assert check(tmp_path / "run") == 2


def test_missing_files_pipes_and_links_are_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    for file in sorted(newest.iterdir()):
        moved = tmp_path / file.name
        file.rename(moved)
        for replace in (lambda file: None, os.mkfifo, Path.mkdir, functools.partial(os.symlink, moved)):
            replace(file)
            with pytest.warns(UserWarning, match=rf"{file.name} (is not a regular file|cannot be read)"):
                assert check(tmp_path) == 1
            if file.is_dir():
                file.rmdir()
            else:
                file.unlink(missing_ok=True)
        moved.rename(file)
    assert check(tmp_path) == 2


def test_a_link_to_a_checkpoint_is_not_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / folder.name).symlink_to(folder)
    assert Store(tmp_path / "b", 1).latest() is None


def test_all_damaged(tmp_path: Path) -> None:
    for folder in [save(tmp_path, 1), save(tmp_path, 2)]:
        flip_bit(folder / "state.json", 0)
    with pytest.warns(UserWarning, match="no other is left, training starts anew") as caught:
        assert Store(tmp_path, 2).latest() is None
    assert len(caught) == 2


def sealed(body: dict[str, Any]) -> bytes:
    def to_json(value: object) -> bytes:
        return json.dumps(value, indent=1).encode()

    return to_json({**body, "digest": hashlib.sha256(to_json(body)).hexdigest()})


def forge(folder: Path, **changes: object) -> None:
    """A manifest with a right digest: the digest is no secret."""
    body = json.loads((folder / "MANIFEST.json").read_bytes())
    del body["digest"]
    (folder / "MANIFEST.json").write_bytes(sealed({**body, **changes}))


def test_forging_keeps_a_manifest_whole(tmp_path: Path) -> None:
    forge(save(tmp_path, 2))
    assert check(tmp_path) == 2


@pytest.mark.parametrize("name", ["../secret.json", "/etc/passwd", "MODEL.safetensors", "model.pt", "a/b.json", ""])
def test_manifest_may_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (tmp_path / "secret.json").write_bytes(b"{}")
    files = json.loads((folder / "MANIFEST.json").read_bytes())["files"]
    forge(folder, files={**files, name: [2, hashlib.sha256(b"{}").hexdigest()]})
    with pytest.warns(UserWarning, match=r"MANIFEST\.json is damaged, or of another checkpoint"):
        assert check(tmp_path) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 1},
        {"step": "2"},
        {"step": None},
        {"files": []},
        {"files": {}},
        {"files": {"state.json": 3}},
        {"files": {"state.json": [1, "a", "b"]}},
        {"files": {"state.json": [-1, None]}},
        {"files": None},
    ],
)
def test_forged_manifest_is_damage(tmp_path: Path, changes: dict[str, object]) -> None:
    save(tmp_path, 1)
    forge(save(tmp_path, 2), **changes)
    with pytest.warns(UserWarning, match="step-00000001 is used instead"):
        assert check(tmp_path) == 1


@pytest.mark.parametrize(
    "content", [b"[]x", b"[1]", b"3", b"null", b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b" " * 2**21]
)
def test_manifest_that_is_no_mapping_is_damage(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "MANIFEST.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"MANIFEST\.json .*step-00000001 is used instead"):
        assert check(tmp_path) == 1


@pytest.mark.parametrize("content", [b"[1]", b"[" * 100_000, b"{", b"\xff"])
def test_state_that_is_no_mapping_is_damage(tmp_path: Path, content: bytes) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    (folder / "state.json").write_bytes(content)
    files = json.loads((folder / "MANIFEST.json").read_bytes())["files"]
    forge(folder, files={**files, "state.json": [len(content), hashlib.sha256(content).hexdigest()]})
    with pytest.warns(UserWarning, match=r"state\.json is no mapping; step-00000001 is used instead"):
        assert check(tmp_path) == 1


def test_tensors_that_are_no_safetensors_are_refused_in_a_line(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    content = b"\x80\x04cos\nsystem\n"
    (folder / "model.safetensors").write_bytes(content)
    files = json.loads((folder / "MANIFEST.json").read_bytes())["files"]
    forge(folder, files={**files, "model.safetensors": [len(content), hashlib.sha256(content).hexdigest()]})
    saved = Store(tmp_path, 1).latest()
    assert saved is not None
    with pytest.raises(InputError, match=r"step-00000002: .*remove this folder"):
        saved.tensors("model")


@pytest.mark.parametrize("maker", ["version", "program"])
def test_other_versions_and_programs_are_refused_and_left_alone(tmp_path: Path, maker: str) -> None:
    save(tmp_path, 1)
    folder = save(tmp_path, 2)
    if maker == "version":
        forge(folder, schema=2, invented_later=True)
    else:
        (folder / "state.json").unlink()
        (folder / "MANIFEST.json").write_bytes(b'{"format": "somebody else"}')
    for use in (Store(tmp_path, 2).latest, lambda: save(tmp_path, 2), lambda: save(tmp_path, 3)):
        with pytest.raises(InputError, match=r"made by another program or version .*take another run name"):
            use()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


# --- A disk that fails


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_writes_that_fail_at_any_offset_leave_the_last_good_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    largest = max(file.stat().st_size for file in folder.iterdir())
    for size in np.linspace(0, largest - 1, 60, dtype=int).tolist():
        with file_size_limit(size), pytest.raises(InputError, match=r"step 2 cannot be written .*step 1, is intact"):
            save(tmp_path, 2, keep=1)
        assert names(tmp_path) == ["step-00000001"]
    assert check(tmp_path) == 1
    with file_size_limit(0), pytest.raises(InputError, match="none was there before; free space"):
        save(tmp_path / "new", 1)
    with file_size_limit(largest + 1000):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["new", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk(small_disk: Path) -> None:
    root = small_disk / "checkpoints"
    large = functools.partial(groups, size=4000)
    assert Store(root, 1).save(1, large(1), state(1))
    with pytest.raises(InputError, match=r"No space left on device.*step 1, is intact; free space"):
        Store(root, 1).save(2, large(2), state(2))
    # Space runs out at every page of a file in turn.
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    for filler in range(free, 0, -4096):
        (small_disk / "filler").write_bytes(bytes(filler))
        with pytest.raises(InputError, match="No space left on device"):
            Store(root, 1).save(2, large(2), state(2))
        assert names(root) == ["step-00000001"]
    (small_disk / "filler").unlink()
    # What a killed attempt left may be all the space there is.
    (root / ".tmp-killed").mkdir()
    (root / ".tmp-killed" / "model.safetensors").write_bytes(bytes(free - 8192))
    save(root, 2, keep=1)
    assert names(root) == ["step-00000002"] and check(root) == 2
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"Read-only file system.*step 2, is intact"):
        save(root, 3)
    assert check(root) == 2


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unreadable_is_not_damaged() -> None:
    """To fall back, or to start anew, because of a wrong mode would throw the run's progress away."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        root = Path(place) / "checkpoints"
        save(root, 1)
        newest = save(root, 2)
        for secret in (newest / "model.safetensors", newest, root):
            mode = secret.stat().st_mode
            secret.chmod(0)
            with ordinary_user(), pytest.raises(InputError, match=r"(may not be|cannot be) read.* this user"):
                Store(root, 2).latest()
            secret.chmod(mode)
        if os.geteuid() == 0:
            with ordinary_user(), pytest.raises(InputError, match=r"step 2, is intact; free space or make .* writable"):
                save(root, 3)
        assert check(root) == 2


# --- A process that dies


class Dying:
    """Counts the operations that change the disk and ends the process at the k-th.

    after: once it is done, which is also before the next. half: of a write, half is done. power: before it, and what
    was not synced is lost: the content of files, and the entries of folders.
    """

    def __init__(self, k: int, mode: str) -> None:
        self.k, self.mode, self.count = k, mode, 0
        self.unsynced: set[Path] = set()
        self.entries: set[Path] = set()
        for name in ("open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"):
            setattr(os, name, functools.partial(self.run, name, getattr(os, name)))

    def run(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "open" and not args[1] & os.O_CREAT:
            return call(*args, **kwargs)
        self.count += 1
        if self.count == self.k:
            if self.mode == "after":
                call(*args, **kwargs)
            elif self.mode == "half" and name == "write":
                call(args[0], args[1][: len(args[1]) // 2])
            elif self.mode == "power":
                self.lose_power()
            os._exit(9)
        result = call(*args, **kwargs)
        self.track(name, args)
        return result

    def track(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("open", "mkdir"):
            self.entries.add(Path(args[0]))
        elif name == "write":
            self.unsynced.add(Path(f"/proc/self/fd/{args[0]}").readlink())
        elif name == "fsync":
            synced = Path(f"/proc/self/fd/{args[0]}").readlink()
            self.unsynced.discard(synced)
            self.entries = {path for path in self.entries if path.parent != synced}
        elif name == "rename":
            source, target = map(Path, args)
            for paths in (self.unsynced, self.entries):
                moved = {path for path in paths if path.is_relative_to(source)}
                paths -= moved
                paths |= {target / path.relative_to(source) for path in moved}

    def lose_power(self) -> None:
        self.k = -1
        for path in self.unsynced:
            os.truncate(path, path.stat().st_size // 2)
        for path in self.entries:
            if path.is_file() and path not in self.unsynced:
                path.unlink()


def prepare(root: Path, scene: str) -> int:
    """A store before the save of step 30; returns the step that it gives."""
    keep = 1 if scene == "keep 1" else 2
    save(root, 10, keep)
    save(root, 20, keep)
    (root / ".tmp-old").mkdir()
    (root / ".tmp-old" / "model.safetensors").write_bytes(b"half")
    if scene == "damaged":
        flip_bit(save(root, 30, keep) / "model.safetensors", 7000)
        save(root, 20, keep)
    return 20


def verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except Broken:
        return False
    return True


def crash(root: Path, scene: str, k: int, mode: str) -> dict[str, Any]:
    """Save step 30 in a child that dies at operation k; what the store gives then, and after another save."""
    keep = 1 if scene == "keep 1" else 2
    prepare(root, scene)
    child = os.fork()
    if child == 0:
        Dying(k, mode)
        save(root, 30, keep)
        os._exit(0)
    died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = check(root)
    result = {"scene": scene, "k": k, "mode": mode, "died": died, "given": given, "warnings": len(caught)}
    result["broken"] = [folder.name for folder in root.glob("step-*") if not verifies(folder)]
    save(root, 40, keep)
    result |= {"then": check(root), "folders": names(root)}
    shutil.rmtree(root)
    return result


def drive(place: Path) -> None:
    for scene in ("keep 1", "damaged"):
        for mode in ("half", "after", "power"):
            k, died = 0, True
            while died:
                k += 1
                result = crash(place / "checkpoints", scene, k, mode)
                died = result["died"]
                print(json.dumps(result))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs take a disk minutes, and decide nothing here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        yield Path(place)


def test_dying_at_any_operation_leaves_the_old_state_or_the_new(memory: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, __file__, str(memory)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    driver = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=root, env=environment)
    assert driver.returncode == 0, driver.stderr
    results = [json.loads(line) for line in driver.stdout.splitlines()]
    for result in results:
        assert result["given"] in (20, 30), result
        assert result["given"] == 30 or result["died"], result
        assert result["then"] == 40, result
        steps = [folder for folder in result["folders"] if not folder.startswith(".corrupt-")]
        assert [folder for folder in steps if folder.startswith(".tmp-")] == [], result
        # What a damaged step 30 leaves is dropped with its neighbours.
        assert len(steps) <= (1 if result["scene"] == "keep 1" else 3 if result["scene"] == "damaged" else 2), result
        assert result["broken"] in ([], ["step-00000030"] * (result["scene"] == "damaged")), result
        assert result["warnings"] <= (result["scene"] == "damaged"), result
    for mode in ("half", "after", "power"):
        reached = [r for r in results if r["mode"] == mode and r["scene"] == "keep 1" and r["died"]]
        assert len(reached) >= 20
        assert {r["given"] for r in reached} == {20, 30}, "both sides of the commit were reached"


# --- Optimizers


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = Noise.of(step, torch.arange(4), "x").uniform(3, 5, 5)
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def network() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2), nn.Linear(2, 2))
    for i, p in enumerate(net.parameters()):
        p.data = Noise.of(0, torch.arange(p.numel()), "init", i).normal().view(p.shape) / 4
    net[3].requires_grad_(False)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "config", [SGD(), SGD(nesterov=True), SGD(momentum=0.0), AdamW(lr=0.01, betas=(0.8, 0.9)), AdamW()], ids=str
)
def test_optimizer_goes_on_bit_for_bit(tmp_path: Path, config: Optimizer) -> None:
    twin, net = network(), network()
    ours, fresh = config.build(list(twin.parameters())), config.build(list(net.parameters()))
    train(twin, ours, range(3))
    ours.param_groups[0]["lr"] = 0.05 / 3
    tensors, plain = flatten_optimizer(ours)
    Store(tmp_path, 1).save(3, {"model": twin.state_dict(), "optimizer": tensors}, plain)
    saved = Store(tmp_path, 1).latest()
    assert saved is not None
    net.load_state_dict(saved.tensors("model"))
    restore_optimizer(fresh, saved.tensors("optimizer"), saved.state)
    assert fresh.param_groups[0].keys() == ours.param_groups[0].keys()
    for key, value in ours.param_groups[0].items():
        if key != "params":
            assert fresh.param_groups[0][key] == value and type(fresh.param_groups[0][key]) is type(value)
    for _ in range(2):
        again, _ = flatten_optimizer(fresh)
        now, _ = flatten_optimizer(ours)
        assert again.keys() == now.keys()
        for key, value in now.items():
            assert again[key].dtype == value.dtype and torch.equal(again[key], value)
        train(twin, ours, range(3, 6))
        train(net, fresh, range(3, 6))
        assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), net.parameters(), strict=True))


def test_restoring_copies() -> None:
    net, other = network(), network()
    ours, fresh = SGD().build(list(net.parameters())), SGD().build(list(other.parameters()))
    train(net, ours, range(1))
    tensors, plain = flatten_optimizer(ours)
    restore_optimizer(fresh, tensors, plain)
    before = tensors["0.momentum_buffer"].clone()
    train(other, fresh, range(1))
    assert torch.equal(flatten_optimizer(ours)[0]["0.momentum_buffer"], before)


def test_state_of_another_optimizer_is_refused() -> None:
    ours = SGD().build(list(network().parameters()))
    smaller = SGD().build(list(network().parameters())[:2])
    with pytest.raises(InputError, match=r"checkpoint: made with another optimizer or network .*take another run name"):
        restore_optimizer(ours, *flatten_optimizer(smaller))


if __name__ == "__main__":
    torch.set_num_threads(1)
    drive(Path(sys.argv[1]))
