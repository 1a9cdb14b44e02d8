"""A network that runs at several widths: slimmable convolutions and a BatchNorm for each width."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models.resnet import ResNet
from robustscale.models.wrapping import replace
from robustscale.types import DataSpec, Model


@dataclass(frozen=True)
class Slimmable:
    """Slimmable networks: Yu et al. 2019, https://arxiv.org/abs/1812.08928.

    Around any convolutional network with BatchNorm2d. At width w a convolution of C channels gives its first
    round(w · C), from as many as it is given; the linear layers take their first features; every width has a
    BatchNorm of its own, as means and variances differ too much to share. At width 1 it is the network itself.
    `at_width` chooses the width; `width` holds outside of it. Channels are rounded where the authors cut: equal for
    channels in multiples of 4. Parameters of the other widths take part in the logits with weight 0, so that DDP finds
    all of them used, whatever widths an objective runs.

    Use: to choose the cost of a prediction after training, by one network (objective oats, inside conditional).
    Breaks: only oats trains all widths; any other objective trains `width` alone and leaves the BatchNorm of the
    others as it was at the start, so that they predict nothing.
    """

    model: Model = ResNet(34)
    widths: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Shares of the channels, rising; the last is 1."""
    width: float = 1.0
    """The one outside of `at_width`, and so of evaluation and export."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.widths, self.widths[1:], strict=False))
        require(
            len(self.widths) > 0 and rising and self.widths[0] > 0 and self.widths[-1] == 1,
            f"widths: {self.widths!r} must rise within (0, 1] and end at 1; (0.5, 1.0), for example",
        )
        require(self.width in self.widths, f"width: {self.width!r} is not one of the widths {self.widths!r}; take 1.0")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for a network that cannot be slimmed."""
        network = SlimmableNetwork(self.model.build(data), self.widths, self.width)
        network.try_widths(data, type(self.model).__name__)
        return network


class ActiveWidth:
    """The width at which one network runs; an object of its own, so that the layers of a copy share the copy's."""

    def __init__(self, widths: tuple[float, ...], width: float) -> None:
        self.widths, self.number = widths, widths.index(width)

    def of(self, channels: int) -> int:
        return slim(channels, self.widths[self.number])


def slim(channels: int, width: float) -> int:
    """How many of the channels are left at this width."""
    return max(1, round(width * channels))


class SlimConv2d(nn.Conv2d):
    """The first output channels of a convolution, from the channels of its input."""

    def __init__(self, conv: nn.Conv2d, width: ActiveWidth) -> None:
        options = (conv.stride, conv.padding, conv.dilation, 1, conv.bias is not None, conv.padding_mode, "meta")
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, *options)  # type: ignore[arg-type]
        self.weight, self.bias = conv.weight, conv.bias
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        channels = self.width.of(self.out_channels)
        bias = None if self.bias is None else self.bias[:channels]
        return self._conv_forward(x, self.weight[:channels, : x.shape[1]], bias)  # type: ignore[no-any-return]


class SlimLinear(nn.Linear):
    """A linear layer of the first features, as many as its input has."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, "meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:, : x.shape[-1]], self.bias)


class SwitchableBatchNorm2d(nn.Module):
    """A BatchNorm for each width."""

    def __init__(self, norm: nn.BatchNorm2d, width: ActiveWidth) -> None:
        super().__init__()
        self.width = width
        self.norms = nn.ModuleList(_first(norm, slim(norm.num_features, share)) for share in width.widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[self.width.number](x)  # type: ignore[no-any-return]

    def idle(self) -> Iterator[nn.Parameter]:
        """The parameters of the other widths."""
        for number, norm in enumerate(self.norms):
            if number != self.width.number:
                yield from norm.parameters()


def _first(norm: nn.BatchNorm2d, channels: int) -> nn.BatchNorm2d:
    """A BatchNorm of the first channels, starting as this one does."""
    new = nn.BatchNorm2d(channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    with torch.no_grad():
        for mine, its in zip(new.parameters(), norm.parameters(), strict=True):
            mine.copy_(its[:channels])
    return new


class SlimmableNetwork(nn.Module):
    """What `Slimmable` builds. Raises InputError for a network without BatchNorm2d, and for grouped convolutions."""

    def __init__(self, body: nn.Module, widths: tuple[float, ...], width: float) -> None:
        super().__init__()
        modules = list(body.modules())
        # FiLM follows the channels that it is given; BatchNorm's sets per width must exist before they are made dual.
        require(
            not any(hasattr(m, "condition") for m in modules),
            "model: a conditional network cannot be slimmed; put slimmable inside conditional, not around it",
        )
        require(any(isinstance(m, nn.BatchNorm2d) for m in modules), "model: has no BatchNorm2d; take resnet")
        require(
            all(m.groups == 1 for m in modules if isinstance(m, nn.Conv2d)),
            "model: has convolutions in groups, of which no first channels can be taken; take resnet",
        )
        for name, m in body.named_modules():
            # A layer of a kind of its own, such as a noisy one, would become a plain slim one, and nothing would tell.
            require(
                not isinstance(m, (nn.Conv2d, nn.Linear)) or type(m) in (nn.Conv2d, nn.Linear),
                f"model: {name} is a {type(m).__name__}, which cannot be slimmed; put spectral_norm around slimmable, "
                "not into it, and leave noise_net and a second slimmable out",
            )
        self.width = ActiveWidth(widths, width)
        replace(body, (nn.Conv2d,), lambda path, conv: SlimConv2d(conv, self.width))
        replace(body, (nn.Linear,), lambda path, linear: SlimLinear(linear))
        replace(body, (nn.BatchNorm2d,), lambda path, norm: SwitchableBatchNorm2d(norm, self.width))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        if self.training and torch.is_grad_enabled():
            idle = [p.flatten() for m in self.modules() if isinstance(m, SwitchableBatchNorm2d) for p in m.idle()]
            if idle:
                logits = logits + 0 * torch.cat(idle).sum()
        return logits

    @torch.no_grad()
    def try_widths(self, data: DataSpec, name: str) -> None:
        """Send one image through at every width: the only test that holds for every architecture."""
        x = torch.zeros(1, data.channels, data.height, data.width)
        self.eval()
        for width in self.width.widths:
            try:
                with at_width(self, width):
                    logits = self(x)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"model: {name} does not run at width {width:g} ({reason}); take resnet") from None
            require(
                logits.shape == (1, data.classes),
                f"model: {name} ends in other than a linear layer, so width {width:g} leaves classes out; take resnet",
            )
        self.train()


def slimmable_part(network: nn.Module) -> SlimmableNetwork:
    """The slimmable network inside. Raises InputError where there is none."""
    found = next((m for m in network.modules() if isinstance(m, SlimmableNetwork)), None)
    if found is None:
        raise InputError("model: has one width only; take model slimmable")
    return found


@contextmanager
def at_width(network: nn.Module, width: float) -> Iterator[None]:
    """While the block runs, the slimmable network inside `network` runs at this width."""
    active = slimmable_part(network).width
    require(width in active.widths, f"width: {width!r} is not one of the widths {active.widths!r}; choose one of them")
    before, active.number = active.number, active.widths.index(width)
    try:
        yield
    finally:
        active.number = before
