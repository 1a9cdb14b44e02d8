"""What a run ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from robustscale import __version__


def versions() -> dict[str, str]:
    """Versions of everything that can change a result, and the hardware."""
    found = {"robustscale": __version__, "python": platform.python_version()}
    for name in ("torch", "torchvision", "numpy", "ray", "accelerate", "ffcv"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "none"
    return {**found, "gpu": gpu, "cpu": f"{_cpu()} ({os.cpu_count()} cores)"}


def _cpu() -> str:
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
