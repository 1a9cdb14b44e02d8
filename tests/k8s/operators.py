"""What KubeRay 1.7 and Kueue 0.19 refuse beyond their schemas, restated: KubeRay's controllers/ray/utils/validation.go,
Kueue's webhooks for RayJob and its admission. Only rules about fields that the manifests may reasonably have."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml
from packaging.version import InvalidVersion, Version

from tests.k8s.quantities import amount
from tests.k8s.rendering import Document, cluster_of, groups, of_kind, templates, title

DNS_1035 = re.compile("[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST = {"RayCluster": 53, "RayJob": 47}
QUEUE = "kueue.x-k8s.io/queue-name"
IN_RAY_START = {"num-cpus", "num-gpus", "memory", "resources"}
RESOURCES = ("cpu", "memory", "nvidia.com/gpu")


def kuberay_problems(documents: list[Document]) -> Iterator[str]:
    for document in of_kind(documents, "RayCluster", "RayJob"):
        rules = [_name, _cluster, _autoscaling, _token]
        rules += [_job, _retries, _clean_up] if document["kind"] == "RayJob" else []
        yield from (f"{title(document)}: {problem}" for rule in rules for problem in rule(document))


def _name(document: Document) -> Iterator[str]:
    name, longest = document["metadata"]["name"], LONGEST[document["kind"]]
    if len(name) > longest:
        yield f"the name is longer than {longest}"
    if not DNS_1035.fullmatch(name):
        yield "the name is no DNS-1035 label"


def _cluster(document: Document) -> Iterator[str]:
    cluster = cluster_of(document)
    heads = [("head", cluster["headGroupSpec"])] if "headGroupSpec" in cluster else []
    for name, group in [*heads, *((group.get("groupName", "?"), group) for group in groups(document))]:
        start = group.get("rayStartParams") or {}
        if not group["template"]["spec"].get("containers"):
            yield f"{name}: no container"
        if IN_RAY_START & {key for key, value in start.items() if value} and group.get("resources"):
            yield f"{name}: resources both in rayStartParams and in resources"
        if "labels" in start:
            yield f"{name}: labels belong in the group's labels, not in rayStartParams"
    for group in groups(document):
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if not cluster.get("enableInTreeAutoscaling") and (low is None or high is None):
            yield f"{group.get('groupName')}: needs minReplicas and maxReplicas without an autoscaler"
        if any(count is not None and count < 0 for count in (low, high)):
            yield f"{group.get('groupName')}: negative replicas"
        if low is not None and high is not None and low > high:
            yield f"{group.get('groupName')}: minReplicas above maxReplicas"


def _autoscaling(document: Document) -> Iterator[str]:
    cluster = cluster_of(document)
    options = cluster.get("autoscalerOptions") or {}
    second = cluster.get("enableInTreeAutoscaling") and options.get("version") == "v2"
    for name, template in templates(document):
        if second and name != "submitter" and template["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{name}: the autoscaler's version 2 needs restartPolicy Never, or none"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "negative autoscalerOptions.idleTimeoutSeconds"
    for group in groups(document):
        if "idleTimeoutSeconds" in group and not second:
            yield f"{group.get('groupName')}: idleTimeoutSeconds is for the autoscaler's version 2"
        if group.get("suspend") and cluster.get("enableInTreeAutoscaling"):
            yield f"{group.get('groupName')}: cannot be suspended with an autoscaler"


def _token(document: Document) -> Iterator[str]:
    cluster = cluster_of(document)
    options = cluster.get("authOptions") or {}
    if options.get("mode") == "token":
        try:
            if Version(str(cluster.get("rayVersion", ""))) < Version("2.52.0"):
                yield f"token authentication needs Ray 2.52, not {cluster['rayVersion']}"
        except InvalidVersion:
            yield "token authentication needs a rayVersion"
    if options.get("enableK8sTokenAuth") and document["kind"] == "RayJob":
        yield "enableK8sTokenAuth is not for RayJobs"


def _job(document: Document) -> Iterator[str]:
    spec = document["spec"]
    mode, selects = spec.get("submissionMode", "K8sJobMode"), bool(spec.get("clusterSelector"))
    if spec.get("rayClusterSpec") is None and not selects:
        yield "neither rayClusterSpec nor clusterSelector"
    if mode == "SidecarMode" and (selects or {"submitterPodTemplate", "submitterConfig"} & spec.keys()):
        yield "SidecarMode takes no submitterPodTemplate, submitterConfig or clusterSelector"
    if mode == "SidecarMode":
        head = (spec.get("rayClusterSpec") or {}).get("headGroupSpec", {}).get("template", {}).get("spec", {})
        if head.get("restartPolicy", "Never") != "Never":
            yield "SidecarMode needs the head's restartPolicy Never, or none"
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "runtimeEnvYAML is no YAML mapping"


def _retries(document: Document) -> Iterator[str]:
    spec = document["spec"]
    retries = spec.get("backoffLimit", 0)
    if retries < 0:
        yield "negative backoffLimit"
    if retries > 0 and (spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode"):
        yield "backoffLimit goes neither with clusterSelector nor with InteractiveMode"
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(name, 1) <= 0:
            yield f"{name} is not positive"


def _clean_up(document: Document) -> Iterator[str]:
    spec = document["spec"]
    shuts_down, rest = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    if spec.get("suspend") and (not shuts_down or spec.get("clusterSelector")):
        yield "suspend needs shutdownAfterJobFinishes, and a cluster of its own"
    if rest < 0 or (rest and not shuts_down):
        yield "ttlSecondsAfterFinished is for shutdownAfterJobFinishes, and not negative"
    if (spec.get("deletionStrategy") or {}).get("deletionRules") and shuts_down:
        yield "deletionRules exclude shutdownAfterJobFinishes"


def kueue_problems(documents: list[Document]) -> Iterator[str]:
    queues = {queue["metadata"]["name"]: queue for queue in of_kind(documents, "LocalQueue")}
    cluster_queues = {queue["metadata"]["name"]: queue for queue in of_kind(documents, "ClusterQueue")}
    flavors = {flavor["metadata"]["name"]: flavor for flavor in of_kind(documents, "ResourceFlavor")}
    for queue in queues.values():
        if queue["spec"].get("clusterQueue") not in cluster_queues:
            yield f"{title(queue)}: no ClusterQueue {queue['spec'].get('clusterQueue')}"
    for queue in cluster_queues.values():
        yield from (f"{title(queue)}: {problem}" for problem in _resource_groups(queue, flavors))
    for document in of_kind(documents, "RayJob", "RayCluster"):
        name = document["metadata"].get("labels", {}).get(QUEUE)
        if queues and name is None:
            yield f"{title(document)}: passes by the queue"
        if name is not None and name not in queues:
            yield f"{title(document)}: no LocalQueue {name}"
        if name in queues:
            yield from (f"{title(document)}: {problem}" for problem in _managed(document))
            queue = cluster_queues.get(queues[name]["spec"].get("clusterQueue"))
            if queue is not None:
                fits = _admitted(document, queue, flavors)
                yield from (f"{title(document)}: {problem}" for problem in fits)


def _resource_groups(queue: Document, flavors: dict[str, Document]) -> Iterator[str]:
    for group in queue["spec"].get("resourceGroups", []):
        for flavor in group["flavors"]:
            if flavor["name"] not in flavors:
                yield f"no ResourceFlavor {flavor['name']}"
            if [resource["name"] for resource in flavor["resources"]] != group["coveredResources"]:
                yield f"{flavor['name']}: other resources than coveredResources, or in another order"


def _managed(document: Document) -> Iterator[str]:
    cluster = cluster_of(document)
    if document["kind"] == "RayJob" and not document["spec"].get("shutdownAfterJobFinishes"):
        yield "Kueue needs shutdownAfterJobFinishes"
    if document["spec"].get("clusterSelector"):
        yield "Kueue needs a cluster of the job's own"
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue admits no autoscaler"
    if any(group.get("groupName") == "head" for group in groups(document)):
        yield "Kueue keeps the group name head for itself"


def _admitted(document: Document, queue: Document, flavors: dict[str, Document]) -> Iterator[str]:
    """Whether the empty queue has room for the whole job: each of its sets of pods in the first flavor that it fits."""
    free = {
        flavor["name"]: {resource["name"]: amount(resource["nominalQuota"]) for resource in flavor["resources"]}
        for group in queue["spec"].get("resourceGroups", [])
        for flavor in group["flavors"]
    }
    counts = {group.get("groupName"): group.get("replicas", 0) for group in groups(document)}
    for name, template in templates(document):
        need = {kind: counts.get(name, 1) * _requested(template, kind) for kind in RESOURCES}
        selector = template["spec"].get("nodeSelector", {})
        for flavor, rest in free.items():
            labels = flavors.get(flavor, {}).get("spec", {}).get("nodeLabels", {})
            chosen = all(labels.get(key, selector[key]) == selector[key] for key in selector)
            if chosen and all(rest.get(kind, 0) >= wanted for kind, wanted in need.items() if wanted):
                free[flavor] = {kind: rest[kind] - need.get(kind, 0) for kind in rest}
                break
        else:
            yield f"{name}: the queue will never have room for {need}"


def _requested(template: Document, kind: str) -> float:
    containers = template["spec"].get("containers", [])
    return sum(amount(c.get("resources", {}).get("requests", {}).get(kind, 0)) for c in containers)
