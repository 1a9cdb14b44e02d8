"""What the overlays render to."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent.name for path in (ROOT / "k8s" / "overlays").glob("*/kustomization.yaml"))
Document = dict[str, Any]


def kustomize_missing() -> str | None:
    """Why nothing can be rendered here."""
    if shutil.which("kubectl") is None:
        return "there is no kubectl here, which renders the overlays"
    done = subprocess.run(["kubectl", "kustomize", "--help"], capture_output=True, timeout=60, check=False)
    return None if done.returncode == 0 else "this kubectl has no kustomize"


@functools.cache
def _rendered(overlay: str) -> str:
    done = subprocess.run(
        ["kubectl", "kustomize", f"k8s/overlays/{overlay}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return json.dumps(list(yaml.safe_load_all(done.stdout)))


def rendered(overlay: str) -> list[Document]:
    """A copy of its own for everybody who asks."""
    documents: list[Document] = json.loads(_rendered(overlay))
    return documents


def of_kind(documents: list[Document], *kinds: str) -> list[Document]:
    return [document for document in documents if document["kind"] in kinds]


def title(document: Document) -> str:
    return f"{document['kind']} {document['metadata']['name']}"


def cluster_of(document: Document) -> Document:
    """The specification of a Ray cluster, in a RayCluster or RayJob."""
    spec: Document = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec.get("rayClusterSpec") or {}


def groups(document: Document) -> list[Document]:
    return list(cluster_of(document).get("workerGroupSpecs") or [])


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template that a RayCluster or RayJob holds, by what it is: head, submitter, or the group's name."""
    cluster = cluster_of(document)
    if "headGroupSpec" in cluster:
        yield "head", cluster["headGroupSpec"]["template"]
    for group in groups(document):
        yield group.get("groupName", "?"), group["template"]
    if "submitterPodTemplate" in document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]
