"""Skips what cannot be checked here, and says why."""

from __future__ import annotations

import pytest

from tests.k8s.rendering import kustomize_missing
from tests.k8s.schemas import crds_missing


@pytest.fixture(scope="session")
def kubectl() -> None:
    if reason := kustomize_missing():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def crds() -> None:
    if reason := crds_missing():
        pytest.skip(reason)
