"""ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) by DeepSpeed, in the group that Ray Train made.

Through `deepspeed.initialize` itself: Accelerate ignores DeepSpeed on CPUs, without a word.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.group import Group
from robustscale.engine.tensors import flatten_optimizer, restore_optimizer
from robustscale.engine.updater import Plain
from robustscale.run import Run
from robustscale.types import State

_Settings = dict[str, Any]
_BUCKET = 50_000_000
"""Elements that are reduced in one collective; DeepSpeed allocates so many before each step."""


class DeepSpeedBackend(Group):
    """One rank of a data-parallel group whose optimizer state (from stage 1) and gradients (2) are sharded.

    Not stage 3: it takes the weights out of the network between a pass and the next, where checkpoints, averages of
    the weights and AWP read them, and with a second derivative (LLR) it fails.
    """

    def __init__(self, stage: int, cpu: bool) -> None:
        super().__init__(_device(cpu))
        self.stage = stage
        _load_deepspeed(cpu)

    def updater(self, network: nn.Module, run: Run) -> Plain:
        return Replicated(network, run, self) if self.stage == 0 else Sharded(network, run, self)


def _device(cpu: bool) -> torch.device:
    if cpu:
        return torch.device("cpu")
    from ray.train.torch import get_device

    return get_device()


def _load_deepspeed(cpu: bool) -> None:
    """In the group that is there, and quiet: it logs to stdout."""
    # Read once, when it is first imported. A machine with a GPU may run workers on its CPUs.
    os.environ["DS_ACCELERATOR"] = "cpu" if cpu else "cuda"
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if cpu:
        # None of its own operators can be built here, that is: each worker would compile collectives over shared
        # memory, which inference alone uses, and one killed meanwhile leaves a lock file that all others wait for.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)


class Replicated(Plain):
    """Stage 0: whole gradients and optimizer state on every worker, averaged by DeepSpeed."""

    def __init__(self, network: nn.Module, run: Run, backend: DeepSpeedBackend) -> None:
        super().__init__("", network, network, run)
        import deepspeed

        config = _config(backend.stage, sum(p.numel() for p in self.parameters), run)
        # Its number here: DeepSpeed would take the one of LOCAL_RANK.
        index: int | None = backend.device.index
        device = None if index is None else SimpleNamespace(device_rank=index)
        self.ds, *_ = deepspeed.initialize(
            args=device, model=network, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        # They time every forward of the network, those of the attack too, and on a GPU wait for it. The loss is
        # computed with the network itself: what averages hangs on its parameters (stage 2) or on `ds.backward`, and
        # the engine's own forward would take any `autograd.grad` through it for the backward pass.
        self.ds.module_forward_pre_hook.remove()
        self.ds.module_forward_post_hook.remove()
        self.engine = _running(self.ds.optimizer)
        if self.engine != f"zero{backend.stage}":
            raise RuntimeError(f"DeepSpeed runs {self.engine}, not the zero{backend.stage} that it was given")

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        self.ds.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, value: Tensor) -> None:
        self.ds.backward(value, scale_wrt_gas=False)

    def step(self, norm: Tensor) -> None:
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.ds.step()


class Sharded(Replicated):
    """Stages 1 and 2: a worker holds the optimizer's state, and from stage 2 the averaged gradient, of its part alone.

    The parameters of a group lie one after the other in a row, with zeros at the end, that is cut into equal parts.
    `state` joins the parts, `load` cuts: a checkpoint is that of one worker, and any number may go on from it.
    """

    def __init__(self, network: nn.Module, run: Run, backend: DeepSpeedBackend) -> None:
        self.backend, self.build = backend, run.optimizer.build
        super().__init__(network, run, backend)
        self.zero = self.ds.optimizer
        # Of the network's parameters; in `self.optimizer` a group has this worker's part of the row instead.
        self.groups = [group["params"] for group in self.build(self.parameters).param_groups]
        for parameters, group in zip(self.groups, self.optimizer.param_groups, strict=True):
            (part,) = group["params"]
            if not torch.equal(part, self._cut(parameters, part)):
                raise RuntimeError("DeepSpeed does not lay out parameters as its version 0.19.8 does; install that one")

    def grad_norm(self) -> Tensor:
        square = nn.utils.get_total_norm(self._gradients()).double().square()
        self.backend.mean_([square])
        return (square * self.backend.world).sqrt().float()

    def _gradients(self) -> list[Tensor]:
        """This worker's part of the averaged gradient, in pieces."""
        return [piece for pieces in self.zero.averaged_gradients.values() for piece in pieces]

    def step(self, norm: Tensor) -> None:
        if self.clip is not None:
            torch._foreach_mul_(self._gradients(), (self.clip / (norm + 1e-6)).clamp(max=1.0))
        # What is updated are copies of the weights. Whoever loads weights loads the network's.
        self.zero.refresh_fp32_params()
        self.ds.step()

    def skip(self) -> None:
        # What DeepSpeed's own step does with gradients that it does not take.
        self.zero.zero_grad(set_to_none=True)
        for held in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
            held.update(dict.fromkeys(held))

    def state(self) -> tuple[dict[str, Tensor], State]:
        whole = self.build(self.parameters)
        for parameters, group, mine in self._pairs(whole):
            group.update({name: value for name, value in mine.items() if name != "params"})
            (part,) = mine["params"]
            for name, value in self.optimizer.state.get(part, {}).items():
                values = [value] * len(parameters) if name == "step" else self._join(value, parameters)
                for p, tensor in zip(parameters, values, strict=True):
                    whole.state[p][name] = tensor
        tensors, state = flatten_optimizer(whole)
        return tensors, {"optimizer": state, "scaler": self.scaler.state_dict()}

    def load(self, tensors: Mapping[str, Tensor], state: State) -> None:
        whole = self.build(self.parameters)
        restore_optimizer(whole, tensors, state["optimizer"])
        self.optimizer.state.clear()
        for parameters, group, mine in self._pairs(whole):
            mine.update({name: value for name, value in group.items() if name != "params"})
            (part,) = mine["params"]
            for name in whole.state.get(parameters[0], {}):
                values = [whole.state[p][name] for p in parameters]
                self.optimizer.state[part][name] = values[0] if name == "step" else self._cut(values, part)

    def _pairs(
        self, whole: torch.optim.Optimizer
    ) -> Iterator[tuple[list[nn.Parameter], dict[str, Any], dict[str, Any]]]:
        """(parameters, settings in `whole`, settings here) of each group."""
        return zip(self.groups, whole.param_groups, self.optimizer.param_groups, strict=True)

    def _cut(self, tensors: list[Any], part: Tensor) -> Tensor:
        row = torch.cat([t.detach().flatten() for t in tensors])
        row = F.pad(row, (0, part.numel() * self.backend.world - row.numel()))
        return row.view(self.backend.world, -1)[self.backend.rank].clone()

    def _join(self, part: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
        row = self.backend.gather(part).flatten()
        sizes = [p.numel() for p in parameters]
        return [piece.view_as(p) for piece, p in zip(row[: sum(sizes)].split(sizes), parameters, strict=True)]


def _running(optimizer: Any) -> str:
    """By what DeepSpeed made of the optimizer, not by the configuration."""
    return (
        "zero0"
        if isinstance(optimizer, torch.optim.Optimizer)
        else optimizer.zero_stage_string.lower().replace("-", "")
    )


def _config(stage: int, num_weights: int, run: Run) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(num_weights, _BUCKET), "overlap_comm": False}
    if stage > 0:
        zero["compute_grad_norm"] = False  # it would be known only after the update, and has cost a collective by then
    return {
        # Unused but for DeepSpeed's own throughput figures, which nobody reads.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # `step` clips; left out, DeepSpeed would clip to 1
        # torch's SGD and AdamW; DeepSpeed's own are compiled on each worker.
        "zero_allow_untested_optimizer": True,
        "communication_data_type": {"none": "fp32"}.get(run.compression, run.compression),
        # Neither its bf16 section, which casts weights but not BatchNorm's buffers, nor its autocast, which rounds
        # gradients on their way, too: the training step runs autocast itself, for attack and loss alike.
    }
