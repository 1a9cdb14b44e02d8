"""What a field of a Run may be in a search: a range, and how a person writes it."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pydantic

from robustscale.config import unknown
from robustscale.errors import InputError
from robustscale.fields import Pixels, require

Value = float | int | str | bool | None


class Suggests(Protocol):
    """What draws a value: an Optuna trial, for one."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Range(ABC):
    """Values to choose from. Raises InputError for what can't be one; a single point is refused by the space, which
    knows the field that would better be fixed."""

    kind: ClassVar[str]
    """Its name as it is written: kind(...)."""

    @property
    @abstractmethod
    def text(self) -> str:
        """As `read` takes it: an equal range comes of it."""

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Number of values; None for a continuum."""

    @property
    @abstractmethod
    def ends(self) -> tuple[Value, ...]:
        """Values that a field must allow, that all of them be allowed: the two ends of an interval, every choice."""

    @abstractmethod
    def grid(self, points: int) -> list[Any]:
        """So many values, evenly spaced from end to end, or as many as there are; all choices."""

    @abstractmethod
    def suggest(self, trial: Suggests, path: str) -> Any:
        """The value that a trial draws for the field at `path`."""

    @classmethod
    @abstractmethod
    def of(cls, words: list[str]) -> Range:
        """The range of what is written between the brackets."""


@dataclass(frozen=True)
class _Interval(Range):
    low: float
    high: float

    def __post_init__(self) -> None:
        require(math.isfinite(self.low) and math.isfinite(self.high), f"{self.text} is not finite; give two numbers")
        require(
            self.low <= self.high,
            f"{self.text} runs from high to low; write {self.kind}({number(self.high)},{number(self.low)})",
        )

    @property
    def text(self) -> str:
        return f"{self.kind}({number(self.low)},{number(self.high)})"

    @property
    def size(self) -> int | None:
        return 1 if self.low == self.high else None

    @property
    def ends(self) -> tuple[Value, ...]:
        return (self.low, self.high)

    @classmethod
    def of(cls, words: list[str]) -> Range:
        text = f"{cls.kind}({','.join(words)})"
        require(words != [], f"{text} is empty; give its two ends, as in {cls.kind}(1,8)")
        require(len(words) == 2, f"{text} is not two numbers, a low end and a high one, as in {cls.kind}(1,8)")
        ends = [_value(word) for word in words]
        for word, end in zip(words, ends, strict=True):
            is_number = isinstance(end, (int, float)) and not isinstance(end, bool)
            require(is_number, f"{text}: {word!r} is not a number; write 0.03 or 8/255")
        return cls(*(int(end) if isinstance(end, float) and end.is_integer() else end for end in ends))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Uniform(_Interval):
    """uniform(low,high): every number between, all alike."""

    kind = "uniform"

    def grid(self, points: int) -> list[Any]:
        if points == 1:
            return [(self.low + self.high) / 2]
        inner = [self.low + (self.high - self.low) * k / (points - 1) for k in range(1, points - 1)]
        return list(dict.fromkeys([float(self.low), *inner, float(self.high)]))

    def suggest(self, trial: Suggests, path: str) -> Any:
        return trial.suggest_float(path, self.low, self.high)


@dataclass(frozen=True)
class Log(_Interval):
    """log(low,high): every number between, the logarithms all alike."""

    kind = "log"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.low > 0,
            f"{self.text} begins at {number(self.low)}, which has no logarithm; take a positive low end, or "
            f"uniform({number(self.low)},{number(self.high)})",
        )

    def grid(self, points: int) -> list[Any]:
        if points == 1:
            return [math.sqrt(self.low) * math.sqrt(self.high)]
        # Through logarithms: high / low of the widest range overflows.
        step = (math.log(self.high) - math.log(self.low)) / (points - 1)
        inner = [min(max(math.exp(math.log(self.low) + step * k), self.low), self.high) for k in range(1, points - 1)]
        return list(dict.fromkeys([float(self.low), *inner, float(self.high)]))

    def suggest(self, trial: Suggests, path: str) -> Any:
        return trial.suggest_float(path, self.low, self.high, log=True)


@dataclass(frozen=True)
class Integer(_Interval):
    """int(low,high): every whole number from low to high."""

    low: int
    high: int
    kind = "int"

    def __post_init__(self) -> None:
        super().__post_init__()
        for end in (self.low, self.high):
            require(
                isinstance(end, int),
                f"{self.text}: {number(end)} is not a whole number; take uniform({number(self.low)},"
                f"{number(self.high)})",
            )

    @property
    def size(self) -> int:
        return self.high - self.low + 1

    def grid(self, points: int) -> list[Any]:
        n = min(points, self.size)
        if n == 1:
            return [(self.low + self.high) // 2]
        # In whole numbers throughout: rounded halves would meet twice.
        return [self.low + (2 * (self.high - self.low) * k + n - 1) // (2 * (n - 1)) for k in range(n)]

    def suggest(self, trial: Suggests, path: str) -> Any:
        return trial.suggest_int(path, self.low, self.high)


@dataclass(frozen=True)
class Choice(Range):
    """choice(a,b,...): one of these: names of components, words, numbers, true and false, null for none."""

    values: tuple[Value, ...]
    kind = "choice"

    def __post_init__(self) -> None:
        require(len(self.values) > 0, "choice() is empty; name what to choose from, as in choice(trades,mart)")
        for position, value in enumerate(self.values):
            if isinstance(value, str):
                readable = re.fullmatch(r"[\w.:/+-]+", value) is not None and _value(value) == value
                require(readable, f"choice: {value!r} can't be written; take a word of letters, digits and '_.:/+-'")
            else:
                require(value is None or math.isfinite(value), f"{self.text} is not finite; leave {value} out")
            require(value not in self.values[:position], f"{self.text} has {_word(value)} twice; leave one out")

    @property
    def text(self) -> str:
        return f"choice({','.join(map(_word, self.values))})"

    @property
    def size(self) -> int:
        return len(self.values)

    @property
    def ends(self) -> tuple[Value, ...]:
        return self.values

    @property
    def of_names(self) -> bool:
        """Whether it may decide which other fields there are."""
        return all(isinstance(value, str) for value in self.values)

    def grid(self, points: int) -> list[Any]:
        return list(self.values)

    def suggest(self, trial: Suggests, path: str) -> Any:
        return trial.suggest_categorical(path, list(self.values))

    @classmethod
    def of(cls, words: list[str]) -> Range:
        require("" not in words, f"choice({','.join(words)}) has an empty place; leave out the comma")
        return cls(tuple(map(_value, words)))


KINDS: dict[str, type[Range]] = {kind.kind: kind for kind in (Uniform, Log, Integer, Choice)}
_NUMBER = pydantic.TypeAdapter(Pixels)
_WORDS = {"true": True, "false": False, "null": None}


def read(text: str, path: str) -> Range:
    """The range that is written so for the field at `path`. Raises InputError, which names the field."""
    written = re.fullmatch(r"\s*(\w*)\s*\((.*)\)\s*", text)
    if written is None:
        raise InputError(
            f"{path}: {text!r} is no range; write uniform(0,1), log(0.1,10), int(1,8) or choice(a,b), or fix the field "
            f"with --{path} {text}"
        )
    if written[1] not in KINDS:
        raise unknown(f"{path}: range", written[1], KINDS)
    words = [word.strip() for word in written[2].split(",")] if written[2].strip() else []
    try:
        return KINDS[written[1]].of(words)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def number(value: float) -> str:
    """The shortest text that reads back as this number: a pixel fraction, where that is shorter."""
    text = repr(value).removesuffix(".0")
    pixels = round(value * 255) if abs(value) <= 1 else 0
    fraction = f"{pixels}/255"
    return fraction if pixels / 255 == value and len(fraction) < len(text) else text


def _word(value: Value) -> str:
    named = next((word for word, meant in _WORDS.items() if value is meant), None)
    return named or (value if isinstance(value, str) else number(value or 0))


def _value(word: str) -> Value:
    if word in _WORDS:
        return _WORDS[word]
    if re.fullmatch(r"[+-]?\d{1,18}", word):  # longer ones may be beyond every float
        return int(word)
    try:
        return float(_NUMBER.validate_python(word))
    except pydantic.ValidationError:
        return word
