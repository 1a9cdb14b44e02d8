"""All that is checked of what an overlay renders to."""

from __future__ import annotations

from tests.k8s.commands import command_problems
from tests.k8s.operators import kuberay_problems, kueue_problems
from tests.k8s.policy import policy_problems
from tests.k8s.rendering import Document
from tests.k8s.schemas import schema_problems

SINGLE_NODE = "cpu-smoke"


def rule_problems(documents: list[Document], overlay: str) -> list[str]:
    """All but the schemas, which need the CRDs."""
    return [
        *kuberay_problems(documents),
        *kueue_problems(documents),
        *policy_problems(documents, several_nodes=overlay != SINGLE_NODE),
        *command_problems(documents),
    ]


def shape_problems(documents: list[Document]) -> list[str]:
    return [problem for document in documents for problem in schema_problems(document)]
