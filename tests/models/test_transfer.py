"""What is taken over from weights, and which files are refused."""

from __future__ import annotations

from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor

from robustscale.config import decode, encode, override
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.network import Network, build
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.stages import stages, within
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.transfer import Start, Transfer, begin, keeps_head, restrain
from robustscale.run import Run, identity, require_fit, same_result
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.types import DataSpec, Model

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.37,))
LARGE = DataSpec(3, 64, 64, 7, (0.5,) * 3, (0.25,) * 3)
MODEL = ResNetCifar(8, base=4)
DIGITS = tuple(map(str, range(10)))


def trained(model: Model = MODEL, spec: DataSpec = SPEC) -> dict[str, Tensor]:
    """Weights unlike those that are drawn with another seed, BatchNorm's statistics and shifts included."""
    state = build(model, spec, seed=11).state_dict()
    return {name: t + 0.25 if t.is_floating_point() else t + 3 for name, t in state.items()}


def started(tensors: dict[str, Tensor], *, head: bool, spec: DataSpec = SPEC, model: Model = MODEL) -> Network:
    network = build(model, spec, seed=3)
    begin(network, Start(tensors, None, "file.safetensors"), head=head)
    return network


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("head", [True, False])
def test_all_is_taken_over_but_the_normalisation_and_a_new_head(head: bool, prefix: str) -> None:
    tensors = trained()
    network = started({prefix + name: t for name, t in tensors.items()}, head=head)
    drawn = build(MODEL, SPEC, seed=3).state_dict()
    for name, t in network.state_dict().items():
        own = name.startswith("normalize.") or (name.startswith("body.fc.") and not head)
        assert torch.equal(t, drawn[name] if own else tensors[name]), name
    assert not torch.equal(drawn["body.fc.weight"], tensors["body.fc.weight"])


def test_a_bare_body_is_a_state_dict_too() -> None:
    tensors = trained()
    bare = {name.removeprefix("body."): t for name, t in tensors.items() if name.startswith("body.")}
    network = started(bare, head=True).state_dict()
    assert all(torch.equal(network[f"body.{name}"], t) for name, t in bare.items())


@pytest.mark.parametrize("arch, model", [("resnet18", ResNet()), ("resnet50", ResNet(50, width=1.0))])
def test_torchvisions_resnet_computes_the_same_in_ours(arch: str, model: ResNet) -> None:
    """Closed form: with the head kept the logits are torchvision's own, of the normalised image."""
    theirs = ensure_torchvision().models.get_model(arch, weights=None, num_classes=7)
    state = {name: t + 0.01 if t.is_floating_point() else t for name, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = started(state, head=True, spec=LARGE, model=ResNet(model.depth, stem="imagenet"))
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()((x - 0.5) / 0.25))


@pytest.mark.parametrize("model", [ResNet(stem="imagenet"), TorchvisionZoo("resnet18")])
def test_torchvisions_head_of_other_classes_is_replaced(model: Model) -> None:
    state = ensure_torchvision().models.resnet18(weights=None).state_dict()
    network = started(state, head=False, spec=LARGE, model=model)
    drawn = build(model, LARGE, seed=3).state_dict()
    found = network.state_dict()
    assert torch.equal(found["body.fc.weight"], drawn["body.fc.weight"]) and len(found["body.fc.bias"]) == 7
    assert torch.equal(found["body.conv1.weight"], state["conv1.weight"])
    last = "body.blocks.7" if isinstance(model, ResNet) else "body.layer4.1"
    assert torch.equal(found[f"{last}.conv2.weight"], state["layer4.1.conv2.weight"])
    with pytest.raises(InputError, match=r"such as body\.fc\.(weight|bias); take transfer.head new, or check model"):
        started(state, head=True, spec=LARGE, model=model)


WRONG: list[tuple[dict[str, Tensor], str]] = [
    ({name: t for name, t in trained().items() if name != "body.conv1.weight"}, "1 tensors .*body.conv1.weight; check"),
    ({**trained(), "body.other": torch.zeros(1)}, "1 tensors .* such as body.other; check model"),
    ({**trained(), "body.conv1.weight": torch.zeros(5, 1, 3, 3)}, "1 tensors .* body.conv1.weight; check model"),
    (trained(Basic()), r"file.safetensors does not fit the network: \d+ tensors differ"),
]


@pytest.mark.parametrize("tensors, message", WRONG)
def test_what_does_not_fit_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        started(tensors, head=False)
    assert "\n" not in str(error.value)


def test_counters_of_batches_may_be_missing() -> None:
    tensors = {name: t for name, t in trained().items() if not name.endswith("num_batches_tracked")}
    assert torch.equal(
        started(tensors, head=True).state_dict()["body.bn1.running_mean"], tensors["body.bn1.running_mean"]
    )


@pytest.mark.parametrize(
    "head, classes, kept",
    [
        ("auto", DIGITS, True),
        ("auto", DIGITS[::-1], False),
        ("auto", DIGITS[:9], False),
        ("auto", None, False),
        ("keep", None, True),
        ("keep", DIGITS[::-1], True),
        ("new", DIGITS, False),
    ],
)
def test_the_head_is_kept_where_the_classes_are_known_to_be_the_same(
    head: Literal["auto", "keep", "new"], classes: tuple[str, ...] | None, kept: bool
) -> None:
    assert keeps_head(Start({}, classes, ""), Transfer(head=head), DIGITS) is kept


def test_frozen_stages_stay_in_eval_mode_and_get_no_gradient() -> None:
    network = build(MODEL, SPEC).eval()
    restrain(network, Transfer(frozen=2))
    network.train()
    row = stages(network)
    for name, m in network.named_modules():
        frozen = any(within(name, stage) for stage in row[:2])
        assert m.training is not frozen, name
    for name, p in network.named_parameters():
        assert p.requires_grad is not any(within(name, stage) for stage in row[:2]), name


def test_each_stage_has_its_rate() -> None:
    network = build(MODEL, SPEC)
    restrain(network, Transfer(layer_decay=0.5, frozen=1))
    (optimizer,) = [Run().optimizer.build([p for p in network.parameters() if p.requires_grad])]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates.get(id(p)) for name, p in network.named_parameters()}
    assert [found[f"body.{name}"] for name in ("conv1.weight", "blocks.0.conv1.weight", "blocks.2.bn2.bias")] == [
        None,
        0.1 / 8,
        0.1 / 2,
    ]
    assert found["body.fc.weight"] == 0.1 == optimizer.param_groups[0]["lr"], "the rate that is reported is the head's"


def test_without_a_transfer_the_optimizer_has_one_group() -> None:
    """So that checkpoints of before stay readable."""
    network = build(MODEL, SPEC)
    restrain(network, Transfer())
    (group,) = Run().optimizer.build(list(network.parameters())).param_groups
    assert group["params"] == list(network.parameters()) and group["lr"] == 0.1


def test_the_last_stage_cannot_be_frozen() -> None:
    run = override(Run(model=MODEL), {"transfer": {"frozen": 5}})
    with pytest.raises(InputError, match=r"transfer\.frozen: 5 of 5 stages leaves nothing to train; 4 trains the head"):
        require_fit(run, SPEC, build(MODEL, SPEC))
    require_fit(override(run, {"transfer": {"frozen": 4}}), SPEC, build(MODEL, SPEC))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"frozen": -1}, "transfer.frozen: -1 is negative"),
        ({"layer_decay": 0.0}, "transfer.layer_decay: 0.0 is outside"),
        ({"layer_decay": 1.5}, "transfer.layer_decay: 1.5 is outside"),
        ({"sha256": "xy"}, "transfer.sha256: 'xy' is not up to 64"),
        ({"weights": ""}, "transfer.weights: is empty"),
        ({"head": "old"}, "transfer.head: 'old' will not do"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(Run(), {"transfer": change})


def test_the_digest_and_not_the_path_tells_runs_apart() -> None:
    run = override(Run(), {"transfer": {"weights": "/here/a.safetensors", "sha256": "ab"}})
    moved = override(run, {"transfer": {"weights": "/there/b.pth"}})
    other = override(run, {"transfer": {"sha256": "cd"}})
    assert decode(Run, encode(run)) == run
    assert identity(run) == identity(moved) and same_result(identity(run), moved)
    for different in (other, Run(), override(run, {"transfer": {"layer_decay": 0.5}})):
        assert identity(run) != identity(different) and not same_result(identity(run), different)


def test_a_run_without_a_transfer_has_the_identity_of_before() -> None:
    older = cast(dict[str, Any], identity(Run()))
    assert "transfer" not in older and same_result(older, Run())
    assert not same_result(older, override(Run(), {"transfer": {"frozen": 1}}))
