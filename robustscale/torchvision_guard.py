"""The one way to torchvision, which is imported late and may need help on machines without CUDA."""

from __future__ import annotations

import functools
import importlib
import sys
from types import ModuleType

import torch

from robustscale.errors import InputError

_declared: list[torch.library.Library] = []
"""The schemas live as long as the object that declared them."""


@functools.cache
def ensure_torchvision() -> ModuleType:
    """The torchvision package, with `models` and `transforms`.

    PyPI's wheel is linked against CUDA. On a CPU-only torch its compiled operators cannot load, which it allows for
    everywhere but in one place: it registers shape rules for nms and qnms without asking whether they exist. There,
    and only there, the two are declared without a kernel: calling them still raises torchvision's own error. See
    https://github.com/pytorch/vision/issues/8985. Raises InputError where torchvision is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise InputError("torchvision: not installed; pip install the torchvision made for this torch") from None
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error) or torch.version.cuda is not None:
            raise
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module("torchvision")
