"""The nodes of the cluster: who has room, who is going away, and whether the data is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from robustscale.errors import InputError, LoaderFailed
from robustscale.run import Cluster, Data


def needs(cluster: Cluster, gpu: bool) -> dict[str, float]:
    """What a worker takes."""
    return {"CPU": float(cluster.cpus_per_worker), **({"GPU": 1.0} if gpu else {})}


def wants_gpu(cluster: Cluster) -> bool:
    """Whether workers take GPUs; where that is left open, if the cluster has any now: what an autoscaler could bring,
    open-source Ray does not tell."""
    if cluster.gpu is not None:
        return cluster.gpu
    import ray

    return bool(ray.cluster_resources().get("GPU", 0) >= 1)


def draining() -> set[str]:
    """Ids of the nodes that are about to go: preempted, scaled away, or told to end."""
    import ray

    return set(ray._private.state.state.get_draining_nodes())


def staying() -> set[str]:
    """Ids of the nodes that are there, and not about to go."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining()


def places(need: Mapping[str, float], ours: Iterable[str] = ()) -> int:
    """Workers that fit into what is free now on the nodes that stay, and in what workers of ours hold; of each, the
    node."""
    import ray

    held = Counter(ours)
    free = ray._private.state.available_resources_per_node()
    return sum(
        held[node] + int(min(free.get(node, {}).get(kind, 0.0) / amount for kind, amount in need.items()) + 1e-9)
        for node in staying()
    )


def prepare_nodes(data: Data, tick: Callable[[], object] = lambda: None) -> str | None:
    """Have every node that may run a worker prepare the data that it does not see; returns why one could not.

    Before the workers start: the others of a process group would wait for one that prepares ImageNet, and time out.
    A node that was lost without a farewell is found out here: Ray takes it for alive for some seconds. `tick` is called
    while waiting, and may raise. Raises InputError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.attempt import short
    from data_loaders.write import ensure

    those = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0}
    task = ray.remote(num_cpus=0, max_retries=0)(ensure)
    asked = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, False)).remote(data)
        for node in those - draining()
    }
    for node, answer in asked.items():
        try:
            while not ray.wait([answer], timeout=0.3)[0]:
                tick()
            ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise InputError(str(error.cause)) from None
            if isinstance(error.cause, LoaderFailed):
                return str(error.cause)
            raise
        except (ray.exceptions.RayError, ValueError) as error:
            if node in staying():
                return short(error)
    return None
