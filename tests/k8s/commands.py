"""The command lines of the jobs, given to our own doors, and held against the pods that they get."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shlex
from collections.abc import Callable, Iterator

import pytest

from robustscale import frontier, pretrain
from robustscale.engine.remote import is_url
from robustscale.errors import InputError
from tests.k8s.policy import COMPONENT, GPU, secrets_of
from tests.k8s.quantities import amount
from tests.k8s.rendering import Document, cluster_of, groups, of_kind, templates, title

DOORS: dict[str, tuple[Callable[[], int], str]] = {
    "robustscale.pretrain": (pretrain.main, "--print-config"),
    "robustscale.frontier": (frontier.main, "--print-space"),
}
PLAIN = re.compile(r"[A-Za-z0-9_./=:, -]+")
"""The operator puts the command into a shell's command line, and Ray gives it to another: what neither touches."""


def command_problems(documents: list[Document]) -> Iterator[str]:
    names: dict[str, str] = {}
    for document in of_kind(documents, "RayJob"):
        command = str(document["spec"].get("entrypoint", ""))
        problems = [*_refused(command), *_against_pods(command, document), *_lasting(command, document)]
        yield from (f"{title(document)}: {problem}" for problem in problems)
        name = options(command).get("run-name", "")
        if name in names:
            yield f"{title(document)}: writes to the folder of {names[name]}"
        names[name] = title(document)


def options(command: str) -> dict[str, str]:
    words = shlex.split(command)
    return {word[2:]: words[k + 1] for k, word in enumerate(words[:-1]) if word.startswith("--")}


@functools.cache
def _refused(command: str) -> tuple[str, ...]:
    """What the door itself says against it."""
    words = shlex.split(command)
    if not PLAIN.fullmatch(command):
        return ("the command has characters that a shell reads",)
    if words[:2] != ["python", "-m"] or words[2] not in DOORS:
        return ("the command is none of our doors",)
    main, show = DOORS[words[2]]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", [*words[2:], show])
        patch.delenv("ROBUSTSCALE_STORAGE", raising=False)
        try:
            code = main()
        except InputError as error:
            return (f"the door refuses the command: {error}",)
    return () if code == 0 and out.getvalue() else ("the door showed nothing",)


def _against_pods(command: str, document: Document) -> Iterator[str]:
    given = options(command)
    try:
        workers, cpus = int(given["cluster.workers"]), int(given["cluster.cpus-per-worker"])
    except (KeyError, ValueError):
        yield "the command must say --cluster.workers and --cluster.cpus-per-worker"
        return
    pods = [(group.get("replicas", 0), _limits(group["template"])) for group in groups(document)]
    gpus = sum(count * amount(limits.get(GPU, 0)) for count, limits in pods)
    # By default a run takes GPUs if it sees one when it starts: it would go on CPUs where they come late.
    if given.get("cluster.gpu") != str(gpus > 0):
        yield f"--cluster.gpu must be {gpus > 0}"
    places = sum(count * (amount(limits.get(GPU, 0)) or amount(limits.get("cpu", 0)) // cpus) for count, limits in pods)
    search = "robustscale.frontier" in command
    if workers > places if search else workers != places:
        yield f"--cluster.workers {workers} for {places:g} places"
    for count, limits in pods:
        if count and (amount(limits.get(GPU, 0)) or 1) * cpus > amount(limits.get("cpu", 0)):
            yield f"{limits.get('cpu')} CPUs of a pod are too few for its workers of {cpus}"


def _limits(template: Document) -> dict[str, str]:
    limits: dict[str, str] = template["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return limits


def _lasting(command: str, document: Document) -> Iterator[str]:
    """A retry finds what the job before it left, on any node."""
    given = options(command)
    if not re.fullmatch("[a-z][a-z0-9-]*", given.get("run-name", "")):
        yield "without a fixed --run-name a retry begins anew"
    if f"robustscale.{document['metadata'].get('labels', {}).get(COMPONENT)}" not in command:
        yield "runs another door than its label says"
    if not float(given.get("cluster.wait", 60)) >= 600:
        yield "--cluster.wait: nodes take minutes to come"
    paths = {option: given.get(option, "") for option in ("storage", "data.root")}
    paths |= {"data.source": given["data.source"]} if given.get("data.source", "").startswith("/") else {}
    for name, template in templates(document):
        if name == "submitter":
            continue
        kept = [path + "/" for path in _kept(template["spec"])]
        for option, path in paths.items():
            if option == "storage" and is_url(path):
                if not secrets_of(template["spec"]["containers"][0]):
                    yield f"{name}: has no keys for --{option} {path}"
            elif not any(path.startswith(mount) for mount in kept):
                yield f"{name}: --{option} {path} is in no lasting volume"
    if any("spot" in str(group["template"]["spec"].get("tolerations")) for group in groups(document)):
        patience = {"robustscale.pretrain": "cluster.max-failures", "robustscale.frontier": "retries"}
        option = next((option for door, option in patience.items() if door in command), "")
        if int(given.get(option, 0)) < 10:
            yield f"--{option}: preemptible nodes go away more often"
    if cluster_of(document).get("enableInTreeAutoscaling"):
        yield "a job has a fixed number of workers"


def _kept(pod: Document) -> list[str]:
    claims = {volume["name"] for volume in pod.get("volumes", []) if "persistentVolumeClaim" in volume}
    mounts = pod["containers"][0].get("volumeMounts", [])
    return [mount["mountPath"] for mount in mounts if mount.get("name") in claims and not mount.get("readOnly")]
