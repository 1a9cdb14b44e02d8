"""Published weights that a network starts from, in the place of drawn ones.

They are read where training begins, and nowhere else: a trained network is rebuilt from its own weights, long after the
file that it started from may be gone.
"""

from __future__ import annotations

import hashlib
import http.client
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.untrusted import expanded, require_regular

IMAGENET = "imagenet"
_STARTING: ContextVar[bool] = ContextVar("starting", default=False)


@contextmanager
def starting() -> Iterator[None]:
    """While the block runs, a network that is built is one that will be trained: it takes its starting weights, also
    where it is built inside another."""
    token = _STARTING.set(True)
    try:
        yield
    finally:
        _STARTING.reset(token)


def is_starting() -> bool:
    return _STARTING.get()


def file_of(weights: str, arch: str) -> tuple[Path, str]:
    """The file, and what its SHA-256 begins with, if that is known. Torchvision's is fetched if it is not there yet.

    Raises InputError where it cannot be fetched.
    """
    if weights != IMAGENET:
        return expanded(weights), ""
    url = ensure_torchvision().models.get_model_weights(arch).DEFAULT.url
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    # torchvision puts the first digits into the name.
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    digest = digits[1] if digits else ""
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), digest, progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"weights: {url} cannot be fetched ({reason}); put the file at {path} yourself") from None
    return path, digest


def digest_of(path: Path, begins: str = "") -> str:
    """The SHA-256 of a file of weights. Raises InputError where the file cannot be read, or it begins otherwise."""
    try:
        require_regular(path, "give the path of a file of weights")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"weights: {path} cannot be read ({error.strerror}); give the path of a file") from None
    require(
        found.startswith(begins.lower()),
        f"weights: {path} has SHA-256 {found[:16]}..., not {begins}...; it is torn or another file: fetch it anew",
    )
    return found


def read(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file with a plain state_dict.

    Raises InputError where the file is missing or torn, holds anything else, or its SHA-256 does not begin with
    `digest`.
    """
    digest_of(path, digest)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (of a torn file torch raises whatever its reader stumbles on)
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"weights: {path} cannot be read as weights ({reason}); fetch it anew") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"weights: {path} holds more than tensors by name; save a network's state_dict() alone")
    return tensors


def put(network: nn.Module, tensors: dict[str, Tensor], classes: int, path: Path) -> None:
    """Load the tensors, but for a last layer that has another number of classes, which stays as it was drawn.

    A first convolution of 1 channel takes the sum over the file's 3, which sees a grey image as they see it repeated.
    Raises InputError where anything else is missing, too many or of another shape.
    """
    own = network.state_dict()
    # Files made before torch counted batches have no such counters.
    counted = {name for name in own if not name.endswith("num_batches_tracked")}
    wrong = sorted((counted - tensors.keys()) | (tensors.keys() - own.keys()))
    loaded = {}
    for name, tensor in tensors.items():
        mine = own.get(name, tensor).shape
        if tensor.dim() == 4 and mine == (len(tensor), 1, *tensor.shape[2:]) and tensor.shape[1] == 3:
            loaded[name] = tensor.sum(1, keepdim=True)
        elif mine == tensor.shape:
            loaded[name] = tensor
        elif mine != (classes, *tensor.shape[1:]):
            wrong.append(name)
    require(
        wrong == [],
        f"weights: {path} does not fit the network: {len(wrong)} tensors differ in name or shape, such as "
        f"{', '.join(wrong[:1])}; check arch, and the images' size and channels",
    )
    network.load_state_dict(loaded, strict=False)
