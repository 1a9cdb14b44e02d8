"""How much memory this process has needed at most."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes. On a GPU what torch's allocator held, over the process or since `forget_peak`; on a CPU the resident set
    (RSS) of the whole process since it began: interpreter, libraries and loader included."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def forget_peak(device: torch.device) -> None:
    """A peak from now on; of a process nobody can take it back."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
