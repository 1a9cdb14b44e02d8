"""What we ask of our own manifests beyond what others would refuse: the restricted profile to the letter, no token for
the Kubernetes API, closed ports, volumes that are there, and jobs that a retry can go on with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import robustscale
from tests.k8s.quantities import amount
from tests.k8s.rendering import ROOT, Document, cluster_of, groups, of_kind, templates, title

COMPONENT = "app.kubernetes.io/component"
COMPONENTS = {"common", "pretrain", "frontier", "dev"}
GPU = "nvidia.com/gpu"
USER = 1000
DRAINING = 30
"""Seconds that Ray takes to drain a node that was told to end."""
OBJECT_STORE = 0.3
"""Ray's default share of the memory, in /dev/shm."""
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
DNS = {(53, "UDP"), (53, "TCP")}
RAY = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def policy_problems(documents: list[Document], several_nodes: bool) -> Iterator[str]:
    yield from _documents(documents)
    yield from _network(documents)
    for claim in of_kind(documents, "PersistentVolumeClaim"):
        if several_nodes and claim["spec"].get("accessModes") != ["ReadWriteMany"]:
            yield f"{title(claim)}: pods of several nodes need ReadWriteMany"
    for document in of_kind(documents, "RayCluster", "RayJob"):
        problems = [*_cluster(document), *_head(document)]
        if document["kind"] == "RayJob":
            problems += [*_job(document), *_budget(document, documents)]
        for name, template in templates(document):
            problems += [f"{name}: {problem}" for problem in _pod(name, template, document, documents)]
        yield from (f"{title(document)}: {problem}" for problem in problems)


def _documents(documents: list[Document]) -> Iterator[str]:
    names = [namespace["metadata"]["name"] for namespace in of_kind(documents, "Namespace")]
    for document in documents:
        metadata = document["metadata"]
        if metadata.get("labels", {}).get(COMPONENT) not in COMPONENTS:
            yield f"{title(document)}: {COMPONENT} is none of {sorted(COMPONENTS)}; --selector would miss it"
        if document["kind"] in ("Namespace", "ClusterQueue", "ResourceFlavor"):
            continue
        if metadata.get("namespace") not in names:
            yield f"{title(document)}: not in the namespace that comes with it"
    for namespace in of_kind(documents, "Namespace"):
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{title(namespace)}: does not enforce the restricted profile"
    if len(names) != 1:
        yield "one namespace is needed"
    for kind in ("Secret", "Ingress", "Service"):
        yield from (f"{title(document)}: has no place here" for document in of_kind(documents, kind))
    for account in of_kind(documents, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{title(account)}: mounts its token"


def _cluster(document: Document) -> Iterator[str]:
    cluster = cluster_of(document)
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "without token authentication"
    if RAY is None or cluster.get("rayVersion") != RAY[1]:
        yield f"rayVersion {cluster.get('rayVersion')} is not the one of constraints.txt"
    options = cluster.get("autoscalerOptions") or {}
    if cluster.get("enableInTreeAutoscaling"):
        yield from (f"autoscaler: {problem}" for problem in _container({"image": "", **options}))
        if "/tmp" not in [mount.get("mountPath") for mount in options.get("volumeMounts", [])]:
            yield "autoscaler: cannot write to /tmp"
    names = [group.get("groupName") for group in groups(document)]
    if len(set(names)) < len(names) or not names:
        yield "needs worker groups of different names"
    for group in groups(document):
        counts = [group.get(field) for field in ("replicas", "minReplicas", "maxReplicas")]
        if not cluster.get("enableInTreeAutoscaling") and len(set(counts)) > 1:
            yield f"{group.get('groupName')}: a run has a fixed number of workers, and nothing scales {counts}"


def _head(document: Document) -> Iterator[str]:
    cluster = cluster_of(document)
    head = cluster.get("headGroupSpec", {})
    if (head.get("rayStartParams") or {}).get("num-cpus") != "0":
        yield "head: takes workers; num-cpus: '0' keeps it for the driver"
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "head: reachable from outside the cluster"
    pod = head.get("template", {}).get("spec", {})
    if pod.get("restartPolicy") != "Never":
        yield "head: restarted in place it would be an empty cluster; restartPolicy: Never"
    containers = pod.get("containers", [])
    ports = {port.get("name"): port.get("containerPort") for c in containers for port in c.get("ports", [])}
    if ports != {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}:
        yield f"head: its service would offer {ports}"
    if any(_limit(container, GPU) for container in containers):
        yield "head: holds a GPU that no worker gets"
    preemptible = {
        item.get("key")
        for group in groups(document)
        for item in group["template"]["spec"].get("tolerations", [])
        if "spot" in str(item.get("key"))
    }
    for key in preemptible:
        if {"key": key, "operator": "DoesNotExist"} not in list(_node_expressions(pod)):
            yield f"head: may land on a preemptible node ({key})"


def _node_expressions(pod: Document) -> Iterator[Document]:
    required = pod.get("affinity", {}).get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in required.get("nodeSelectorTerms", []):
        yield from term.get("matchExpressions", [])


def _job(document: Document) -> Iterator[str]:
    spec = document["spec"]
    if spec.get("submissionMode") != "K8sJobMode" or "submitterPodTemplate" not in spec:
        yield "only a submitter of our own passes the restricted profile: K8sJobMode with submitterPodTemplate"
    if spec.get("backoffLimit", 0) < 1:
        yield "without backoffLimit a lost head ends the run"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "its nodes would be kept after its end"
    if spec.get("suspend"):
        yield "would never start without a queue; Kueue sets suspend by itself"
    if "runtimeEnvYAML" in spec:
        yield "a runtime environment replaces what the image has"


def _budget(document: Document, documents: list[Document]) -> Iterator[str]:
    labels = {**_labels(cluster_of(document).get("headGroupSpec", {}).get("template", {})), "ray.io/node-type": "head"}
    budgets = [
        budget["spec"]
        for budget in of_kind(documents, "PodDisruptionBudget")
        if _selects(budget["spec"].get("selector"), labels)
    ]
    # maxUnavailable and shares need a controller with a scale, which a RayCluster is not.
    if [budget.get("minAvailable") for budget in budgets] != [1]:
        yield "needs one disruption budget for its head, minAvailable: 1"
    if any(set(budget["selector"].get("matchLabels", {})) != {COMPONENT, "ray.io/node-type"} for budget in budgets):
        yield "its disruption budget holds for other pods, too"


def _labels(template: Document) -> dict[str, str]:
    return template.get("metadata", {}).get("labels") or {}


def _selects(selector: Document | None, labels: dict[str, str]) -> bool:
    return selector is not None and selector.get("matchLabels", {}).items() <= labels.items()


def _pod(name: str, template: Document, document: Document, documents: list[Document]) -> Iterator[str]:
    pod = template["spec"]
    yield from _restricted(pod)
    yield from _account(name, pod, document, documents)
    yield from _volumes(pod, documents)
    if _labels(template).get(COMPONENT) != document["metadata"].get("labels", {}).get(COMPONENT):
        yield f"its {COMPONENT} is not its document's"
    for container in [*pod.get("containers", []), *pod.get("initContainers", [])]:
        yield from (f"{container.get('name')}: {problem}" for problem in _container(container))
        yield from (f"{container.get('name')}: {problem}" for problem in _image(container))
        if _limit(container, GPU) and not any(_tolerates(item, GPU) for item in pod.get("tolerations", [])):
            yield f"is kept off nodes whose taint is {GPU}"
    if name != "submitter":
        yield from _ray(template)


def _restricted(pod: Document) -> Iterator[str]:
    """The restricted profile of the Pod Security Standards: https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    context = pod.get("securityContext") or {}
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "without a seccomp profile"
    if any(pod.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares a namespace with its node"
    for volume in pod.get("volumes", []):
        if not volume.keys() - {"name"} <= VOLUMES:
            yield f"volume {volume.get('name')}: of a kind that the restricted profile refuses"
    if context.get("sysctls"):
        yield "sets sysctls"
    # Beyond the profile: the image's user, whose group owns the volume.
    if [context.get(field) for field in ("runAsUser", "runAsGroup", "fsGroup")] != [USER] * 3:
        yield f"does not run as {USER}, the image's user"


def _container(container: Document) -> Iterator[str]:
    context = container.get("securityContext") or {}
    capabilities = context.get("capabilities") or {}
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield "may gain privileges"
    if "ALL" not in capabilities.get("drop", []) or not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}:
        yield "keeps capabilities"
    if context.get("runAsNonRoot") is False or context.get("runAsUser") == 0:
        yield "runs as root"
    if context.get("procMount", "Default") != "Default":
        yield "unmasks /proc"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "takes a port of its node"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "its root is writable"
    resources = container.get("resources") or {}
    asked, limits = resources.get("requests", {}), resources.get("limits", {})
    if not {"cpu", "memory"} <= limits.keys() or asked != limits:
        yield "requests and limits of CPU and memory must be there, and equal"
    for variable in container.get("env", []):
        if "value" in variable and re.search("TOKEN|PASSWORD|SECRET|CREDENTIAL|ACCESS_KEY|API_KEY", variable["name"]):
            yield f"{variable['name']} in plain text"


def _image(container: Document) -> Iterator[str]:
    image = str(container.get("image", ""))
    name, _, tag = image.rpartition(":")
    if "@sha256:" not in image and (not name.endswith("/robustscale") or tag != robustscale.__version__):
        yield f"image {image!r} is neither this version's nor named by a digest"
    if container.get("command") or container.get("args"):
        yield "its command is the operator's"


def _tolerates(toleration: Document, key: str) -> bool:
    return toleration.get("key") == key and toleration.get("effect", "NoSchedule") == "NoSchedule"


def _account(name: str, pod: Document, document: Document, documents: list[Document]) -> Iterator[str]:
    accounts = [account["metadata"]["name"] for account in of_kind(documents, "ServiceAccount")]
    scales = name == "head" and bool(cluster_of(document).get("enableInTreeAutoscaling"))
    if pod.get("automountServiceAccountToken") is not scales:
        yield f"automountServiceAccountToken must be {scales}"
    if scales and pod.get("serviceAccountName"):
        yield "the account that may scale is the operator's to make"
    if not scales and pod.get("serviceAccountName") not in accounts:
        yield f"no ServiceAccount {pod.get('serviceAccountName')}"


def _volumes(pod: Document, documents: list[Document]) -> Iterator[str]:
    volumes = {volume.get("name"): volume for volume in pod.get("volumes", [])}
    mounts = [mount for container in pod.get("containers", []) for mount in container.get("volumeMounts", [])]
    claims = [claim["metadata"]["name"] for claim in of_kind(documents, "PersistentVolumeClaim")]
    for mount in mounts:
        if mount.get("name") not in volumes:
            yield f"{mount.get('mountPath')}: no volume {mount.get('name')}"
    if unused := volumes.keys() - {mount.get("name") for mount in mounts}:
        yield f"volumes that nothing mounts: {sorted(map(str, unused))}"
    paths = [mount.get("mountPath") for mount in mounts]
    if len(set(paths)) < len(paths):
        yield "two volumes on one path"
    for volume in volumes.values():
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if claim is not None and claim not in claims:
            yield f"no PersistentVolumeClaim {claim}"
    at = {mount.get("mountPath"): volumes.get(mount.get("name"), {}) for mount in mounts if not mount.get("readOnly")}
    if "emptyDir" not in at.get("/tmp", {}):
        yield "cannot write to /tmp, where Ray keeps its session"


def _ray(template: Document) -> Iterator[str]:
    """Of head and workers."""
    pod = template["spec"]
    if pod.get("terminationGracePeriodSeconds", 30) < 2 * DRAINING:
        yield f"ends before Ray has drained it, {DRAINING} s, and a checkpoint is written"
    container = pod["containers"][0] if pod["containers"] else {}
    volumes = {volume.get("name"): volume.get("emptyDir") or {} for volume in pod.get("volumes", [])}
    shm = [volumes.get(m.get("name"), {}) for m in container.get("volumeMounts", []) if m["mountPath"] == "/dev/shm"]
    size = [amount(volume["sizeLimit"]) for volume in shm if volume.get("medium") == "Memory" and "sizeLimit" in volume]
    memory = _limit(container, "memory")
    if not size or not OBJECT_STORE * memory <= size[0] <= memory / 2:
        yield "/dev/shm must be memory, with room for Ray's object store, and leave half to the processes"
    annotations = template.get("metadata", {}).get("annotations") or {}
    ports = {port.get("name"): str(port.get("containerPort")) for port in container.get("ports", [])}
    scraped = annotations.get("prometheus.io/scrape") == "true" and annotations.get("prometheus.io/port")
    if not scraped or scraped != ports.get("metrics"):
        yield "Prometheus is not told its metrics port"


def _limit(container: Document, kind: str) -> float:
    return amount((container.get("resources") or {}).get("limits", {}).get(kind, 0))


def _network(documents: list[Document]) -> Iterator[str]:
    policies = of_kind(documents, "NetworkPolicy")
    everywhere = [policy for policy in policies if policy["spec"].get("podSelector") == {}]
    if not any(set(policy["spec"].get("policyTypes", [])) == {"Ingress", "Egress"} for policy in everywhere):
        yield "no NetworkPolicy closes every pod in both directions"
    for policy in policies:
        spec = policy["spec"]
        declared = {kind for kind in ("Ingress", "Egress") if kind.lower() in spec}
        if set(spec.get("policyTypes", [])) != declared:
            yield f"{title(policy)}: policyTypes must name what it has rules for"
        for rule in spec.get("ingress", []):
            yield from (f"{title(policy)}: {problem}" for problem in _ingress(rule))
        for rule in spec.get("egress", []):
            yield from (f"{title(policy)}: {problem}" for problem in _egress(rule, spec["podSelector"]))
    opened = any(policy["metadata"]["name"] == "object-store" for policy in policies)
    pods = [template["spec"] for ray in of_kind(documents, "RayCluster", "RayJob") for _, template in templates(ray)]
    if opened != any(secrets_of(container) for pod in pods for container in pod.get("containers", [])):
        yield "the way to an object store, and the keys for it, belong together"
    yield from _needed(documents, policies)


def secrets_of(container: Document) -> list[str]:
    """Whose entries are its environment."""
    return [source["secretRef"]["name"] for source in container.get("envFrom", []) if "secretRef" in source]


def _ingress(rule: Document) -> Iterator[str]:
    peers, ports = rule.get("from") or [], _ports(rule)
    if not peers:
        yield "lets everybody in"
    for peer in peers:
        if peer == {"podSelector": {}}:
            continue  # the namespace itself
        if not (peer.get("namespaceSelector") or {}).get("matchLabels") or "ipBlock" in peer:
            yield "lets in who is in no namespace that it names"
        allowed = {(8265, "TCP")} if (peer.get("podSelector") or {}).get("matchLabels") else {(8080, "TCP")}
        if not ports or not ports <= allowed:
            yield f"opens {sorted(ports) or 'every port'} to another namespace; {sorted(allowed)} at most"


def _egress(rule: Document, selected: Document) -> Iterator[str]:
    peers, ports = rule.get("to") or [], _ports(rule)
    autoscaler = {"ray.io/node-type": "head", COMPONENT: "dev"}
    if selected.get("matchLabels") == {"ray.io/is-ray-node": "yes"}:
        if ports != {(443, "TCP")}:
            yield "lets the pods out to more than an object store's port"
        return
    if selected.get("matchLabels") == autoscaler:
        if not ports or not ports <= {(443, "TCP"), (6443, "TCP")}:
            yield "lets the autoscaler out to more than the Kubernetes API's ports"
        return
    if peers == [{"podSelector": {}}]:
        return
    if (
        not ports
        or not ports <= DNS
        or not all((peer.get("namespaceSelector") or {}).get("matchLabels") for peer in peers)
    ):
        yield "lets more than DNS out"


def _ports(rule: Document) -> set[tuple[Any, str]]:
    return {(port.get("port"), port.get("protocol", "TCP")) for port in rule.get("ports") or []}


def _needed(documents: list[Document], policies: Iterable[Document]) -> Iterator[str]:
    """What a cluster cannot do without."""
    head = {"ray.io/node-type": "head", "ray.io/is-ray-node": "yes"}
    inward, outward = set(), set()
    for spec in (policy["spec"] for policy in policies):
        if _selects(spec.get("podSelector"), head):
            inward |= {port for rule in spec.get("ingress", []) for port in _ports(rule)}
            outward |= {port for rule in spec.get("egress", []) for port in _ports(rule)}
    inside = any({"podSelector": {}} in (r.get("from") or []) for p in policies for r in p["spec"].get("ingress", []))
    if not inside or not any(
        {"podSelector": {}} in (r.get("to") or []) for p in policies for r in p["spec"].get("egress", [])
    ):
        yield "the pods of the namespace cannot reach each other"
    if (8265, "TCP") not in inward:
        yield "the operator cannot ask the dashboard how a job is"
    if (8080, "TCP") not in inward:
        yield "Prometheus cannot reach the metrics"
    if not outward >= DNS:
        yield "the workers cannot find the head: no DNS"
    for document in of_kind(documents, "RayCluster", "RayJob"):
        if not cluster_of(document).get("enableInTreeAutoscaling"):
            continue
        labels = head | _labels(cluster_of(document)["headGroupSpec"]["template"])
        opened = {
            port
            for spec in (policy["spec"] for policy in policies)
            if _selects(spec.get("podSelector"), labels)
            for rule in spec.get("egress", [])
            for port in _ports(rule)
        }
        if (443, "TCP") not in opened:
            yield f"{title(document)}: its autoscaler cannot reach the Kubernetes API"
