"""Export a run's network for use elsewhere, and prove that the export computes the same.

    python -m robustscale.export RUN --format onnx
    python -m robustscale.export RUN --format safetensors --output digits.safetensors --weights last
    python -m robustscale.export OAT --format onnx --lam 0.2
    python -m robustscale.export OAT --format onnx --lam-input
    python -m robustscale.export RUN --format safetensors --towards OTHER --t 0.3
    python -m robustscale.export ACCURATE --format onnx --mixed-with ROBUST --alpha 0.6

    onnx         for ONNX Runtime and what else reads ONNX; needs: pip install 'robustscale[export]'
    torchscript  for torch without this project, in Python or C++: torch.jit.load
    safetensors  the weights with the model's configuration: robustscale.models.model_file.load

A network that draws at random (noise_net, lwta) is written as safetensors alone: a graph would keep one draw for ever.

All three take images (N, C, H, W) in [0, 1], any N, and give logits: normalisation is inside. The file is read back
and compared with the run's network before it is put in place.

A conditional network is written at one --lam, a slimmable one at one --width. With --lam-input the graph takes a second
input `lam` (N,), one for each image, and is compared at several. --towards and --mixed-with write a point of the curve
that `python -m robustscale.frontier` judged between two runs: weights between both, which are a network like any other;
or a mixture of their outputs, whose graph holds both and gives log-probabilities, so it can't be safetensors.
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
from robustscale.engine.folder import RunFolder, Weights
from robustscale.engine.remote import name_in
from robustscale.errors import InputError
from robustscale.evaluation.joined_runs import interpolated_network, kept_weights, require_same_data
from robustscale.fields import require
from robustscale.models import model_file
from robustscale.models.conditional import Conditional
from robustscale.models.operating_point import at_point, point_name
from robustscale.models.output_mixture import OutputMixture
from robustscale.models.wrapping import inside
from robustscale.noise import Noise, drawing, randomised
from robustscale.types import DataSpec, Model

Format = Literal["onnx", "torchscript", "safetensors"]
Classify = Callable[..., Tensor]
SUFFIXES: dict[Format, str] = {"onnx": "onnx", "torchscript": "pt", "safetensors": "safetensors"}
TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit where that exceeds 1."""
LAMS = (0.0, 0.05, 0.3, 0.77, 1.0)
"""Of the check of a graph that takes λ; each image has another one."""
BATCH_SIZES = (1, 5)
"""Of the check. Neither is the batch that is traced, so a frozen batch size cannot pass."""
ONNX_LIMIT = 2**31
"""Bytes of a protobuf message, and so of weights in one ONNX file."""


def export_network(
    network: nn.Module, model: Model | None, spec: DataSpec, to: Format, output: Path, *, lam_input: bool = False
) -> float:
    """Write `output`; returns the largest difference from `network` that the check saw, relative as TOLERANCE is.

    `model` describes the network, for safetensors; None where no model does. `lam_input`: the graph takes λ (N,), too.
    Puts the network in eval mode. Where the export differs from the network, a package is missing or the file
    cannot be written, raises InputError and leaves whatever was at `output` before.
    """
    network.eval()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
            path = Path(temporary) / output.name
            difference = _write_checked(path, network, model, spec, to, lam_input)
            require(
                difference <= TOLERANCE,
                f"{output}: not written: as {to} its logits differ by {difference:.1e}, more than {TOLERANCE:.0e}; "
                "try another --format",
            )
            path.replace(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error}); choose another --output") from None
    return difference


def _write_checked(
    path: Path, network: nn.Module, model: Model | None, spec: DataSpec, to: Format, lam_input: bool
) -> float:
    try:
        with _known_warnings_off():
            if to == "safetensors":
                _write_safetensors(path, network, model, spec, lam_input)
            else:
                _require_fixed(network, to)
                _WRITE[to](path, network, _example(spec, lam_input))
            return largest_difference(network, _READ[to](path), spec, lam_input)
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
        # Images and λ have one number of rows, which is meant.
        warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
        yield


@torch.no_grad()
def largest_difference(network: nn.Module, exported: Classify, spec: DataSpec, lam_input: bool = False) -> float:
    """Over the logits of random images, at all BATCH_SIZES, and with `lam_input` at every λ of LAMS for each image;
    infinite where a shape differs or a logit is not finite."""
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in BATCH_SIZES:
        x = torch.rand(size, spec.channels, spec.height, spec.width, generator=generator)
        noise = Noise.of(0, torch.arange(size), "export")
        for condition in _conditions(size, lam_input):
            with drawing(noise):
                expected = network(x, *condition)
            with drawing(noise):
                found = exported(x, *condition)
            if found.shape != expected.shape or not bool(torch.isfinite(found - expected).all()):
                return float("inf")
            largest = max(largest, float((found - expected).abs().max() / expected.abs().max().clamp(min=1)))
    return largest


def _conditions(size: int, lam_input: bool) -> list[tuple[Tensor, ...]]:
    """What is given after the images: nothing, or λ so that each image has each of LAMS once."""
    lams = torch.tensor(LAMS)
    return [(lams.roll(k).repeat(size)[:size],) for k in range(len(LAMS))] if lam_input else [()]


def _example(spec: DataSpec, lam_input: bool) -> tuple[Tensor, ...]:
    x = torch.zeros(2, spec.channels, spec.height, spec.width)
    # On both sides of the branch between λ = 0 and λ > 0.
    return (x, torch.tensor([0.0, 0.5])) if lam_input else (x,)


def _write_safetensors(path: Path, network: nn.Module, model: Model | None, spec: DataSpec, lam_input: bool) -> None:
    if model is None:
        raise InputError("format: safetensors holds one network, and a mixture is two; take onnx or torchscript")
    require(not lam_input, "lam-input: safetensors is no graph; its network takes lam after the images in any case")
    model_file.save(path, network, model, spec)


def _require_fixed(network: nn.Module, to: Format) -> None:
    require(
        not randomised(network),
        f"format: {to} would repeat one draw of this randomised network for ever; take --format safetensors",
    )


def _write_onnx(path: Path, network: nn.Module, example: tuple[Tensor, ...]) -> None:
    size = sum(t.nbytes for t in network.state_dict().values())
    require(size < ONNX_LIMIT, f"format: {size / 1e9:.1f} GB of weights do not fit one ONNX file; take torchscript")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _package(package)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} for _ in example)
    torch.onnx.export(
        network,
        example,
        path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=_INPUTS[: len(example)],
        output_names=["logits"],
        # A tensor after the images is one of *condition.
        dynamic_shapes=shapes if len(example) == 1 else (shapes[0], shapes[1:]),
    )


def _read_onnx(path: Path) -> Classify:
    session = _package("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])

    def classify(*inputs: Tensor) -> Tensor:
        named = {name: tensor.numpy() for name, tensor in zip(_INPUTS, inputs, strict=False)}
        return torch.from_numpy(session.run(["logits"], named)[0])

    return classify


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(f"format: onnx needs the package {name}; pip install 'robustscale[export]'") from None


def _write_torchscript(path: Path, network: nn.Module, example: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        torch.jit.trace(network, example, check_trace=False).save(str(path))


def _read_torchscript(path: Path) -> Classify:
    loaded: Classify = torch.jit.load(str(path), map_location="cpu")
    return loaded


_INPUTS = ["images", "lam"]
_WRITE: dict[Format, Callable[[Path, nn.Module, tuple[Tensor, ...]], None]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
}
_READ: dict[Format, Callable[[Path], Classify]] = {
    "onnx": _read_onnx,
    "torchscript": _read_torchscript,
    "safetensors": model_file.load,
}


@dataclass(frozen=True)
class Export:
    """The command's options."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder or URL, as pretrain printed it, or its name."""
    _: KW_ONLY
    to: Annotated[Format, tyro.conf.arg(name="format")]
    """Kind of file to write."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write; by default RUN/export/WEIGHTS.onnx, .pt or .safetensors."""
    weights: Weights | None = None
    """best, by the held-out robust accuracy, or last; by default those that the run reports."""
    lam: float | None = None
    """Of a conditional network: the lambda it is written at; by default the model's own."""
    width: float | None = None
    """Of a slimmable network: the width it is written at; by default the model's own."""
    lam_input: bool = False
    """Of a conditional network: the graph takes lambda (N,) as its second input."""
    towards: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """Another run of the same network: the weights between both at --t, as they were judged."""
    t: float | None = None
    """0 is the first run, 1 the other."""
    mixed_with: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """A robust run: its outputs are mixed with those of the first, accurate one, at --alpha."""
    alpha: float | None = None
    """0 is the accurate run, 1 the robust one."""

    def __post_init__(self) -> None:
        require((self.towards is None) == (self.t is None), "towards, t: one says nothing without the other; give both")
        require(
            (self.mixed_with is None) == (self.alpha is None),
            "mixed-with, alpha: one says nothing without the other; give both",
        )
        require(self.lam is None or not self.lam_input, "lam-input: is given at each call, and --lam is not; drop one")
        require(
            self.towards is None or self.mixed_with is None,
            "towards, mixed-with: both name another run; choose one of them",
        )
        alone = (self.lam, self.width, self.lam_input) == (None, None, False)
        require(
            alone or (self.towards is None and self.mixed_with is None),
            "lam, width: of two runs each is read at its own; leave them out",
        )

    def point(self) -> str:
        """For the name of the file."""
        lam_input = "-lam-input" if self.lam_input else ""
        towards = "" if self.towards is None else f"-towards-{name_in(self.towards)}-{self.t:g}"
        mixed = "" if self.mixed_with is None else f"-mixed-with-{name_in(self.mixed_with)}-{self.alpha:g}"
        return f"{point_name(lam=self.lam, width=self.width)}{lam_input}{towards}{mixed}"


def main() -> None:
    options = cli.parse(Export, sys.argv[1:], "python -m robustscale.export", __doc__ or "")
    folder = cli.existing_run(options.run)
    known = any((folder.path / name).exists() for name in ("result.json", "trial.json"))
    weights = kept_weights(folder, options.weights) if known else options.weights or "best"
    output = options.output or folder.path / "export" / f"{weights}{options.point()}.{SUFFIXES[options.to]}"
    network, model = _network(folder, weights, options)
    difference = export_network(network, model, folder.spec(), options.to, output, lam_input=options.lam_input)
    folder.push()
    print(f"{output}  {output.stat().st_size / 1e6:.2f} MB  largest difference of a logit {difference:.1e}")


def _network(folder: RunFolder, weights: Weights, options: Export) -> tuple[nn.Module, Model | None]:
    """The network of this point, and the model that describes it, if one does."""
    model = at_point(folder.run().model, lam=options.lam, width=options.width)
    require(
        not options.lam_input or inside(model, Conditional) is not None,
        "lam-input: the network is not conditional, so it takes no lam; leave it out",
    )
    if options.towards is not None and options.t is not None:
        return interpolated_network(folder, cli.existing_run(options.towards), options.t, options.weights), model
    network = folder.network(weights, model)
    if options.mixed_with is None or options.alpha is None:
        return network, model
    robust = cli.existing_run(options.mixed_with)
    require_same_data(folder, robust)
    return OutputMixture(network, robust.network(kept_weights(robust, options.weights)), options.alpha), None


if __name__ == "__main__":
    cli.door(main)
