"""The files for Ray's cluster launcher, by Ray's own checks and by our rules; and seeded mistakes, which these find."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parents[2]
FILES = ("ray-aws.yaml", "ray-machines.yaml")
Config = dict[str, Any]


def read(name: str) -> Config:
    loaded: Config = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return loaded


def problems(config: Config) -> list[str]:
    try:
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError, KeyError, click.ClickException) as error:
        return [f"Ray: {getattr(error, 'message', error)}"]
    return [
        *field_problems(config),
        *start_problems(config),
        *safety_problems(config),
        *node_problems(config),
        *checkout_problems(config),
    ]


def field_problems(config: Config) -> Iterator[str]:
    """Ray's schema lets a provider have any field."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    known = schema["properties"]["provider"]["properties"].keys()
    yield from (f"provider.{name} is no field of Ray's" for name in set(config["provider"]) - known)


def starts(config: Config) -> Iterator[tuple[str, str, list[str]]]:
    """(head or worker, the shell line, the words after `ray start`)."""
    for kind in ("head", "worker"):
        lines = [line for line in config.get(f"{kind}_start_ray_commands", []) if "ray start" in line]
        for line in lines:
            yield kind, line, shlex.split(line.partition("ray start")[2])


def start_problems(config: Config) -> Iterator[str]:
    """By the parser of `ray start` itself."""
    kinds = []
    for kind, line, words in starts(config):
        kinds.append(kind)
        try:
            given = start.make_context("start", list(words)).params
        except click.ClickException as error:
            yield f"{kind}: {error.format_message()}"
            continue
        if given["head"] != (kind == "head"):
            yield f"{kind}: --head"
        if kind == "head" and not given["autoscaling_config"]:
            yield "the head does not scale without --autoscaling-config"
        if kind == "worker" and given["address"] != "$RAY_HEAD_IP:6379":
            yield f"a worker joins {given['address']}"
        if given["metrics_export_port"] != 8080:
            yield f"{kind}: Prometheus looks at port 8080"
        if given["object_store_memory"] is None:
            yield f"{kind}: Ray takes 30 % of the memory, in /dev/shm"
        if "ulimit -n" not in line:
            yield f"{kind}: Ray needs many open files"
        if kind == "head" and "RAY_JOB_STOP_WAIT_TIME_S=30" not in line:
            yield "`ray job stop` kills a run 3 s after it asked it to save"
    if kinds != ["head", "worker"]:
        yield f"Ray is started on {kinds}"


def safety_problems(config: Config) -> Iterator[str]:
    for kind, line, words in starts(config):
        if "RAY_AUTH_MODE=token" not in line:
            yield f"{kind}: without token authentication"
        if kind == "head" and "--dashboard-host=127.0.0.1" not in words:
            yield "the dashboard is open to the network"
    mounts = config.get("file_mounts", {})
    (token,) = [path for path in mounts if path.endswith("/.ray/auth_token")] or [None]
    if token is None or not any(re.search(r"chmod 600 ~/.ray/auth_token$", c) for c in config["setup_commands"]):
        yield "the token is not on every node, for its user alone"
    if "docker" in config:
        yield "a container has its own /dev/shm and home"


def node_problems(config: Config) -> Iterator[str]:
    if config["provider"]["type"] != "aws":
        return
    types = config["available_node_types"]
    for name, kind in types.items():
        node = kind["node_config"]
        is_head = name == config["head_node_type"]
        if ("InstanceMarketOptions" in node) == is_head:
            yield f"{name}: the workers are spot instances, and the head is not"
        if not node.get("SecurityGroupIds"):
            yield f"{name}: Ray's own security group is open to the world at port 22"
        if not node.get("IamInstanceProfile"):
            yield f"{name}: may not read the bucket"
        if not all(disk["Ebs"].get("Encrypted") for disk in node.get("BlockDeviceMappings", [{"Ebs": {}}])):
            yield f"{name}: the disk is not encrypted"
        if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name}: any request may fetch the role's keys"
    if types[config["head_node_type"]]["resources"].get("CPU") != 0:
        yield "a worker of the run may come to lie on the head"
    if config["max_workers"] < sum(kind.get("max_workers", 0) for kind in types.values()):
        yield "max_workers is less than that of the nodes"
    if config["provider"].get("cache_stopped_nodes", True):
        yield "stopped machines stay, and are paid for"


def checkout_problems(config: Config) -> Iterator[str]:
    mounted = [path for path, source in config.get("file_mounts", {}).items() if source == "."]
    if len(mounted) != 1 or Path(mounted[0]).name != "robustscale":
        yield "the checkout is not mounted at ~/robustscale"
    if "cd ~/robustscale && ./setup.sh" not in config["setup_commands"]:
        yield "nodes are not set up as a checkout is"
    if not {".venv", ".git"} <= set(config.get("rsync_exclude", [])):
        yield "this machine's .venv would be copied"


@pytest.mark.parametrize("name", FILES)
def test_ray_and_our_rules_have_nothing_against_it(name: str) -> None:
    assert problems(read(name)) == []


def start_with(config: Config, kind: str, old: str, new: str) -> None:
    lines = config[f"{kind}_start_ray_commands"]
    assert old in lines[-1]
    lines[-1] = lines[-1].replace(old, new)


AWS, MACHINES = FILES
MISTAKES: dict[str, tuple[str, Callable[[Config], Any], str]] = {
    "a misspelt field": (AWS, lambda c: c.update(max_worker=4), "max_worker"),
    "a misspelt field of the provider": (AWS, lambda c: c["provider"].update(regoin="x"), "regoin"),
    "a misspelt field of ssh": (MACHINES, lambda c: c["auth"].update(ssh_usr="x"), "ssh_usr"),
    "a misspelt field of a node": (AWS, lambda c: c["available_node_types"]["spot"].update(min_worker=1), "min_worker"),
    "no provider": (AWS, lambda c: c.pop("provider"), "provider"),
    "another head's name": (AWS, lambda c: c.update(head_node_type="haed"), "head_node_type"),
    "more workers at least than at most": (AWS, lambda c: c.update(max_workers=1), "max_workers"),
    "a fraction of a GPU": (
        AWS,
        lambda c: c["available_node_types"]["spot"]["resources"].update(GPU=0.5),
        "0.5 is not of type 'integer'",
    ),
    "no workers' addresses": (MACHINES, lambda c: c["provider"].pop("worker_ips"), "worker_ips"),
    "node types on one's own machines": (MACHINES, lambda c: c.update(available_node_types={"x": {}}), "not supported"),
    "a misspelt option": (AWS, lambda c: start_with(c, "head", "--head", "--haed"), "--haed"),
    "a word for a number": (AWS, lambda c: start_with(c, "worker", "2000000000", "2GB"), "2GB"),
    "a worker that is a head": (
        AWS,
        lambda c: start_with(c, "worker", "--address=$RAY_HEAD_IP:6379", "--head"),
        "head",
    ),
    "a worker at another port": (MACHINES, lambda c: start_with(c, "worker", ":6379", ":6380"), "joins"),
    "a head that does not scale": (
        AWS,
        lambda c: start_with(c, "head", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        "does not scale",
    ),
    "no start of the workers": (MACHINES, lambda c: c.update(worker_start_ray_commands=[]), "is started on"),
    "no token": (MACHINES, lambda c: start_with(c, "worker", "RAY_AUTH_MODE=token ", ""), "token"),
    "no token's file": (AWS, lambda c: c["file_mounts"].pop("/home/ubuntu/.ray/auth_token"), "token"),
    "a token for all to read": (AWS, lambda c: c["setup_commands"].pop(), "token"),
    "an open dashboard": (AWS, lambda c: start_with(c, "head", "127.0.0.1", "0.0.0.0"), "dashboard"),
    "Ray's default for the dashboard": (
        MACHINES,
        lambda c: start_with(c, "head", "--dashboard-host=127.0.0.1 ", ""),
        "dashboard",
    ),
    "a container": (AWS, lambda c: c.update(docker={"image": "x", "container_name": "y"}), "/dev/shm"),
    "metrics elsewhere": (AWS, lambda c: start_with(c, "worker", "8080", "8081"), "8080"),
    "all of /dev/shm for Ray": (
        AWS,
        lambda c: start_with(c, "worker", "--object-store-memory=2000000000", ""),
        "/dev/shm",
    ),
    "few open files": (AWS, lambda c: start_with(c, "head", "ulimit -n 65536 && ", ""), "open files"),
    "a head on spot": (
        AWS,
        lambda c: c["available_node_types"]["head"]["node_config"].update(InstanceMarketOptions={"MarketType": "spot"}),
        "spot",
    ),
    "ssh for the world": (
        AWS,
        lambda c: c["available_node_types"]["spot"]["node_config"].pop("SecurityGroupIds"),
        "security group",
    ),
    "no role": (AWS, lambda c: c["available_node_types"]["spot"]["node_config"].pop("IamInstanceProfile"), "bucket"),
    "keys for any request": (
        AWS,
        lambda c: c["available_node_types"]["spot"]["node_config"].pop("MetadataOptions"),
        "keys",
    ),
    "work on the head": (AWS, lambda c: c["available_node_types"]["head"].update(resources={}), "on the head"),
    "stopped machines": (AWS, lambda c: c["provider"].pop("cache_stopped_nodes"), "paid for"),
    "no checkout": (MACHINES, lambda c: c["file_mounts"].pop("/home/robustscale/robustscale"), "checkout"),
    "no set-up": (MACHINES, lambda c: c["setup_commands"].pop(0), "set up"),
    "this machine's environment": (MACHINES, lambda c: c.update(rsync_exclude=[".git"]), ".venv"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: str) -> None:
    name, make, expected = MISTAKES[mistake]
    config = copy.deepcopy(read(name))
    make(config)
    assert any(expected in problem for problem in problems(config)), problems(config)
