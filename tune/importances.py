"""What the searched fields have to do with an objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, create_trial

FEWEST = 8
BEST = 0.25
"""The share of trials that count as the best. Optuna takes a tenth: of 20 trials, two."""


def importances(
    complete: Sequence[FrozenTrial], index: int, direction: Literal["maximize", "minimize"]
) -> dict[str, float]:
    """Each field's share in what makes the best trials, by the objective number `index` alone, differ from all.

    PED-ANOVA (https://arxiv.org/abs/2304.10255), in its conditional form (https://arxiv.org/abs/2601.20800) for fields
    that only some trials have. The shares sum to 1; {} for fewer than 8
    trials, or where nothing tells the best from the rest.
    """
    values = [trial.values[index] for trial in complete]
    fields = _comparable(complete)
    if len(complete) < FEWEST or not fields or not _best_differ(values, direction):
        return {}
    # A study of this objective alone knows its direction; to Optuna's `target`, less would be better, always.
    alone = optuna.create_study(direction=direction)
    alone.add_trials(
        create_trial(params=trial.params, distributions=trial.distributions, value=value)
        for trial, value in zip(complete, values, strict=True)
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=BEST)
    return {
        name: float(share) for name, share in get_param_importances(alone, evaluator=evaluator, params=fields).items()
    }


def _best_differ(values: Sequence[float], direction: str) -> bool:
    """Whether the last of the best is better than the worst: else all that are tied with it count as the best."""
    ordered = sorted(values, reverse=direction == "maximize")
    return ordered[math.ceil(BEST * len(ordered)) - 1] != ordered[-1]


def _comparable(trials: Sequence[FrozenTrial]) -> list[str]:
    """Fields of which something can be said: no single trial has them or lacks them."""
    names = sorted({name for trial in trials for name in trial.params})
    have = {name: sum(name in trial.params for trial in trials) for name in names}
    return [name for name in names if have[name] > 1 and len(trials) - have[name] != 1]
