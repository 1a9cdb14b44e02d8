"""Seeded mistakes, one at a time: each is caught, and by the check that is meant to catch it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.checks import rule_problems, shape_problems
from tests.k8s.rendering import Document, of_kind, rendered

pytestmark = pytest.mark.usefixtures("kubectl")
Documents = list[Document]
SMOKE, SPOT, STORE, QUEUED = "cpu-smoke", "a100-spot", "a100-spot-s3", "h100-multinode"


def job(documents: Documents) -> Document:
    """The pretraining's specification."""
    (found,) = [d for d in of_kind(documents, "RayJob") if d["metadata"]["name"] == "robustscale-pretrain"]
    return found["spec"]


def dev(documents: Documents) -> Document:
    return of_kind(documents, "RayCluster")[0]["spec"]


def head(documents: Documents) -> Document:
    return job(documents)["rayClusterSpec"]["headGroupSpec"]


def group(documents: Documents) -> Document:
    return job(documents)["rayClusterSpec"]["workerGroupSpecs"][0]


def pod(documents: Documents) -> Document:
    """A worker's."""
    return group(documents)["template"]["spec"]


def container(documents: Documents) -> Document:
    return pod(documents)["containers"][0]


def named(documents: Documents, kind: str, name: str) -> Document:
    (found,) = [d for d in of_kind(documents, kind) if d["metadata"]["name"] == name]
    return found


def policy(documents: Documents, name: str) -> Document:
    return named(documents, "NetworkPolicy", name)["spec"]


def say(documents: Documents, old: str, new: str) -> None:
    """Change the pretraining's command."""
    spec = job(documents)
    assert re.search(old, spec["entrypoint"])
    spec["entrypoint"] = re.sub(old, new, spec["entrypoint"])


def limit(documents: Documents, kind: str, value: str | None) -> None:
    for side in container(documents)["resources"].values():
        side.pop(kind, None) if value is None else side.update({kind: value})


def drop(documents: Documents, kind: str, name: str) -> None:
    documents.remove(named(documents, kind, name))


def flavor(documents: Documents, number: int) -> Document:
    return named(documents, "ClusterQueue", "robustscale")["spec"]["resourceGroups"][0]["flavors"][number]


Mistakes = dict[str, tuple[str, Callable[[Documents], Any], str]]
MISSHAPEN: Mistakes = {
    "a misspelt field of a job": (SMOKE, lambda d: job(d).update(enrypoint="x"), "enrypoint"),
    "a misspelt field of a container": (SMOKE, lambda d: container(d).update(volumeMount=[]), "volumeMount"),
    "a misspelt field of a cluster": (SMOKE, lambda d: dev(d).update(autoscalerOption={}), "autoscalerOption"),
    "a misspelt field of a policy": (SMOKE, lambda d: policy(d, "prometheus").update(ingres=[]), "ingres"),
    "a misspelt field of a claim": (
        SMOKE,
        lambda d: named(d, "PersistentVolumeClaim", "robustscale")["spec"].update(storageClass="nfs"),
        "storageClass",
    ),
    "a misspelt field of the submitter": (
        SMOKE,
        lambda d: job(d)["submitterPodTemplate"]["spec"].update(restartpolicy="Never"),
        "restartpolicy",
    ),
    "a misspelt label block": (SMOKE, lambda d: group(d)["template"]["metadata"].update(label={}), "label"),
    "a group without its name": (SMOKE, lambda d: group(d).pop("groupName"), "groupName"),
    "replicas in words": (SMOKE, lambda d: group(d).update(replicas="two"), "'two'"),
    "num-cpus as a number": (SMOKE, lambda d: head(d)["rayStartParams"].update({"num-cpus": 0}), "is not of type"),
    "an unknown mode of authentication": (
        SMOKE,
        lambda d: job(d)["rayClusterSpec"]["authOptions"].update(mode="tokn"),
        "'tokn' is not one of",
    ),
    "no quantity": (SMOKE, lambda d: container(d)["resources"]["limits"].update(memory="4 GB"), "memory"),
    "a port in words": (SMOKE, lambda d: container(d)["ports"][0].update(containerPort="http"), "'http'"),
    "an old version of Kueue's API": (
        QUEUED,
        lambda d: named(d, "LocalQueue", "robustscale").update(apiVersion="kueue.x-k8s.io/v1alpha1"),
        "Couldn't find schema",
    ),
    "a misspelt field of a queue": (
        QUEUED,
        lambda d: named(d, "ClusterQueue", "robustscale")["spec"].update(cohort="all"),
        "cohort",
    ),
    "a misspelt field of a flavor": (
        QUEUED,
        lambda d: named(d, "ResourceFlavor", "robustscale-h100")["spec"].update(nodeLabel={}),
        "nodeLabel",
    ),
    "a budget's count in words": (
        SMOKE,
        lambda d: named(d, "PodDisruptionBudget", "robustscale-pretrain")["spec"].update(minAvailable=[1]),
        "minAvailable",
    ),
}
"""What a schema finds."""
MISTAKEN: Mistakes = {
    # KubeRay's
    "a name that is too long": (
        SMOKE,
        lambda d: of_kind(d, "RayJob")[0]["metadata"].update(name="robustscale-" + "x" * 40),
        "longer than 47",
    ),
    "a name that is none": (SMOKE, lambda d: of_kind(d, "RayJob")[0]["metadata"].update(name="9lives"), "DNS-1035"),
    "workers without a container": (
        SMOKE,
        lambda d: dev(d)["workerGroupSpecs"][0]["template"]["spec"].update(containers=[]),
        "no container",
    ),
    "replicas without bounds": (SMOKE, lambda d: group(d).pop("maxReplicas"), "needs minReplicas and maxReplicas"),
    "bounds the wrong way round": (SMOKE, lambda d: group(d).update(minReplicas=5), "minReplicas above maxReplicas"),
    "negative replicas": (SMOKE, lambda d: group(d).update(minReplicas=-1), "negative replicas"),
    "an idle time-out without an autoscaler": (
        SMOKE,
        lambda d: group(d).update(idleTimeoutSeconds=60),
        "idleTimeoutSeconds is for the autoscaler's version 2",
    ),
    "resources said twice": (SMOKE, lambda d: head(d).update(resources={"CPU": "0"}), "both in rayStartParams"),
    "labels for ray start": (SMOKE, lambda d: group(d)["rayStartParams"].update(labels="a=b"), "labels belong"),
    "autoscaled workers restarted in place": (
        SMOKE,
        lambda d: dev(d)["workerGroupSpecs"][0]["template"]["spec"].update(restartPolicy="Always"),
        "needs restartPolicy Never",
    ),
    "a Ray before tokens": (
        SMOKE,
        lambda d: job(d)["rayClusterSpec"].update(rayVersion="2.51.0"),
        "token authentication needs Ray 2.52",
    ),
    "no version of Ray": (SMOKE, lambda d: dev(d).pop("rayVersion"), "needs a rayVersion"),
    "Kubernetes' tokens for a job": (
        SMOKE,
        lambda d: job(d)["rayClusterSpec"]["authOptions"].update(enableK8sTokenAuth=True),
        "enableK8sTokenAuth",
    ),
    "a job without a cluster": (SMOKE, lambda d: job(d).pop("rayClusterSpec"), "neither rayClusterSpec nor"),
    "SidecarMode with a submitter": (SMOKE, lambda d: job(d).update(submissionMode="SidecarMode"), "SidecarMode takes"),
    "retries in somebody's cluster": (
        SMOKE,
        lambda d: job(d).update(clusterSelector={"ray.io/cluster": "robustscale-dev"}),
        "backoffLimit goes neither",
    ),
    "a life after death without death": (
        SMOKE,
        lambda d: job(d).update(shutdownAfterJobFinishes=False),
        "ttlSecondsAfterFinished is for",
    ),
    "negative retries": (SMOKE, lambda d: job(d).update(backoffLimit=-1), "negative backoffLimit"),
    "a deadline of none": (SMOKE, lambda d: job(d).update(activeDeadlineSeconds=0), "activeDeadlineSeconds"),
    "an environment that is no mapping": (SMOKE, lambda d: job(d).update(runtimeEnvYAML="- a"), "no YAML mapping"),
    # Kueue's
    "a queue that is not there": (
        QUEUED,
        lambda d: of_kind(d, "RayJob")[0]["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "gpu"}),
        "no LocalQueue gpu",
    ),
    "a job past the queue": (
        QUEUED,
        lambda d: of_kind(d, "RayJob")[0]["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name"),
        "passes by the queue",
    ),
    "a local queue into nowhere": (
        QUEUED,
        lambda d: named(d, "LocalQueue", "robustscale")["spec"].update(clusterQueue="all"),
        "no ClusterQueue all",
    ),
    "a flavor that is not there": (QUEUED, lambda d: flavor(d, 1).update(name="h200"), "no ResourceFlavor h200"),
    "a resource that its flavor forgets": (QUEUED, lambda d: flavor(d, 0)["resources"].pop(), "coveredResources"),
    "a quota below the job": (
        QUEUED,
        lambda d: flavor(d, 1)["resources"][2].update(nominalQuota="8"),
        "will never have room",
    ),
    "no quota for the head": (
        QUEUED,
        lambda d: flavor(d, 0)["resources"][1].update(nominalQuota="1Gi"),
        "gpu: the queue will never",
    ),
    "a flavor of other nodes": (
        QUEUED,
        lambda d: pod(d)["nodeSelector"].update({"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}),
        "gpu: the queue will never",
    ),
    "an autoscaler under Kueue": (
        QUEUED,
        lambda d: job(d)["rayClusterSpec"].update(enableInTreeAutoscaling=True),
        "Kueue admits no autoscaler",
    ),
    "a group with the head's name": (QUEUED, lambda d: group(d).update(groupName="head"), "Kueue keeps the group name"),
    # The restricted profile, and the account
    "root by user": (SMOKE, lambda d: pod(d)["securityContext"].update(runAsUser=0), "does not run as 1000"),
    "root by container": (SMOKE, lambda d: container(d)["securityContext"].update(runAsUser=0), "runs as root"),
    "maybe root": (SMOKE, lambda d: pod(d)["securityContext"].pop("runAsNonRoot"), "runAsNonRoot is not true"),
    "no seccomp": (SMOKE, lambda d: pod(d)["securityContext"].pop("seccompProfile"), "seccomp"),
    "privilege escalation": (
        SMOKE,
        lambda d: container(d)["securityContext"].pop("allowPrivilegeEscalation"),
        "may gain privileges",
    ),
    "privileged": (SMOKE, lambda d: container(d)["securityContext"].update(privileged=True), "may gain privileges"),
    "capabilities kept": (
        SMOKE,
        lambda d: container(d)["securityContext"]["capabilities"].update(drop=["NET_RAW"]),
        "keeps capabilities",
    ),
    "a capability added": (
        SMOKE,
        lambda d: container(d)["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
        "keeps capabilities",
    ),
    "a writable root": (
        SMOKE,
        lambda d: container(d)["securityContext"].pop("readOnlyRootFilesystem"),
        "root is writable",
    ),
    "the network of the node": (SMOKE, lambda d: pod(d).update(hostNetwork=True), "namespace with its node"),
    "a folder of the node": (
        SMOKE,
        lambda d: pod(d)["volumes"].append({"name": "data", "hostPath": {"path": "/data"}}),
        "restricted profile refuses",
    ),
    "a port of the node": (SMOKE, lambda d: container(d)["ports"][0].update(hostPort=8080), "port of its node"),
    "a submitter without a context": (
        SMOKE,
        lambda d: job(d)["submitterPodTemplate"]["spec"]["containers"][0].pop("securityContext"),
        "submitter: submitter: may gain privileges",
    ),
    "an autoscaler without a context": (
        SMOKE,
        lambda d: dev(d)["autoscalerOptions"].pop("securityContext"),
        "autoscaler: may gain privileges",
    ),
    "an autoscaler that cannot write": (
        SMOKE,
        lambda d: dev(d)["autoscalerOptions"].pop("volumeMounts"),
        "autoscaler: cannot write",
    ),
    "no submitter of our own": (SMOKE, lambda d: job(d).pop("submitterPodTemplate"), "submitter of our own"),
    "a namespace that enforces less": (
        SMOKE,
        lambda d: of_kind(d, "Namespace")[0]["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        ),
        "does not enforce",
    ),
    "a worker's token": (SMOKE, lambda d: pod(d).pop("automountServiceAccountToken"), "must be False"),
    "the account's token": (
        SMOKE,
        lambda d: of_kind(d, "ServiceAccount")[0].pop("automountServiceAccountToken"),
        "mounts its token",
    ),
    "an autoscaler without a token": (
        SMOKE,
        lambda d: dev(d)["headGroupSpec"]["template"]["spec"].update(automountServiceAccountToken=False),
        "must be True",
    ),
    "an account that is not there": (SMOKE, lambda d: pod(d).update(serviceAccountName="ray"), "no ServiceAccount ray"),
    "an account that may not scale": (
        SMOKE,
        lambda d: dev(d)["headGroupSpec"]["template"]["spec"].update(serviceAccountName="robustscale"),
        "the operator's to make",
    ),
    # Secrets and images
    "a secret in plain text": (
        SMOKE,
        lambda d: container(d).update(env=[{"name": "RAY_AUTH_TOKEN", "value": "abc"}]),
        "in plain text",
    ),
    "a secret among the documents": (
        SMOKE,
        lambda d: d.append({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}}),
        "has no place here",
    ),
    "no authentication": (SMOKE, lambda d: dev(d).pop("authOptions"), "without token authentication"),
    "the latest image": (
        SMOKE,
        lambda d: container(d).update(image="registry.example.com/robustscale:latest"),
        "neither this version's",
    ),
    "an image without a tag": (SMOKE, lambda d: container(d).update(image="robustscale"), "neither this version's"),
    "another Ray than the image's": (SMOKE, lambda d: dev(d).update(rayVersion="2.59.0"), "constraints.txt"),
    # The network
    "no closed door": (SMOKE, lambda d: drop(d, "NetworkPolicy", "namespace-only"), "no NetworkPolicy closes"),
    "closed for some pods": (
        SMOKE,
        lambda d: policy(d, "namespace-only").update(podSelector={"matchLabels": {"a": "b"}}),
        "no NetworkPolicy closes",
    ),
    "closed in one direction": (
        SMOKE,
        lambda d: policy(d, "namespace-only").update(policyTypes=["Ingress"]),
        "policyTypes must name",
    ),
    "everybody let in": (
        SMOKE,
        lambda d: policy(d, "kuberay-operator")["ingress"][0].pop("from"),
        "lets everybody in",
    ),
    "every namespace let in": (
        SMOKE,
        lambda d: policy(d, "kuberay-operator")["ingress"][0]["from"][0].update(namespaceSelector={}),
        "no namespace that it names",
    ),
    "the GCS opened": (
        SMOKE,
        lambda d: policy(d, "kuberay-operator")["ingress"][0]["ports"].append({"port": 6379, "protocol": "TCP"}),
        "opens",
    ),
    "every port opened": (SMOKE, lambda d: policy(d, "prometheus")["ingress"][0].pop("ports"), "every port"),
    "the dashboard for whole namespaces": (
        SMOKE,
        lambda d: policy(d, "kuberay-operator")["ingress"][0]["from"][0].pop("podSelector"),
        "opens",
    ),
    "the operator shut out": (
        SMOKE,
        lambda d: drop(d, "NetworkPolicy", "kuberay-operator"),
        "operator cannot ask the dashboard",
    ),
    "Prometheus shut out": (SMOKE, lambda d: drop(d, "NetworkPolicy", "prometheus"), "cannot reach the metrics"),
    "no DNS": (SMOKE, lambda d: policy(d, "namespace-only")["egress"].pop(), "no DNS"),
    "the internet": (
        SMOKE,
        lambda d: policy(d, "namespace-only")["egress"].append({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
        "lets more than DNS out",
    ),
    "an autoscaler shut in": (
        SMOKE,
        lambda d: drop(d, "NetworkPolicy", "robustscale-dev-autoscaler"),
        "its autoscaler cannot reach",
    ),
    "pods cut off from each other": (
        SMOKE,
        lambda d: policy(d, "namespace-only").update(ingress=[]),
        "cannot reach each other",
    ),
    "a load balancer": (SMOKE, lambda d: head(d).update(serviceType="LoadBalancer"), "reachable from outside"),
    "Ray's client port": (
        SMOKE,
        lambda d: head(d)["template"]["spec"]["containers"][0]["ports"].append(
            {"name": "client", "containerPort": 10001}
        ),
        "its service would offer",
    ),
    # Volumes and memory
    "a mount of nothing": (SMOKE, lambda d: container(d)["volumeMounts"][2].update(name="runs"), "no volume runs"),
    "a volume that nothing mounts": (SMOKE, lambda d: container(d)["volumeMounts"].pop(), "nothing mounts"),
    "a claim that is not there": (
        SMOKE,
        lambda d: pod(d)["volumes"][2]["persistentVolumeClaim"].update(claimName="runs"),
        "no PersistentVolumeClaim runs",
    ),
    "two volumes on a path": (
        SMOKE,
        lambda d: container(d)["volumeMounts"][1].update(mountPath="/dev/shm"),
        "one path",
    ),
    "no folder to write to": (SMOKE, lambda d: container(d)["volumeMounts"][1].update(mountPath="/t"), "write to /tmp"),
    "a disk as shared memory": (SMOKE, lambda d: pod(d)["volumes"][0]["emptyDir"].pop("medium"), "/dev/shm"),
    "shared memory without an end": (SMOKE, lambda d: pod(d)["volumes"][0]["emptyDir"].pop("sizeLimit"), "/dev/shm"),
    "shared memory of 64 MB": (SMOKE, lambda d: pod(d)["volumes"][0]["emptyDir"].update(sizeLimit="64Mi"), "/dev/shm"),
    "memory shared and gone": (SMOKE, lambda d: pod(d)["volumes"][0]["emptyDir"].update(sizeLimit="4Gi"), "/dev/shm"),
    "storage of one node for four": (
        SPOT,
        lambda d: named(d, "PersistentVolumeClaim", "robustscale")["spec"].update(accessModes=["ReadWriteOnce"]),
        "need ReadWriteMany",
    ),
    # Living and dying
    "no limit": (SMOKE, lambda d: container(d)["resources"].pop("limits"), "requests and limits"),
    "GPUs that are not asked for": (
        SPOT,
        lambda d: container(d)["resources"]["requests"].pop("nvidia.com/gpu"),
        "requests and limits",
    ),
    "no time to drain": (SMOKE, lambda d: pod(d).pop("terminationGracePeriodSeconds"), "before Ray has drained"),
    "a head restarted in place": (
        SMOKE,
        lambda d: head(d)["template"]["spec"].update(restartPolicy="Always"),
        "restarted in place",
    ),
    "workers on the head": (SMOKE, lambda d: head(d)["rayStartParams"].pop("num-cpus"), "takes workers"),
    "a GPU for the head": (
        SPOT,
        lambda d: head(d)["template"]["spec"]["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": "1"}),
        "holds a GPU",
    ),
    "no retries": (SMOKE, lambda d: job(d).pop("backoffLimit"), "a lost head ends the run"),
    "nodes kept": (
        SMOKE,
        lambda d: [job(d).pop(field) for field in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished")],
        "kept after its end",
    ),
    "suspended for ever": (SMOKE, lambda d: job(d).update(suspend=True), "would never start"),
    "no disruption budget": (
        SMOKE,
        lambda d: drop(d, "PodDisruptionBudget", "robustscale-pretrain"),
        "needs one disruption budget",
    ),
    "a budget that any head fulfils": (
        SMOKE,
        lambda d: named(d, "PodDisruptionBudget", "robustscale-pretrain")["spec"]["selector"].update(
            matchLabels={"ray.io/node-type": "head"}
        ),
        "disruption budget",
    ),
    "a budget in shares": (
        SMOKE,
        lambda d: named(d, "PodDisruptionBudget", "robustscale-pretrain")["spec"].update(minAvailable="100%"),
        "minAvailable: 1",
    ),
    "a number of workers that changes": (SMOKE, lambda d: group(d).update(minReplicas=1), "nothing scales"),
    "a head on spot nodes": (SPOT, lambda d: head(d)["template"]["spec"].pop("affinity"), "preemptible node"),
    "GPU nodes out of bounds": (SPOT, lambda d: pod(d)["tolerations"].pop(0), "is kept off nodes"),
    "metrics that nobody finds": (SMOKE, lambda d: group(d)["template"]["metadata"].pop("annotations"), "Prometheus"),
    "metrics at another port": (SMOKE, lambda d: container(d)["ports"][0].update(containerPort=9090), "Prometheus"),
    "a document without its label": (
        SMOKE,
        lambda d: of_kind(d, "ServiceAccount")[0]["metadata"].pop("labels"),
        "--selector would miss it",
    ),
    "a pod of another part": (
        SMOKE,
        lambda d: group(d)["template"]["metadata"]["labels"].update({"app.kubernetes.io/component": "dev"}),
        "is not its document's",
    ),
    "another namespace": (
        SMOKE,
        lambda d: of_kind(d, "RayJob")[0]["metadata"].update(namespace="default"),
        "not in the namespace",
    ),
    # The commands
    "more workers than GPUs": (SPOT, lambda d: say(d, "workers 4", "workers 8"), "--cluster.workers 8 for 4 places"),
    "fewer workers than GPUs": (SPOT, lambda d: say(d, "workers 4", "workers 2"), "--cluster.workers 2 for 4 places"),
    "fewer nodes": (QUEUED, lambda d: group(d).update(replicas=1, minReplicas=1, maxReplicas=1), "for 8 places"),
    "fewer GPUs to a node": (QUEUED, lambda d: limit(d, "nvidia.com/gpu", "4"), "for 8 places"),
    "no GPUs": (SPOT, lambda d: limit(d, "nvidia.com/gpu", None), "--cluster.gpu must be False"),
    "GPUs left to chance": (SPOT, lambda d: say(d, "--cluster.gpu True ", ""), "--cluster.gpu must be True"),
    "more threads than CPUs": (SPOT, lambda d: say(d, "per-worker 11", "per-worker 12"), "are too few"),
    "an option that is none": (SMOKE, lambda d: say(d, "--cluster.wait", "--cluster.patience"), "the door refuses"),
    "a recipe that is none": (SMOKE, lambda d: say(d, "pretrain digits", "pretrain mnist"), "the door refuses"),
    "shards that do not divide": (QUEUED, lambda d: say(d, "--shards 16", "--shards 8"), "the door refuses"),
    "another program": (SMOKE, lambda d: say(d, "robustscale.pretrain", "robustscale.evaluate"), "none of our doors"),
    "a search labelled pretraining": (
        SMOKE,
        lambda d: say(d, "robustscale.pretrain", "robustscale.frontier"),
        "another door than its label",
    ),
    "a name made anew": (SMOKE, lambda d: say(d, "name digits", "name $(date)"), "that a shell reads"),
    "no name": (SMOKE, lambda d: say(d, "--run-name digits ", ""), "without a fixed --run-name"),
    "another's name": (SMOKE, lambda d: say(d, "name digits", "name digits-frontier"), "writes to the folder of"),
    "runs in the container": (SMOKE, lambda d: say(d, "/mnt/robustscale/runs", "/tmp/runs"), "no lasting volume"),
    "data in the container": (SMOKE, lambda d: say(d, "--data.root /mnt/robustscale/data ", ""), "no lasting volume"),
    "a volume mounted elsewhere": (
        SMOKE,
        lambda d: container(d)["volumeMounts"][2].update(mountPath="/mnt/other"),
        "no lasting volume",
    ),
    "runs that cannot be written": (
        SMOKE,
        lambda d: container(d)["volumeMounts"][2].update(readOnly=True),
        "no lasting volume",
    ),
    "no patience": (SMOKE, lambda d: say(d, "--cluster.wait 600", "--cluster.wait 60"), "nodes take minutes"),
    "a bucket without keys": (SMOKE, lambda d: say(d, "/mnt/robustscale/runs", "s3://bucket/runs"), "has no keys"),
    "a worker without keys": (STORE, lambda d: container(d).pop("envFrom"), "gpu: has no keys"),
    "keys in plain text": (
        STORE,
        lambda d: container(d).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
        "in plain text",
    ),
    "keys that lead nowhere": (STORE, lambda d: drop(d, "NetworkPolicy", "object-store"), "belong together"),
    "a store at any port": (
        STORE,
        lambda d: policy(d, "object-store")["egress"][0].pop("ports"),
        "object store's port",
    ),
    "few failures on spot nodes": (
        SPOT,
        lambda d: say(d, "--cluster.max-failures 100", "--cluster.max-failures 3"),
        "preemptible nodes go away",
    ),
}
"""What is well formed, and wrong."""


def documents_of(overlay: str, change: Callable[[Documents], Any]) -> Documents:
    documents = rendered(overlay)
    change(documents)
    assert documents != rendered(overlay)
    return documents


@pytest.mark.parametrize("name", MISSHAPEN)
@pytest.mark.usefixtures("crds")
def test_what_is_out_of_shape_is_caught(name: str) -> None:
    overlay, change, message = MISSHAPEN[name]
    problems = shape_problems(documents_of(overlay, change))
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_mistake_is_caught(name: str) -> None:
    overlay, change, message = MISTAKEN[name]
    problems = rule_problems(documents_of(overlay, change), overlay)
    assert any(message in problem for problem in problems), problems
