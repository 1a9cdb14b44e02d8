"""Where a run's files lie: in its folder. No link in it leads out, and nothing that is named in it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.run import Run
from robustscale.types import DataSpec
from tune.sweep import Sweep, require_id

SPEC = DataSpec(1, 8, 8, 3, (0.5,), (0.5,))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "storage" / "run")
    folder.write_run(Run(model=Basic(channels=2, hidden=2)))
    folder.write("data.json", {"spec": SPEC._asdict()})
    folder.save_weights("last", build(Basic(channels=2, hidden=2), SPEC), epoch=1, step=1)
    return folder


LINKS = ["metrics.jsonl", ".lock", "checkpoints", "evaluation", "result.json", "weights/best.safetensors", "frontier/x"]


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("target", ["file", "folder", "nothing", "sibling"])
def test_a_link_that_leads_out_is_refused_before_anything_is_written(
    name: str, target: str, folder: RunFolder, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (folder.path.parent / "run-2").mkdir()  # its name begins as the run's does
    targets = {"file": outside / "file", "folder": outside, "nothing": outside / "new", "sibling": "../run-2"}
    link = folder.path / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(
        targets[target] if target != "sibling" else os.path.relpath(folder.path.parent / "run-2", link.parent)
    )
    with pytest.raises(InputError, match="leads out of the run's folder"):
        RunFolder.existing(folder.path)
    with pytest.raises(InputError, match="leads out of the run's folder"), folder.locked():
        raise AssertionError
    assert (outside / "file").read_text() == "mine"
    assert [path.name for path in outside.iterdir()] == ["file"]


def test_links_to_the_folder_and_inside_it_are_followed(folder: RunFolder, tmp_path: Path) -> None:
    """Storage may lie elsewhere, and the best weights may be the last ones."""
    (tmp_path / "link").symlink_to(folder.path.parent)
    (folder.path / "weights" / "best.safetensors").symlink_to("last.safetensors")
    found = RunFolder.existing(tmp_path / "link" / "run")
    assert found.path == folder.path
    best, last = found.network("best"), found.network("last")
    for a, b in zip(best.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_written_takes_the_place_of_a_link(folder: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (folder.path / "result.json").symlink_to(tmp_path / "mine")
    folder.write("result.json", {})
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (folder.path / "result.json").is_symlink()


@pytest.mark.parametrize("path", ["~nobody-of-this-name/run", "loop", "a" * 300, "a/" * 2_000])
def test_a_path_that_leads_nowhere_is_a_line(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError):
        RunFolder.existing(path)


@pytest.mark.parametrize(
    "trial", ["..", "../../x", "/etc", "", "0123456789ABCDEF", "0123456789abcdef/..", "0123456789abcdef\n", "0" * 17]
)
def test_a_trial_has_no_name_but_its_id(trial: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no trial's ID"):
        Sweep(tmp_path).trial(trial)


def test_an_id_names_a_folder_of_the_search(tmp_path: Path) -> None:
    assert Sweep(tmp_path).trial("0123456789abcdef").path == tmp_path / "trials" / "0123456789abcdef"
    assert require_id("0" * 16) == "0" * 16
