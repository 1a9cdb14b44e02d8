"""What a person writes becomes a Run or a line that says what, where and what instead."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any

import pytest
import yaml

from robustscale.attacks.base import Goal
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.config import KINDS, component_name, components, decode, encode, override, override_threats
from robustscale.engine.optim import SGD, AdamW
from robustscale.engine.schedule import Cosine, Piecewise
from robustscale.errors import InputError
from robustscale.models.resnet import ResNet
from robustscale.objectives.adversarial_regularization import AdversarialRegularization
from robustscale.objectives.natural import Natural
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Checkpoints, Cluster, Data, Evaluation, Run, identity, same_result
from robustscale.threat import L2, Linf
from robustscale.types import Attack, Objective

COMPONENTS = [(kind, name, cls) for kind in KINDS for name, cls in components(kind).items()]


def with_threat(eps: float) -> Run:
    return Run(objective=PgdAt(attack=PGD(threat=Linf(eps), steps=3), beta=0.5))


# --- Components


def test_every_kind_has_components_and_their_names() -> None:
    names = {kind.__name__: list(components(kind)) for kind in KINDS}
    assert names["Objective"] == sorted(names["Objective"])
    assert {"pgd_at", "trades", "natural", "fgsm_regularization", "adversarial_regularization"} <= set(
        names["Objective"]
    )
    assert {"fgsm", "pgd"} <= set(names["Attack"])
    assert names["Threat"] == ["l2", "linf"]
    assert names["Optimizer"] == ["adamw", "sgd"]
    assert {"constant", "piecewise", "step", "cosine", "onecycle"} == set(names["Schedule"])
    assert "resnet" in names["Model"]


@pytest.mark.parametrize("kind, name, cls", COMPONENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_round_trip_of_every_component(kind: type, name: str, cls: type) -> None:
    component = cls()
    data = encode(component)
    assert data["name"] == name == component_name(component)
    assert decode(kind, json.loads(json.dumps(data, allow_nan=False))) == component
    assert decode(kind, yaml.safe_load(yaml.safe_dump(data))) == component
    assert decode(kind, {"name": name}) == component, "what is left out is the default"
    assert hash(component) == hash(cls())


@pytest.mark.parametrize("kind, name, cls", COMPONENTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_field_of_every_component_survives_a_change(kind: type, name: str, cls: type) -> None:
    """Each number and switch is changed, as far as the component's own checks allow, and found again."""
    for field in dataclasses.fields(cls):
        value = getattr(cls(), field.name)
        if typing.get_origin(typing.get_type_hints(cls)[field.name]) is typing.Literal:
            continue
        others: list[Any] = []
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, (int, float)):
            others = [value + 1, value + 4, value / 2, value + 0.01]
        for other in others:
            if type(other) is type(value):
                try:
                    changed = cls(**{field.name: other})
                except InputError:
                    continue
                data = json.loads(json.dumps(encode(changed)))
                assert data[field.name] == other
                assert decode(kind, data) == changed


def test_a_plain_dataclass_has_no_name() -> None:
    assert component_name(Goal()) is None
    assert component_name(Run()) is None
    assert "name" not in encode(Data())


# --- Runs


FULL = Run(
    name="full-1",
    data=Data(source="cifar10", augmentation="pad_crop_flip", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), image_size=28),
    model=ResNet(),
    objective=Trades(PGD(threat=L2(0.5), step_size=0.1, start="uniform", restarts=2), beta=3.0, batchnorm="batch"),
    optimizer=AdamW(lr=1e-4, betas=(0.8, 0.95)),
    schedule=Piecewise(milestones=(0.1, 0.2, 0.9), gamma=0.5, warmup_epochs=2.5),
    evaluation=Evaluation(
        attack=FGSM(random_start=True, alpha=1.1), goal=Goal("predicted", 3), patience=4, report="last"
    ),
    checkpoints=Checkpoints(every_steps=100, keep=3),
    cluster=Cluster(workers=4, gpu=False, max_failures=0, wait=1.5),
    epochs=3,
    batch_size=100,
    seed=9,
    precision="bf16",
    clip=1.0,
    reduction="deterministic",
)


@pytest.mark.parametrize("run", [Run(), FULL, with_threat(4 / 255)], ids=["default", "full", "threat"])
def test_round_trip_of_runs(run: Run) -> None:
    data = encode(run)
    assert decode(Run, json.loads(json.dumps(data, allow_nan=False))) == run
    assert decode(Run, yaml.safe_load(yaml.safe_dump(data))) == run
    assert encode(decode(Run, data)) == data
    assert decode(Run, run) == run
    assert override(run, {}) == run
    assert override(Run(), data) == run


def test_an_empty_mapping_is_the_default() -> None:
    assert decode(Run, {}) == Run()


def test_runs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("text", ["8/255", " 8 / 255", "0.03137254901960784", 8 / 255])
def test_a_length_may_be_a_fraction(text: object) -> None:
    change = {"objective": {"attack": {"threat": {"eps": text}, "step_size": "2/255"}}}
    for given in (change, yaml.safe_load(yaml.safe_dump(change)), json.loads(json.dumps(change))):
        run = override(Run(), given)
        assert run.objective == PgdAt(attack=PGD(threat=Linf(8 / 255), step_size=2 / 255))


def test_numbers_that_yaml_reads_as_text() -> None:
    """YAML 1.1 takes 1e-3, without a point, for a string."""
    assert override(Run(), yaml.safe_load("optimizer: {lr: 1e-3}")).optimizer == SGD(lr=1e-3)
    assert override(Run(), {"epochs": "12"}).epochs == 12


# --- Overrides


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    run = override(FULL, {"epochs": 7, "optimizer": {"lr": 0.5}, "objective": {"attack": {"threat": {"eps": 0.25}}}})
    attack = dataclasses.replace(FULL.objective.attack, threat=L2(0.25))  # type: ignore[attr-defined]
    objective = dataclasses.replace(FULL.objective, attack=attack)  # type: ignore[type-var]
    optimizer = AdamW(lr=0.5, betas=(0.8, 0.95))
    assert run == dataclasses.replace(FULL, epochs=7, objective=objective, optimizer=optimizer)
    assert FULL.epochs == 3, "the original is as it was"


@pytest.mark.parametrize("change", ["trades", {"name": "trades"}])
def test_naming_another_objective_keeps_the_threat_model_alone(change: object) -> None:
    run = override(with_threat(4 / 255), {"objective": change})
    assert run.objective == Trades(attack=dataclasses.replace(Trades().attack, threat=Linf(4 / 255)))  # type: ignore[type-var]
    assert run.evaluation == Evaluation()


def test_naming_another_attack_keeps_the_threat_model() -> None:
    run = override(with_threat(4 / 255), {"objective": {"attack": "fgsm"}, "evaluation": {"attack": {"name": "fgsm"}}})
    assert run.objective == PgdAt(attack=FGSM(threat=Linf(4 / 255)), beta=0.5)
    assert run.evaluation.attack == FGSM(threat=Linf())


def test_a_threat_that_is_named_wins() -> None:
    change = {"objective": {"name": "adversarial_regularization", "lam": 2, "attack": {"threat": "l2", "steps": 5}}}
    objective = override(with_threat(4 / 255), change).objective
    assert objective == AdversarialRegularization(attack=PGD(threat=L2(), steps=5), lam=2.0)
    change = {"objective": {"name": "trades", "attack": {"threat": {"name": "l2", "eps": "64/255"}}}}
    assert override(with_threat(4 / 255), change).objective.attack.threat == L2(64 / 255)  # type: ignore[attr-defined]


def test_naming_the_same_component_changes_nothing() -> None:
    run = with_threat(4 / 255)
    assert override(run, {"objective": "pgd_at"}) == run
    assert override(run, {"objective": {"name": "pgd_at", "attack": {"name": "pgd"}}}) == run


def test_natural_training_has_no_threat_to_keep() -> None:
    run = override(with_threat(4 / 255), {"objective": "natural"})
    assert run.objective == Natural()
    assert override(run, {"objective": "trades"}).objective == Trades()


def test_other_components_take_their_defaults() -> None:
    run = override(FULL, {"optimizer": "sgd", "schedule": {"name": "cosine", "floor": 0.5}})
    assert run.optimizer == SGD() and run.schedule == Cosine(floor=0.5)


def test_null_is_for_what_may_be_left_out() -> None:
    assert override(FULL, {"clip": None, "evaluation": {"patience": None}}).clip is None
    for name in ("data", "objective", "model", "optimizer", "evaluation", "cluster"):
        with pytest.raises(InputError, match=f"^{name}: expected a mapping of fields, got None$"):
            override(Run(), {name: None})


# --- What is refused


WRONG: list[tuple[Any, str]] = [
    # unknown names, with the nearest
    ({"objectiv": "trades"}, "configuration: field: 'objectiv' is not known; did you mean 'objective'?"),
    ({"objective": "trade"}, "objective: 'trade' is not known; did you mean 'trades'?"),
    ({"objective": {"attack": "pdg"}}, "objective.attack: 'pdg' is not known; did you mean 'pgd'?"),
    ({"objective": {"attack": {"stepz": 1}}}, "objective.attack: field: 'stepz' is not known; did you mean 'steps'?"),
    ({"objective": {"attack": {"threat": "l3"}}}, "objective.attack.threat: 'l3' is not known; did you mean 'l2'?"),
    ({"data": {"sourse": "x"}}, "data: field: 'sourse' is not known; did you mean 'source'?"),
    ({"optimizer": "xyz"}, "optimizer: 'xyz' is not known; choose one of adamw, sgd"),
    ({"optimizer": {"name": ["sgd"]}}, "optimizer: ['sgd'] is not known; "),
    ({"optimizer": {"name": None}}, "optimizer: None is not known; choose one of adamw, sgd"),
    ({7: 1}, "configuration: field: 7 is not known; choose one of name, data,"),
    ({"cluster": {"name": "a"}}, "cluster: field: 'name' is not known; "),
    # wrong types, with the path
    ([1], "configuration: expected a mapping of fields, got [1]"),
    ({"cluster": 5}, "cluster: expected a mapping of fields, got 5"),
    ({"cluster": "big"}, "cluster: expected a mapping of fields, got 'big'"),
    ({"objective": ["trades"]}, "objective: expected a mapping of fields, got ['trades']"),
    ({"epochs": 2.5}, "epochs: 2.5 will not do: Input should be a valid integer"),
    ({"epochs": "many"}, "epochs: 'many' will not do: Input should be a valid integer"),
    ({"epochs": True}, "epochs: True will not do: Input should be a valid number"),
    ({"seed": False}, "seed: False will not do: Input should be a valid number"),
    ({"optimizer": {"lr": True}}, "optimizer.lr: True will not do: Input should be a valid number"),
    ({"objective": {"goal": {"target": True}}}, "objective.goal.target: True will not do: "),
    ({"optimizer": {"nesterov": "maybe"}}, "optimizer.nesterov: 'maybe' will not do: Input should be a valid boolean"),
    ({"name": 3}, "name: 3 will not do: Input should be a valid string"),
    ({"data": {"held_out": "a"}}, "data.held_out: 'a' will not do: Input should be a valid number"),
    ({"data": {"mean": 0.5}}, "data.mean: 0.5 will not do: Input should be a valid tuple"),
    ({"schedule": {"milestones": [0.1, "a"]}}, "schedule.milestones: [0.1, 'a'] will not do: "),
    ({"optimizer": {"name": "adamw", "betas": [0.9]}}, "optimizer.betas: [0.9] will not do: "),
    ({"precision": "fp8"}, "precision: 'fp8' will not do: Input should be 'fp32', 'bf16' or 'fp16'"),
    ({"objective": {"attack": {"start": "x"}}}, "objective.attack.start: 'x' will not do: Input should be 'uniform'"),
    # numbers that are none
    ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: nan will not do: Input should be a finite number"),
    ({"objective": {"beta": float("inf")}}, "objective.beta: inf will not do: Input should be a finite number"),
    *[
        ({"objective": {"attack": {"threat": {"eps": text}}}}, f"objective.attack.threat.eps: {text!r} will not do: ")
        for text in ("8/0", "8/", "eight", "", "nan", "1e400", "-inf", "1e999999999", "1" * 400 + "/3")
    ],
    # outside the range
    ({"objective": {"attack": {"threat": {"eps": 8}}}}, "objective.attack.threat.eps: 8.0 is outside [0, 1]; "),
    ({"objective": {"attack": {"threat": {"eps": -0.1}}}}, "objective.attack.threat.eps: -0.1 is outside [0, 1]; "),
    ({"objective": {"attack": {"steps": 0}}}, "objective.attack.steps: 0 is below 1; "),
    ({"objective": {"name": "trades", "beta": -1}}, "objective.beta: -1.0 is negative; 6 is the paper's default"),
    ({"objective": {"beta": 1.5}}, "objective.beta: 1.5 is outside [0, 1]; "),
    ({"optimizer": {"lr": 0}}, "optimizer.lr: 0.0 is not positive; "),
    ({"schedule": {"milestones": [100, 150]}}, "schedule.milestones: (100.0, 150.0) must rise within (0, 1); "),
    ({"data": {"held_out": 1}}, "data.held_out: 1.0 is outside [0, 1); "),
    ({"data": {"padding": -1}}, "data.padding: -1 is negative"),
    ({"data": {"image_size": 0}}, "data.image_size: 0 is below 1"),
    ({"data": {"workers": -1}}, "data.workers: -1 is negative; "),
    ({"data": {"std": [0.2, 0]}}, "data.std: (0.2, 0.0) must be positive"),
    ({"data": {"mean": [1, 2], "std": [1]}}, "data.mean, std: (1.0, 2.0) and (1.0,) differ in length; "),
    ({"data": {"augmentation": "random_resized_crop"}}, "data.augmentation: random_resized_crop needs image_size; "),
    ({"evaluation": {"every": 0}}, "evaluation.every: 0 is below 1; "),
    ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size: 0 is below 1"),
    ({"evaluation": {"patience": 0}}, "evaluation.patience: 0 is below 1; "),
    (
        {"evaluation": {"patience": 3}, "data": {"held_out": 0}},
        "evaluation.patience: early stopping needs a held-out part; ",
    ),
    ({"checkpoints": {"keep": 0}}, "checkpoints.keep: 0 is below 1; "),
    ({"checkpoints": {"every_epochs": 0}}, "checkpoints.every_epochs: 0 is below 1"),
    ({"checkpoints": {"every_steps": 0}}, "checkpoints.every_steps: 0 is below 1"),
    ({"cluster": {"workers": 0}}, "cluster.workers: 0 is below 1"),
    ({"cluster": {"cpus_per_worker": 0}}, "cluster.cpus_per_worker: 0 is below 1"),
    ({"cluster": {"max_failures": -1}}, "cluster.max_failures: -1 is negative; "),
    ({"cluster": {"wait": -1}}, "cluster.wait: -1.0 is negative; "),
    ({"cluster": {"workers": 3}}, "shards: 8 is not a multiple of the 3 workers; take 9"),
    ({"cluster": {"workers": 16}, "shards": 8}, "shards: 8 is not a multiple of the 16 workers; take 16"),
    ({"shards": 0}, "shards: 0 is not a multiple of the 2 workers; take 2"),
    ({"batch_size": 1}, "batch_size: 1 is smaller than the 2 workers; "),
    ({"batch_size": 7}, "batch_size: 7 is below the 8 logical shards; lower shards to 2"),
    ({"batch_size": 15, "reduction": "deterministic"}, "batch_size: 15 gives the 8 shards fewer than 2 images each"),
    ({"epochs": 0}, "epochs: 0 is below 1"),
    ({"log_every": 0}, "log_every: 0 is below 1; "),
    ({"clip": 0}, "clip: 0.0 is not positive; "),
    ({"seed": -1}, "seed: -1 is outside 0..2^63 - 1"),
    *[({"name": name}, f"name: {name!r} will not do; ") for name in ("", "a/b", "..", ".a", "a b", "x" * 65, "a\n")],
]


@pytest.mark.parametrize("change, message", WRONG, ids=lambda value: repr(value)[:60])
def test_what_is_wrong_is_said_in_a_line_with_its_path(change: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        override(Run(), change)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_decode_is_strict() -> None:
    wrong: list[tuple[Any, str]] = [
        (None, "configuration: expected a mapping of fields, got None"),
        ({"objective": "trades"}, "objective: expected a mapping of fields, got 'trades'"),
        ({"objective": {}}, "objective.name: missing; choose one of adversarial_regularization, "),
        ({"objective": {"name": "trades", "attack": None}}, "objective.attack: expected a mapping of fields, got None"),
        ({"objective": {"name": "pgd"}}, "objective: 'pgd' is not known; did you mean 'pgd_at'?"),
        ({"old_field": 1}, "configuration: field: 'old_field' is not known; "),
    ]
    for data, message in wrong:
        with pytest.raises(InputError) as caught:
            decode(Run, data)
        assert str(caught.value).startswith(message)


def test_an_attack_is_no_objective() -> None:
    """Both are callables; only the package that a class is in tells them apart."""
    assert not set(components(Attack)) & set(components(Objective))
    with pytest.raises(InputError, match="'trades' is not known; choose one of"):
        override(Run(), {"objective": {"attack": "trades"}})


# --- Identity: may this run go on from that run's checkpoint?


@pytest.mark.parametrize(
    "change, same",
    [
        ({"name": "other"}, True),
        ({"cluster": {"workers": 4}}, True),
        ({"checkpoints": {"keep": 5}}, True),
        ({"log_every": 3}, True),
        ({"data": {"root": "/elsewhere", "loader": "torch", "workers": 3}}, True),
        ({"seed": 1}, False),
        ({"epochs": 199}, False),
        ({"data": {"held_out": 0.2}}, False),
        ({"objective": {"beta": 0.1}}, False),
        ({"precision": "bf16"}, False),
        ({"shards": 16}, False),
    ],
)
def test_identity_is_what_determines_the_result(change: dict[str, Any], same: bool) -> None:
    assert (identity(override(Run(), change)) == identity(Run())) is same
    assert identity(Run()) == json.loads(json.dumps(identity(Run())))


def test_a_field_that_came_later_changes_no_identity_but_by_its_value() -> None:
    def of(**changes: Any) -> str:
        return json.dumps(identity(override(Run(), changes)))

    apgd = {"name": "apgd", "steps": 2}
    plain = of(objective={"attack": apgd}, model={"name": "conditional", "model": {"name": "resnet", "depth": 50}})
    assert "bottleneck" not in plain and '"start"' not in plain.partition('"evaluation"')[0]
    assert '"start": "none"' in of(objective={"attack": {**apgd, "start": "none"}})
    assert '"bottleneck": 2' in of(model={"depth": 50, "bottleneck": 2})
    wide = override(Run(), {"model": {"depth": 50, "bottleneck": 2}})
    assert same_result(identity(wide), wide) and not same_result(identity(Run()), wide)


def test_one_change_reaches_every_threat_model() -> None:
    run = override_threats(Run(), {"name": "l2"})
    run = override_threats(run, {"eps": "64/255"})
    threats = [run.objective.attack.threat, run.evaluation.attack.threat, run.evaluation.monitor.threat]  # type: ignore[attr-defined]
    assert threats == [L2(64 / 255)] * 3
    with pytest.raises(InputError, match="did you mean 'linf'"):
        override_threats(Run(), {"name": "lin"})
    assert override_threats(Run(name="l2"), {"eps": 0.1}).evaluation.attack == PGD(Linf(0.1), steps=20)


def test_a_step_size_goes_with_its_threat_model() -> None:
    """2/255 in linf says nothing of l2, and twenty such steps would not reach the ball."""
    run = Run(objective=PgdAt(PGD(Linf(8 / 255), step_size=2 / 255)))
    assert override_threats(run, {"eps": "4/255"}).objective == PgdAt(PGD(Linf(4 / 255), step_size=1 / 255))
    assert override_threats(run, {"name": "l2"}).objective == PgdAt(PGD(L2()))
    assert override(run, {"objective": {"attack": {"threat": "l2"}}}).objective == PgdAt(PGD(L2()))
    kept = {"objective": {"attack": {"threat": "l2", "step_size": 0.1}}}
    assert override(run, kept).objective == PgdAt(PGD(L2(), step_size=0.1))
    # The default of another objective is for another radius than the one that is kept.
    changed = override(run, {"objective": "adversarial_regularization"}).objective
    assert changed.attack.threat == Linf(8 / 255)  # type: ignore[attr-defined]
    assert changed.attack.step_size == pytest.approx(0.007 * (8 / 255) / 0.03)  # type: ignore[attr-defined]
