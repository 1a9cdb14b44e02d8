"""Every overlay, as it renders, against the schemas, the operators' rules and ours. Nothing here needs a cluster, and
nothing here was applied to one."""

from __future__ import annotations

import pytest

from tests.k8s.checks import rule_problems, shape_problems
from tests.k8s.policy import COMPONENT
from tests.k8s.rendering import OVERLAYS, rendered, title

pytestmark = pytest.mark.usefixtures("kubectl")
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def test_the_overlays_are_those_that_are_named_in_the_tests() -> None:
    assert OVERLAYS == ["a100-spot", "a100-spot-s3", "cpu-smoke", "h100-multinode"]


@each_overlay
@pytest.mark.usefixtures("crds")
def test_every_field_is_in_the_schema_of_who_reads_it(overlay: str) -> None:
    assert shape_problems(rendered(overlay)) == []


@each_overlay
def test_operators_policy_and_doors_have_nothing_to_say_against_it(overlay: str) -> None:
    assert rule_problems(rendered(overlay), overlay) == []


@each_overlay
def test_a_component_is_chosen_by_its_label(overlay: str) -> None:
    """`kubectl apply -k --selector` starts one thing; what all need is `common`."""
    workloads = {d["metadata"]["labels"][COMPONENT]: title(d) for d in rendered(overlay) if d["kind"].startswith("Ray")}
    usual = {"pretrain": "RayJob robustscale-pretrain", "frontier": "RayJob robustscale-frontier"}
    dev = {"dev": "RayCluster robustscale-dev"} if overlay != "h100-multinode" else {}
    assert workloads == usual | dev
