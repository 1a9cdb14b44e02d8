"""Reading files that somebody else may have made: regular ones, of bounded size, of plain values and tensors alone.

Raises InputError, in one line, for whatever else is there; nothing that is read can run code, and nothing waits for
ever. A link is followed: it must lead to a regular file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import yaml
from torch import Tensor

from robustscale.errors import InputError

CONFIGURATION = 2**16
"""Bytes of a configuration; one of ours has 3,000. PyYAML takes ten seconds for some files of 1 MiB."""
RECORD = 2**26
"""Bytes of any other JSON file."""
LINES = 2**30
"""Bytes of a file that grows by lines."""
DEPTH = 32
"""Of nested values. A network inside a network inside a network is 5 deep."""
VALUES = 10_000
"""In a configuration, where an alias counts for all that it stands for."""
TEXT = 4_000
"""Characters of a text in a configuration: a path has 4,096 bytes, a number that Python reads 4,300 digits at most."""


def require_regular(path: Path, remedy: str) -> int:
    """The size of a file that can be read to its end. Raises InputError for a pipe, a device or a folder,
    FileNotFoundError where nothing is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: cannot be read ({_reason(error)}); {remedy}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path}: cannot be read (not a regular file); {remedy}")
    return found.st_size


def require_size(path: Path, remedy: str, limit: int) -> None:
    """As `require_regular`, and InputError for a file of more bytes: a sparse one takes no disk, but memory."""
    size = require_regular(path, remedy)
    if size > limit:
        raise InputError(f"{path}: has {size:,} bytes, the most that is read here is {limit:,}; {remedy}")


def read_bytes(path: Path, remedy: str, limit: int = RECORD) -> bytes:
    """Raises FileNotFoundError where nothing is: what that means, only the caller knows."""
    require_size(path, remedy, limit)
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); {remedy}") from None


def read_json(path: Path, remedy: str, limit: int = RECORD) -> Any:
    """As `read_bytes`, and then as `parse_json`."""
    return parse_json(read_bytes(path, remedy, limit), str(path), remedy)


def parse_json(text: bytes | str, where: str, remedy: str) -> Any:
    """JSON, at most DEPTH deep; NaN and Infinity are numbers, as Python writes them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({_reason(error)}); {remedy}") from None
    for part, depth in _parts(value):
        if depth > DEPTH and isinstance(part, (dict, list)):
            raise InputError(f"{where}: more than {DEPTH} levels deep; {remedy}")
    return value


def read_lines(path: Path, remedy: str) -> list[str]:
    """Of a text that grew by lines, without a torn last one; none where nothing is."""
    try:
        text = read_bytes(path, remedy, LINES).decode()
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); {remedy}") from None
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def parse_configuration(text: bytes, where: str, remedy: str, *, as_json: bool = False) -> Any:
    """YAML or JSON of at most VALUES values. No tag, anchor or alias of YAML makes anything but a plain value."""
    if as_json:
        value = parse_json(text, where, remedy)
    else:
        try:
            loader = _Loader(text)
            value = loader.get_single_data()
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            # Not YAMLError alone: `!!bool x` is a KeyError to PyYAML, 2001-99-99 a ValueError.
            raise InputError(f"{where}: not YAML of plain values ({_reason(error)}); {remedy}") from None
    _require_plain(value, where, remedy)
    return value


class _Loader(yaml.SafeLoader):
    """Counts while it reads: what aliases stand for may be exponentially more than what is written."""

    def __init__(self, text: bytes) -> None:
        super().__init__(text)
        self._depth, self._values = 0, 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        before = self._values
        self._depth += 1
        if self._depth > DEPTH:
            raise ValueError(f"more than {DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if id(node) in self._sizes:
            self._values += self._sizes[id(node)]
        else:
            self._values += 1
            self._sizes[id(node)] = self._values - before
        if self._values > VALUES:
            raise ValueError(f"more than {VALUES} values")
        return node


def _require_plain(value: Any, where: str, remedy: str) -> None:
    """Texts, null, finite numbers of 64 bits, lists, and mappings of text keys."""
    for count, (part, depth) in enumerate(_parts(value), 1):
        wrong = f"more than {VALUES} values" if count > VALUES else _not_plain(part, depth)
        if wrong is not None:
            raise InputError(f"{where}: {wrong}; {remedy}")


def _parts(value: Any) -> Iterator[tuple[Any, int]]:
    """Everything inside, with how deep it lies; without recursion, and endless where a value contains itself."""
    stack = [(value, 0)]
    while stack:
        part, depth = stack.pop()
        yield part, depth
        if isinstance(part, dict):
            stack += [(inner, depth + 1) for pair in part.items() for inner in pair]
        elif isinstance(part, list):
            stack += [(inner, depth + 1) for inner in part]


def _not_plain(value: Any, depth: int) -> str | None:
    """Why this is no plain value, or None."""
    if depth > DEPTH:
        return f"more than {DEPTH} levels deep"
    if isinstance(value, dict):
        strange = next((key for key in value if not isinstance(key, str)), None)
        return None if strange is None else f"a field is named by a {type(strange).__name__}, not a text"
    if isinstance(value, str):
        return f"a text of {len(value):,} characters" if len(value) > TEXT else None
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return "a whole number of more than 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    if value is None or isinstance(value, (list, int, float)):
        return None
    return f"a {type(value).__name__} is no plain value"


@contextmanager
def open_tensors(path: Path, remedy: str, wrong: str = "cannot be read as safetensors") -> Iterator[Any]:
    """A safetensors file, to be read inside; what safetensors finds `wrong` within becomes an InputError. Raises
    FileNotFoundError where nothing is."""
    require_regular(path, remedy)
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: {wrong} ({_reason(error)}); {remedy}") from None


def read_tensors(file: Any, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an open file, which must be called, shaped and typed as those of `like`: then they take no more
    memory than those. Raises ValueError with the first difference."""
    names = set(file.keys())
    if strange := sorted(names ^ set(like)):
        raise ValueError(f"{len(strange)} tensors too many or too few, such as {strange[0]!r}")
    for name, own in like.items():
        found = file.get_slice(name)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        if shape != tuple(own.shape) or dtype != _DTYPES.get(str(own.dtype)):
            raise ValueError(f"size mismatch: {name!r} is {dtype} {list(shape)}, not {own.dtype} {list(own.shape)}")
    return {name: file.get_tensor(name) for name in like}


_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}
"""As safetensors names them."""


def expanded(path: str | os.PathLike[str]) -> Path:
    """~ and ~user written out; of a user that is not there, the path as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises RuntimeError)


def is_there(path: Path) -> bool:
    """Not where it can't even be a path: too long, or a link to itself."""
    return os.path.exists(path)  # noqa: PTH110 (Path.exists raises OSError)


def require_printable(path: str | os.PathLike[str]) -> None:
    """Raise InputError for what no system takes as a path, or what would break the line in which a person is told."""
    text = os.fspath(path)
    if not text.isprintable():
        raise InputError(f"{one_line(text)[:200]}: has characters that can't be printed; give a folder without them")


def one_line(text: str) -> str:
    """Without what a terminal would obey, or show in another order: control characters, and Unicode's directions."""
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in text)


def _reason(error: BaseException) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(" ".join((said or type(error).__name__).split()))[:200]
