"""What a checkpoint store holds, keeps and refuses. Crashes and failing disks: test_store_crashes.py."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import nn

from robustscale.engine.checkpoint import Store
from robustscale.engine.optim import SGD, AdamW
from robustscale.engine.tensors import flatten_optimizer, restore_optimizer, serialize
from robustscale.errors import Diverged, InputError
from robustscale.noise import Noise
from robustscale.types import Optimizer
from tests.engine.stores import check, flip_bit, groups, names, save, state

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
    last = torch.zeros(2**20 + 5)
    last[-1] = value
    with pytest.raises(Diverged, match="step 2: model w is not finite"):
        Store(tmp_path, 2).save(2, {"model": {"w": last}}, {})
    assert names(tmp_path) == ["step-00000001"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep: 0 is below 1"):
        Store(tmp_path, 0)
    with pytest.raises(InputError, match="keep_best: -1 is negative"):
        Store(tmp_path, 1, -1)
    for group in ("../model", "Model", "", "a.b"):
        with pytest.raises(InputError, match=r"group: .* will not do"):
            Store(tmp_path, 1).save(1, {group: {}}, {})
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be read .*give a folder"):
        Store(tmp_path / "file", 1).latest()


# --- The best


def steps(root: Path) -> list[int]:
    return [int(name.removeprefix("step-")) for name in names(root)]


@pytest.mark.parametrize(
    "keep, keep_best, scores, kept",
    [
        (1, 1, [0.1, 0.3, 0.2, 0.0], [2, 4]),
        (1, 1, [0.1, 0.2, 0.3], [3]),  # the newest is the best
        (1, 2, [0.1, 0.3, 0.2, 0.0], [2, 3, 4]),
        (2, 1, [0.5, None, 0.4, 0.2, None], [1, 4, 5]),
        (1, 1, [0.3, 0.3, 0.3, 0.1], [3, 4]),  # of equal ones the later
        (1, 1, [None, "0.9", [1], {}, 0.1, None], [5, 6]),
        (1, 3, [1, 0, -1.5, None, None], [1, 2, 3, 5]),
        (1, 0, [0.9, 0.1], [2]),
    ],
)
def test_best_are_kept_besides_the_newest(
    tmp_path: Path, keep: int, keep_best: int, scores: list[object], kept: list[int]
) -> None:
    for step, score in enumerate(scores, 1):
        # A store of its own each time, as after a restart: scores are known from the files alone.
        Store(tmp_path, keep, keep_best).save(step, groups(step), {"score": score} if score is not None else {})
    assert steps(tmp_path) == kept


def test_a_damaged_one_is_not_the_best(tmp_path: Path) -> None:
    store = Store(tmp_path, 1, 1)
    for step, score in ((1, 0.2), (2, 0.9), (3, 0.1)):
        store.save(step, groups(step), {"score": score})
    flip_bit(tmp_path / "step-00000002" / "model.safetensors", 8000)
    store.save(4, groups(4), {"score": 0.0})
    assert steps(tmp_path) == [3, 4]


def test_a_forged_score_is_none(tmp_path: Path) -> None:
    """Python's JSON reads what is no JSON, and integers that are no floats."""
    for step, score in ((1, b"NaN"), (2, b"Infinity"), (3, b"9" * 400), (4, b"0.5"), (5, b"null")):
        folder = Store(tmp_path, 9).save(step, {}, {})
        content = b'{"score": ' + score + b"}"
        (folder / "state.json").write_bytes(content)
        forge(folder, files={"state.json": [len(content), hashlib.sha256(content).hexdigest()]})
    Store(tmp_path, 1, 2).save(6, {}, {})
    assert steps(tmp_path) == [3, 4, 6]


# --- Beside training


def test_reading_while_a_thread_saves(tmp_path: Path) -> None:
    """With one kept, what a reader looks at is pruned under its eyes: no reason to warn, or to start anew."""
    save(tmp_path, 1, keep=1)
    store = Store(tmp_path, 1)
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: [store.save(step, groups(step), state(step)) for step in range(2, 100)])
        seen = []
        while not writing.done():
            saved = Store(tmp_path, 1).latest()
            seen.append(0 if saved is None else saved.step)
        writing.result()
    assert 0 not in seen and seen == sorted(seen) and len(set(seen)) > 10
    assert check(tmp_path) == 99


def test_a_copied_state_is_not_copied_again(tmp_path: Path) -> None:
    """Nor by reading it back, which each save does before it prunes."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    tensors = {"model": {f"{i}.weight": torch.full((2**22,), float(i)) for i in range(8)}}  # 128 MiB
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = peak()
    Store(tmp_path, 1).save(1, tensors, {})
    assert Store(tmp_path, 1).latest() is not None
    assert peak() - before < 32 * 1024


def test_file_is_what_the_library_reads_wherever_the_values_lie(tmp_path: Path) -> None:
    tensors = {
        "half": torch.arange(3, dtype=torch.float16),
        "flag": torch.tensor([True, False, True]),
        "wide": torch.arange(5, dtype=torch.float64),
        "count": torch.tensor(7),
        'a\u00e9"': torch.arange(6.0).view(2, 3).requires_grad_(),
        "small": torch.arange(3, dtype=torch.uint8),
        "int": torch.arange(-3, 3, dtype=torch.int16).view(3, 2).t(),
        "none": torch.zeros(0, 4),
        "brain": torch.arange(4).to(torch.bfloat16),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(serialize(tensors, "")))
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor.detach())
    # Aligned: a reader that maps the file may use the values where they lie.
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    assert size % 8 == 0
    assert all(entry["data_offsets"][0] % tensors[name].element_size() == 0 for name, entry in header.items())


# --- Damage


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


# --- Rights


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
