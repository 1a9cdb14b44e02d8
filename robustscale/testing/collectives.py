"""What a block of code sends to the other ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collective(NamedTuple):
    kind: str
    """As c10d calls it: allreduce_, broadcast_, allgather_, _allgather_base_, reduce_scatter_, barrier, ..."""
    num_bytes: int
    """That this rank puts in; 0 of a barrier."""
    dtype: torch.dtype | None
    """Of what is sent; None of a barrier."""


class Collectives(list[Collective]):
    """In the order of their calls."""

    @property
    def kinds(self) -> Counter[str]:
        return Counter(call.kind for call in self)

    def num_bytes(self, kind: str | None = None) -> int:
        return sum(call.num_bytes for call in self if kind in (None, call.kind))


@contextmanager
def counting_collectives() -> Iterator[Collectives]:
    """Every call of c10d within the block, from Python or C++ (DDP's reducer), of this thread and of its backward
    passes; other threads are not seen."""
    mode = _Counting()
    with mode:
        yield mode.calls


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Collectives()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call: Callable[..., Any] = func
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func._opname:
            self.calls.append(_collective(func._opname, args))
        return call(*args, **(kwargs or {}))


def _collective(kind: str, args: tuple[Any, ...]) -> Collective:
    # (in and out, group, ...) or (out, in, group, ...). A barrier's tensor says no more than the device.
    given = [[leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor)] for arg in args[:2]]
    sent = next((tensors for tensors in reversed(given) if tensors), [])
    if "barrier" in kind or not sent:
        return Collective(kind, 0, None)
    return Collective(kind, sum(t.numel() * t.element_size() for t in sent), sent[0].dtype)
