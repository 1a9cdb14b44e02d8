"""Every field of every document against the schemas of those who read them: KubeRay's and Kueue's CRDs, and Kubernetes.

A CRD's OpenAPI schema becomes a strict JSON Schema: what Kubernetes would prune in silence, a misspelt field, is an
error here. Rules in CEL, webhooks and scheduling are not in a schema.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.rendering import ROOT, Document, templates, title

KUBERNETES = "1.37"
CRDS = {
    ("ray.io/v1", "RayCluster"): "ray.io_rayclusters.yaml",
    ("ray.io/v1", "RayJob"): "ray.io_rayjobs.yaml",
    ("kueue.x-k8s.io/v1beta2", "ClusterQueue"): "kueue_clusterqueues.yaml",
    ("kueue.x-k8s.io/v1beta2", "LocalQueue"): "kueue_localqueues.yaml",
    ("kueue.x-k8s.io/v1beta2", "ResourceFlavor"): "kueue_resourceflavors.yaml",
}


def crd_folder() -> Path:
    """KubeRay 1.7's and Kueue 0.19's CRDs, which their own repositories publish."""
    return Path(os.environ.get("ROBUSTSCALE_CRDS") or ROOT.parent / "shared" / "data" / "crds")


def crds_missing() -> str | None:
    missing = [name for name in CRDS.values() if not (crd_folder() / name).is_file()]
    return f"{crd_folder()}: no {', '.join(missing)} there; ROBUSTSCALE_CRDS names another folder" if missing else None


def strict(schema: Any, closed: bool = True) -> Any:
    """An OpenAPI schema of a CRD as JSON Schema; `closed`: without fields that it does not name."""
    if not isinstance(schema, dict):
        return schema
    out = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if out.pop("nullable", False) and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    if "properties" in out:
        out["properties"] = {name: strict(part, closed) for name, part in out["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in out:
            out[key] = strict(out[key], closed)
    for key in ("allOf", "anyOf", "oneOf"):
        if key in out:
            out[key] = [strict(part, closed=False) for part in out[key]]
    anything = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if closed and "properties" in out and not anything:
        out.setdefault("additionalProperties", False)
    return out


@functools.cache
def _validator(api_version: str, kind: str) -> jsonschema.Draft202012Validator:
    text = (crd_folder() / CRDS[api_version, kind]).read_text()
    crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - either is safe
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == api_version.partition("/")[2] and v["served"]]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(strict(schema))


def schema_problems(document: Document) -> Iterator[str]:
    """Of a document, and of the pod templates in it."""
    yield from (f"{title(document)}: {problem}" for problem in _problems(json.dumps(document)))
    if document["kind"] in ("RayCluster", "RayJob"):
        for name, template in templates(document):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            yield from (f"{title(document)}, {name}: {problem}" for problem in _problems(json.dumps(pod)))


@functools.cache
def _problems(text: str) -> tuple[str, ...]:
    document = json.loads(text)
    version, kind = document.get("apiVersion", ""), document.get("kind", "")
    if (version, kind) in CRDS:
        return tuple(_said(error) for error in _validator(version, kind).iter_errors(document))
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (_said(error),)
    except kubernetes_validate.SchemaNotFoundError as error:  # nobody may go unchecked
        return (str(error.message),)
    return ()


def _said(error: jsonschema.ValidationError) -> str:
    return f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
