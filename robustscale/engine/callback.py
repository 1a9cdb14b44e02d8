"""What may hang on the training loop's timeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from robustscale.types import State

if TYPE_CHECKING:
    from robustscale.engine.trainer import Trainer


class Callback:
    """Called on every worker, in the order given; a collective inside is allowed, since all call it alike."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called in reverse order, as the last one resumes: `trainer` stands where training goes on."""

    def after_step(self, trainer: Trainer) -> None: ...

    def after_epoch(self, trainer: Trainer) -> None:
        """The epoch's record is `trainer.record`; a callback may add to it for those after it."""

    def on_fit_end(self, trainer: Trainer) -> None: ...

    def state_dict(self) -> State:
        """JSON types; saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: State) -> None: ...

    def tensors(self) -> dict[str, Tensor]:
        """Saved as a group of their own with every checkpoint, under the class's name; none if empty."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """On the device of training; called before `on_fit_start`, and only if there were any."""
