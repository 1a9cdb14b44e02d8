"""What holds for the whole test session: one thread, a home of its own, and no GPU test without a GPU."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before anything imports torch, and inherited by every process that a test starts. Thread pools on a shared machine
# slow each other down, and sums in another order differ in the last bit.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

# `python` and `ray`, which tests and Ray's jobs start by name, are this environment's whether or not it is activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# A slow machine is no failure (deadline), and a failure is the same one on the next run (derandomize).
settings.register_profile("robustscale", deadline=None, derandomize=True, database=None)
settings.load_profile("robustscale")


def pytest_configure(config: pytest.Config) -> None:
    """Gives the session a HOME of its own: Ray writes an auth token there, and data sets are kept there by default."""
    # A process of Ray that is just ending may still write there: that is no error of the tests.
    home = tempfile.TemporaryDirectory(prefix="robustscale-home-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    os.environ["HOME"] = home.name
    # Kept from session to session, as matplotlib takes seconds to list the fonts.
    os.environ["MPLCONFIGDIR"] = str(config.rootpath / ".pytest_cache" / "matplotlib")
    for variable in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "XDG_CACHE_HOME"):
        os.environ.pop(variable, None)


TOGETHER = ("edges", "tune")
"""Folders of tests that start Ray: in one process, which has one cluster for all of them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests are of one process, for what they share."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "ray" if file.split("/")[1] in TOGETHER else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none"))
