"""The ConfigMap that brings Grafana the dashboard."""

from __future__ import annotations

import json
import subprocess

import kubernetes_validate
import pytest
import yaml

from tests.cluster.dashboard import dashboard
from tests.k8s.rendering import ROOT
from tests.k8s.schemas import KUBERNETES


@pytest.mark.usefixtures("kubectl")
def test_a_sidecar_finds_the_dashboard_in_one_config_map() -> None:
    command = ["kubectl", "kustomize", "k8s/grafana"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    (found,) = yaml.safe_load_all(done.stdout)
    kubernetes_validate.validate(found, KUBERNETES, strict=True)
    assert found["kind"] == "ConfigMap" and found["metadata"]["labels"] == {"grafana_dashboard": "1"}
    (text,) = found["data"].values()
    assert json.loads(text) == dashboard()
    assert len(text) < 2**18  # `kubectl apply` keeps a copy in an annotation, which has no room for more
