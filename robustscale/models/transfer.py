"""Training that starts from the weights of another: which are taken over, which are trained on, and how fast."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from robustscale.fields import require
from robustscale.models.network import Network
from robustscale.models.stages import stages, within
from robustscale.types import Setting


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Fine-tuning of a whole network by default: every weight is taken over and trained at the optimizer's rate."""

    weights: str | None = None
    """The file that training starts from: a run's weights/best.safetensors, what export wrote as safetensors, or a .pth
    file with a plain state_dict, torchvision's among them. By default weights are drawn."""
    sha256: str = ""
    """First digits of the file's SHA-256; another file is refused. It stands for the file where runs are compared: the
    path alone does not say what the file holds."""
    head: Literal["auto", "new", "keep"] = "auto"
    """The last layer. keep: the file's. new: freshly drawn. auto: the file's where its classes are known to be this
    run's, else freshly drawn."""
    frozen: int = 0
    """Stages, from the stem on, that are not trained: their weights stay, and their BatchNorm is in eval mode. A stage
    is the stem, a block or the head; finetune --stages lists them."""
    layer_decay: float = 1.0
    """d: a stage k stages below the head is trained at lr · d^k (Howard and Ruder 2018, https://arxiv.org/abs/1801.06146,
    section 3.2, who take 1 / 2.6 for the layers of a language model); 1 trains all alike."""

    def __post_init__(self) -> None:
        require(self.weights != "", "weights: is empty; give the path of a .safetensors or .pth file")
        require(
            re.fullmatch(r"[0-9a-fA-F]{0,64}", self.sha256) is not None,
            f"sha256: {self.sha256!r} is not up to 64 hexadecimal digits; sha256sum prints them",
        )
        require(self.frozen >= 0, f"frozen: {self.frozen} is negative; 0 trains every stage")
        require(
            0 < self.layer_decay <= 1,
            f"layer_decay: {self.layer_decay!r} is outside (0, 1]; 1 trains all stages alike, 0.75 is usual",
        )

    def require(self, setting: Setting) -> None:
        """Raise InputError for more frozen stages than there are below the head."""
        if setting.network is not None:
            self.require_stages(len(stages(setting.network)))

    def require_stages(self, number: int) -> None:
        """Raise InputError unless one of so many is trained."""
        require(
            self.frozen < number,
            f"frozen: {self.frozen} of {number} stages leaves nothing to train; {number - 1} trains the head alone",
        )


class Start(NamedTuple):
    """What a training starts from."""

    tensors: dict[str, Tensor]
    """By the names of the file: a whole network's, or its body's alone."""
    classes: tuple[str, ...] | None
    """Of the head, in order, where they are known."""
    where: str
    """The file, for messages."""

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and std that these weights expect; None where the file does not say."""
        found = [self.tensors.get(f"normalize.{name}") for name in ("mean", "std")]
        mean, std = (None if t is None else tuple(t.flatten().tolist()) for t in found)
        return None if mean is None or std is None else (mean, std)


def restrain(network: Network, transfer: Transfer) -> None:
    """Frozen stages and the rates of the others, as marks on parameters (`lr_factor`, `requires_grad`) and modules
    (`frozen`); to be done before there is an optimizer."""
    row = stages(network)
    for number, stage in enumerate(row):
        frozen, below = number < transfer.frozen, len(row) - 1 - number
        for name, p in network.named_parameters():
            if within(name, stage):
                p.requires_grad_(not frozen)
                p.lr_factor = transfer.layer_decay**below  # type: ignore[attr-defined]
        for name, m in network.named_modules():
            if frozen and within(name, stage):
                m.frozen = True
    network.train(network.training)


def keeps_head(start: Start, transfer: Transfer, classes: tuple[str, ...]) -> bool:
    """Whether the head is the file's, in a run on these classes."""
    return transfer.head == "keep" or (transfer.head == "auto" and start.classes == classes)


def begin(network: Network, start: Start, *, head: bool) -> None:
    """Load the weights into a network; without `head` the last stage stays as it was drawn.

    The normalisation stays the network's own, which is the run's. Raises InputError where a tensor is missing, too many
    or of another shape.
    """
    last = stages(network)[-1]
    own = {name: t for name, t in network.state_dict().items() if not name.startswith("normalize.")}
    found = _named(start.tensors, own)
    if not head:
        own, found = ({n: t for n, t in of.items() if not within(n, last)} for of in (own, found))
    # Files made before torch counted batches have no such counters.
    counted = {name for name in own if not name.endswith("num_batches_tracked")}
    wrong = sorted((counted - found.keys()) | (found.keys() - own.keys()))
    wrong += [name for name in own.keys() & found.keys() if own[name].shape != found[name].shape]
    heads = "" if any(not within(name, last) for name in wrong) else "; take transfer.head new, or"
    require(
        wrong == [],
        f"transfer.weights: {start.where} does not fit the network: {len(wrong)} tensors differ in name or shape, such "
        f"as {', '.join(wrong[:1])}{heads or ';'} check model, and the images' size and channels",
    )
    network.load_state_dict(found, strict=False)


def _named(tensors: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Under a network's own names: without DDP's prefix, below `body`, and torchvision's ResNets as ours."""
    plain = {name.removeprefix("module."): t for name, t in tensors.items()}
    whole = any(name.startswith("body.") for name in plain)
    body = {n if whole else f"body.{n}": t for n, t in plain.items() if not n.startswith("normalize.")}
    if any(name.startswith("body.blocks.0.") for name in own) and "body.layer1.0.conv1.weight" in body:
        return _from_torchvision(body)
    return body


def _from_torchvision(body: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A torchvision ResNet's tensors under the names of models/resnet.py, whose blocks are one row."""
    pattern = re.compile(r"body\.layer(\d)\.(\d+)\.")
    blocks = sorted({(int(m[1]), int(m[2])) for m in map(pattern.match, body) if m is not None})
    number = {block: position for position, block in enumerate(blocks)}

    def renamed(name: str) -> str:
        new = pattern.sub(lambda m: f"body.blocks.{number[int(m[1]), int(m[2])]}.", name)
        return new.replace(".downsample.", ".shortcut.")

    return {renamed(name): t for name, t in body.items()}
