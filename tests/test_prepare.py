"""The door that prepares data: what it prints, and how it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_loaders.beton import Beton, sidecar_path
from robustscale.errors import InputError
from robustscale.prepare import main


def test_prepares_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "test.beton"
    assert main(["digits", str(out), "--split", "test"]) == 0
    beton = Beton(out)
    said = capsys.readouterr()
    assert "360 of 8 x 8, 1 channel(s), stored as array" in said.out
    assert "10 (0, 1, 2, 3, 4, ...)" in said.out
    assert beton.fingerprint in said.out
    assert "test.beton: 360 of 360 images" in said.err


def test_replaces_only_when_told_to(tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    main(["digits", str(out), "--split", "test"])
    with pytest.raises(InputError, match=r"out.beton: exists already; .*--overwrite"):
        main(["digits", str(out)])
    assert len(Beton(out)) == 360
    main(["digits", str(out), "--overwrite"])
    assert len(Beton(out)) == 1437


def test_options_reach_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "cats"
    folder.mkdir(parents=True)
    for i, size in enumerate([(90, 60), (60, 90), (100, 100)]):
        Image.fromarray(np.full((*size, 3), 80 * i, np.uint8)).save(folder / f"{i}.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    out = tmp_path / "out.beton"
    options = ["--resolution", "32", "--format", "array", "--skip-bad", "--workers", "2"]
    main([f"folder:{folder.parent}", str(out), *options])
    beton = Beton(out)
    assert (len(beton), beton.height, beton.width) == (3, 32, 32)
    assert "left out     1 that could not be read" in capsys.readouterr().out
    main([str(folder.parent), str(out), "--skip-bad", "--overwrite", "--format", "jpg", "--quality", "50"])
    sidecar = Beton(out).sidecar
    assert (sidecar["format"], sidecar["quality"], sidecar["height"]) == ("jpg", 50, None)
    assert "3 of different sizes, 3 channel(s)" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"broken.jpg: can't be decoded"):
        main([str(folder.parent), str(out), "--overwrite"])
    assert Beton(out).sidecar == sidecar


@pytest.mark.parametrize(
    "argv, pattern",
    [
        ([], "required: SOURCE, OUT.beton; see"),
        (["digits"], "required: OUT.beton"),
        (["digits", "a.beton", "--colour"], "option: '--colour' is not known"),
        (["digits", "a.beton", "--format", "png"], "invalid choice: 'png'"),
        (["digits", "a.beton", "--resolution", "big"], "invalid int value: 'big'"),
        (["digits", "a.beton", "--split", "dev"], "no split 'dev'; it has train, test"),
        (["digts", "a.beton"], "did you mean digits?"),
        (["digits", "a.txt"], "call the file a.beton"),
        (["cifar10", "a.beton", "--root", ".", "--no-download"], "put its files in .*, or leave out --no-download"),
    ],
)
def test_refuses(argv: list[str], pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=pattern) as caught:
        main(argv)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("digits", "cifar10", "folder", "parquet", "idx", "npz", "tensor", "torchvision", "python -m"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


def test_from_a_shell(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "robustscale.prepare",
        f"npz:{tmp_path}/none.npz",
        f"{tmp_path}/a.beton",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: npz:{tmp_path}/none.npz: {tmp_path}/none.npz does not exist; check the path\n"
    assert not sidecar_path(tmp_path / "a.beton").exists()
