"""torchvision imports with any torch, and stays itself."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from robustscale.errors import InputError
from robustscale.torchvision_guard import ensure_torchvision


def test_the_same_torchvision_as_a_plain_import_gives_afterwards() -> None:
    assert ensure_torchvision() is ensure_torchvision() is importlib.import_module("torchvision")


def test_compiled_operators_work_or_raise_torchvisions_own_error() -> None:
    ops = importlib.import_module(ensure_torchvision().__name__ + ".ops")
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), torch.tensor([0.9, 0.8])
    if importlib.import_module("torchvision.extension")._has_ops():
        assert ops.nms(boxes, scores, 0.5).tolist() == [0]
    else:
        with pytest.raises(RuntimeError, match="Couldn't load custom C"):
            ops.nms(boxes, scores, 0.5)


def test_other_failures_of_the_import_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def import_module(name: str) -> None:
            raise error

        ensure_torchvision.cache_clear()
        monkeypatch.setattr(importlib, "import_module", import_module)

    fail(RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        ensure_torchvision()
    fail(ModuleNotFoundError("No module named 'PIL'", name="PIL"))
    with pytest.raises(ModuleNotFoundError, match="PIL"):
        ensure_torchvision()
    fail(ModuleNotFoundError("No module named 'torchvision'", name="torchvision"))
    with pytest.raises(InputError, match="pip install"):
        ensure_torchvision()
    with monkeypatch.context() as on_cuda:
        on_cuda.setattr(torch.version, "cuda", "13.0")
        fail(RuntimeError("operator torchvision::nms does not exist"))
        with pytest.raises(RuntimeError, match="nms"):
            ensure_torchvision()
    ensure_torchvision.cache_clear()


def test_configuration_does_not_import_torchvision() -> None:
    """It takes seconds, and a cluster's head may not have it."""
    code = (
        "import sys; from robustscale.config import components; from robustscale.types import Model;"
        "components(Model); sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
