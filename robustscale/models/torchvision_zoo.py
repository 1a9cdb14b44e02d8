"""Any classifier of torchvision, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from robustscale.config import unknown
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models import pretrained
from robustscale.models.wrapping import send_one
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.types import DataSpec


@dataclass(frozen=True)
class TorchvisionZoo:
    """https://docs.pytorch.org/vision/stable/models.html#classification, drawn as torchvision does, or pretrained.

    The last layer gets the data's classes; pretrained, it stays freshly drawn where their number differs from the
    file's. For images without 3 channels the first convolution is replaced by one with theirs; pretrained, one of 1
    channel starts from the sum over 3. Auxiliary heads (googlenet, inception_v3) are left out.

    Torchvision's weights were trained on images normalised by ImageNet's mean and std. Normalising by the data's own is
    the default here; for ImageNet's, --data.mean 0.485 0.456 0.406 --data.std 0.229 0.224 0.225.

    The file is read on every node when training begins; evaluation, export and a copy of the run do not need it.

    Use: for large images, and to start adversarial training from ImageNet's weights, worth most where images are few
        (Hendrycks et al. 2019, https://arxiv.org/abs/1901.09960).
    Breaks: on small images: the stems are made for 224x224, and leave a 1x1 map of 32x32; weights of natural training
        are not robust, they only start nearer.
    """

    arch: str = "resnet50"
    """As torchvision.models.list_models names it."""
    weights: str | None = None
    """imagenet: torchvision's default weights, from torch hub's folder (TORCH_HOME), or fetched. Else the whole path,
    from / or ~, of a .safetensors file, or of a .pth file with a state_dict. By default drawn."""
    sha256: str = ""
    """First digits of the file's SHA-256; another file is refused. A path alone does not say what the file holds."""

    def __post_init__(self) -> None:
        require(
            self.weights in (None, pretrained.IMAGENET) or str(self.weights).startswith(("/", "~")),
            f"weights: {self.weights!r} is neither imagenet nor a whole path; begin it with / or ~",
        )
        require(
            re.fullmatch(r"[0-9a-fA-F]{0,64}", self.sha256) is not None,
            f"sha256: {self.sha256!r} is not up to 64 hexadecimal digits; sha256sum prints them",
        )
        require(
            self.weights is None or self.arch not in ("googlenet", "inception_v3"),
            f"weights: those of {self.arch} need a normalisation of torchvision's own inside it; take another arch",
        )

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for an unknown name, where the architecture
        cannot take images of this size, and, where training begins, for `weights` that cannot be had or do not fit."""
        models = ensure_torchvision().models
        known = models.list_models(module=models)
        if self.arch not in known:
            raise unknown("arch", self.arch, known)
        try:
            network: nn.Module = models.get_model(self.arch, num_classes=data.classes, **_options(self.arch, data))
            _take_channels(network, data.channels)
            send_one(network, data)
        except (RuntimeError, ValueError, AssertionError) as error:
            size, reason = f"{data.channels}x{data.height}x{data.width}", " ".join(str(error).split())[:200]
            raise InputError(f"arch: {self.arch} cannot take {size} images ({reason}); 224x224 suits all") from None
        if self.weights is not None and pretrained.is_starting():
            path, digest = pretrained.file_of(self.weights, self.arch)
            tensors = pretrained.read(path, self.sha256 or digest)
            pretrained.put(network, {_renamed(name): t for name, t in tensors.items()}, data.classes, path)
        return network


def _options(arch: str, data: DataSpec) -> dict[str, Any]:
    """What a family must be told to fit the images, and to give logits alone without a warning."""
    if arch.startswith("vit_"):
        return {"image_size": data.height}
    if arch.startswith("maxvit_"):
        return {"input_size": (data.height, data.width)}
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _renamed(name: str) -> str:
    """Published DenseNets say norm.1 for what has been norm1 since."""
    return re.sub(r"(denselayer\d+\.)(norm|conv)\.([12])\.", r"\1\2\3.", name)


def _take_channels(network: nn.Module, channels: int) -> None:
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == channels:
        return
    parent, _, attribute = name.rpartition(".")
    new = nn.Conv2d(
        channels,
        first.out_channels,
        (first.kernel_size[0], first.kernel_size[1]),
        (first.stride[0], first.stride[1]),
        first.padding if isinstance(first.padding, str) else (first.padding[0], first.padding[1]),
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    setattr(network.get_submodule(parent), attribute, new)
