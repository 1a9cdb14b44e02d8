"""A run that goes on with the workers that there is room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.elastic import largest
from robustscale.engine.folder import RunFolder
from robustscale.run import Cluster, Run
from tests.edges.conftest import free_port
from tests.edges.machines import SMALL, assert_as_undisturbed, driver, kill_group, machines, wait_for_step


@pytest.mark.parametrize(
    "workers, least, places, size",
    [(4, None, 4, 4), (4, None, 3, None), (4, 1, 3, 2), (4, 2, 1, None), (8, 1, 7, 4), (8, 1, 100, 8), (2, 1, 0, None)],
)
def test_the_largest_number_that_divides_the_shards(workers: int, least: int | None, places: int, size: int) -> None:
    run = Run(shards=8, cluster=Cluster(workers=workers, min_workers=least))
    assert largest(run, places) == size


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_two_four(tmp_path: Path) -> None:
    """Nodes of two CPUs: one is lost, then another comes. The weights are bitwise those of one undisturbed process."""
    folder = RunFolder(tmp_path / "run")
    options = [*SMALL, "--storage", tmp_path, "--run-name", "run", "--epochs", 90, "--reduction", "deterministic"]
    options += ["--cluster.workers", 4, "--cluster.min-workers", 2, "--cluster.max-failures", 1]
    with machines(tmp_path, 2, 2) as cluster, driver(cluster.env, *options) as run:
        wait_for_step(folder, 25, run)
        kill_group(cluster.nodes[1])
        lost, _ = run.wait_for(r"2 of 4 workers")
        cluster.add_node(2)
        grown, _ = run.wait_for(r"there is room for 4 workers: saving a checkpoint", after=lost)
        run.wait_for(r"4 workers up", after=grown)
        assert run.wait() == 0, run.output
    assert_as_undisturbed(folder, tmp_path)


AUTOSCALED = """
cluster_name: scaled
max_workers: 2
upscaling_speed: 1.0
idle_timeout_minutes: 100
provider:
  type: fake_multinode
  gcs_address: "127.0.0.1:PORT"
  use_node_id_as_ip: true
  disable_node_updaters: true
  disable_launch_config_check: true
auth: {}
docker: {}
file_mounts: {}
file_mounts_sync_continuously: false
cluster_synced_files: []
rsync_exclude: []
rsync_filter: []
initialization_commands: []
setup_commands: []
head_setup_commands: []
worker_setup_commands: []
head_start_ray_commands: []
worker_start_ray_commands: []
head_node_type: ray.head.default  # by this name the provider knows the node that is there
available_node_types:
  ray.head.default: {resources: {CPU: 0}, node_config: {}, max_workers: 0}
  cpu: {resources: {CPU: 1, object_store_memory: 100000000}, node_config: {}, max_workers: 2}
  gpu: {resources: {GPU: 1, object_store_memory: 100000000}, node_config: {}, max_workers: 1}
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cluster_that_is_scaled_to_nothing_grows(tmp_path: Path) -> None:
    """By Ray's autoscaler, with its provider of nodes on one machine; nodes come by a run's asking alone."""
    config = tmp_path / "autoscaler.yaml"
    port = free_port()
    config.write_text(AUTOSCALED.replace("PORT", str(port)))
    env = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    options = [*SMALL, "--storage", tmp_path, "--run-name", "run", "--epochs", 2, "--cluster.wait", 300]
    with (
        machines(tmp_path, env=env, more=["--autoscaling-config", str(config)], port=port) as cluster,
        driver(cluster.env, *options, "--cluster.gpu", False) as run,
    ):
        assert run.wait() == 0, run.output
    assert "waiting for the cluster: 2 workers need 2 CPUs (it has 0, 0 free)" in run.output
