"""Where on its own trade-off a network is read: OAT's λ, and the width of a slimmable network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from robustscale.errors import InputError
from robustscale.models.conditional import Conditional, ConditionalNetwork
from robustscale.models.slimmable import Slimmable, at_width
from robustscale.types import Model


def at_point(model: Model, *, lam: float | None = None, width: float | None = None) -> Model:
    """The same network, which answers at this λ and this width where no other is asked for; None: as it was.

    Its weights are those of the network as it was. Raises InputError where the network has no such knob, or not this
    value.
    """
    if lam is not None:
        model = _set(model, Conditional, "lam", lam)
    return model if width is None else _set(model, Slimmable, "width", width)


@contextmanager
def read_at(network: nn.Module, *, lam: float | None = None, width: float | None = None) -> Iterator[None]:
    """While the block runs, a built network answers as one that was built from `at_point`, so that its weights are
    loaded once for many points. Raises InputError where it has no such knob."""
    with ExitStack() as stack:
        if width is not None:
            stack.enter_context(at_width(network, width))
        if lam is not None:
            conditional = next((m for m in network.modules() if isinstance(m, ConditionalNetwork)), None)
            if conditional is None:
                raise InputError("lam: the network is not conditional, so there is none to choose; leave it out")
            stack.callback(setattr, conditional, "lam", conditional.lam)
            conditional.lam = lam
        yield


def point_name(*, lam: float | None = None, width: float | None = None) -> str:
    """-lam-0.2-width-0.5, for a folder."""
    return "".join(f"-{name}-{value:g}" for name, value in (("lam", lam), ("width", width)) if value is not None)


def _set(model: Any, kind: type, field: str, value: float) -> Any:
    if isinstance(model, kind):
        return dataclasses.replace(model, **{field: value})  # type: ignore[type-var]
    inner = getattr(model, "model", None)
    if inner is None:
        raise InputError(
            f"{field}: the network is not {kind.__name__.lower()}, so there is none to choose; leave it out"
        )
    return dataclasses.replace(model, model=_set(inner, kind, field, value))
