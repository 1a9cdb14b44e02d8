"""Export a run's network for use elsewhere, and prove that the export computes the same.

    python -m robustscale.export RUN --format onnx
    python -m robustscale.export RUN --format safetensors --output digits.safetensors --weights last

    onnx         for ONNX Runtime and what else reads ONNX; needs: pip install 'robustscale[export]'
    torchscript  for torch without this project, in Python or C++: torch.jit.load
    safetensors  the weights with the model's configuration: robustscale.models.model_file.load

A network that draws at random (noise_net, lwta) is written as safetensors alone: a graph would keep one draw for ever.

All three take images (N, C, H, W) in [0, 1], any N, and give logits: normalisation is inside. The file is read back
and compared with the run's network before it is put in place.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from robustscale import cli
from robustscale.engine.folder import Weights
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models import model_file
from robustscale.noise import Noise, drawing, randomised
from robustscale.types import DataSpec, Model

Format = Literal["onnx", "torchscript", "safetensors"]
Classify = Callable[[Tensor], Tensor]
SUFFIXES: dict[Format, str] = {"onnx": "onnx", "torchscript": "pt", "safetensors": "safetensors"}
TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit where that exceeds 1."""
BATCH_SIZES = (1, 5)
"""Of the check. Neither is the batch that is traced, so a frozen batch size cannot pass."""
ONNX_LIMIT = 2**31
"""Bytes of a protobuf message, and so of weights in one ONNX file."""


def export_network(network: nn.Module, model: Model, spec: DataSpec, to: Format, output: Path) -> float:
    """Write `output`; returns the largest difference from `network` that the check saw, relative as TOLERANCE is.

    Puts the network in eval mode. Where the export differs from the network, a package is missing or the file
    cannot be written, raises InputError and leaves whatever was at `output` before.
    """
    network.eval()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
            path = Path(temporary) / output.name
            difference = _write_checked(path, network, model, spec, to)
            require(
                difference <= TOLERANCE,
                f"{output}: not written: as {to} its logits differ by {difference:.1e}, more than {TOLERANCE:.0e}; "
                "try another --format",
            )
            path.replace(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); choose another --output") from None
    return difference


def _write_checked(path: Path, network: nn.Module, model: Model, spec: DataSpec, to: Format) -> float:
    write, read = _FORMATS[to]
    try:
        with _known_warnings_off():
            write(path, network, model, spec)
            return largest_difference(network, read(path), spec)
    except (InputError, OSError):
        raise
    except Exception as error:  # noqa: BLE001 (torch's and ONNX Runtime's errors share no other base class)
        reason = " ".join(str(error).split())[-300:]
        raise InputError(f"format: the network cannot be written as {to} ({reason}); try another --format") from None


@contextlib.contextmanager
def _known_warnings_off() -> Iterator[None]:
    with warnings.catch_warnings():
        # TorchScript's end is announced. It is offered for what cannot read anything newer.
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        # A branch on a shape is frozen; the check runs other batch sizes through it.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # torch.export copies its own deprecated class.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


@torch.no_grad()
def largest_difference(network: nn.Module, exported: Classify, spec: DataSpec) -> float:
    """Over the logits of random images, at all BATCH_SIZES; infinite where a shape differs or a logit is not finite."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in BATCH_SIZES:
        x = torch.rand(size, spec.channels, spec.height, spec.width, generator=generator)
        noise = Noise.of(0, torch.arange(size), "export")
        with drawing(noise):
            expected = network(x)
        with drawing(noise):
            found = exported(x)
        if found.shape != expected.shape or not bool(torch.isfinite(found - expected).all()):
            return float("inf")
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max().clamp(min=1)))
    return largest


def _example(spec: DataSpec) -> Tensor:
    return torch.zeros(2, spec.channels, spec.height, spec.width)


def _require_fixed(network: nn.Module, to: Format) -> None:
    require(
        not randomised(network),
        f"format: {to} would repeat one draw of this randomised network for ever; take --format safetensors",
    )


def _write_onnx(path: Path, network: nn.Module, model: Model, spec: DataSpec) -> None:
    _require_fixed(network, "onnx")
    size = sum(t.nbytes for t in network.state_dict().values())
    require(size < ONNX_LIMIT, f"format: {size / 1e9:.1f} GB of weights do not fit one ONNX file; take torchscript")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _package(package)
    torch.onnx.export(
        network,
        (_example(spec),),
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def _read_onnx(path: Path) -> Classify:
    session = _package("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"format: onnx needs the package {name}; pip install 'robustscale[export]'") from None


def _write_torchscript(path: Path, network: nn.Module, model: Model, spec: DataSpec) -> None:
    _require_fixed(network, "torchscript")
    with torch.no_grad():
        torch.jit.trace(network, (_example(spec),), check_trace=False).save(str(path))


def _read_torchscript(path: Path) -> Classify:
    loaded: Classify = torch.jit.load(str(path), map_location="cpu")
    return loaded


_FORMATS: dict[Format, tuple[Callable[[Path, nn.Module, Model, DataSpec], None], Callable[[Path], Classify]]] = {
    "onnx": (_write_onnx, _read_onnx),
    "torchscript": (_write_torchscript, _read_torchscript),
    "safetensors": (model_file.save, model_file.load),
}


@dataclass(frozen=True)
class Export:
    """The command's options."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder, as pretrain printed it, or its name."""
    _: KW_ONLY
    to: Annotated[Format, tyro.conf.arg(name="format")]
    """Kind of file to write."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write; by default RUN/export/WEIGHTS.onnx, .pt or .safetensors."""
    weights: Weights | None = None
    """best, by the held-out robust accuracy, or last; by default those that the run reports."""


def main() -> None:
    options = cli.parse(Export, sys.argv[1:], "python -m robustscale.export", __doc__ or "")
    folder = cli.existing_run(options.run)
    finished = (folder.path / "result.json").exists()
    weights = options.weights or (folder.reported_weights() if finished else "best")
    output = options.output or folder.path / "export" / f"{weights}.{SUFFIXES[options.to]}"
    network = folder.network(weights)
    difference = export_network(network, folder.run().model, folder.spec(), options.to, output)
    print(f"{output}  {output.stat().st_size / 1e6:.2f} MB  largest difference of a logit {difference:.1e}")


if __name__ == "__main__":
    cli.door(main)
