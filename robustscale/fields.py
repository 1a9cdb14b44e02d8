"""Field types of the configuration, and the one way to refuse a value."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

import tyro
from pydantic import BeforeValidator

from robustscale.errors import InputError


def _pixels(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        # Not Fraction alone: it would write out all the digits of 1e999999999.
        return float(Fraction(value.replace(" ", ""))) if "/" in value else float(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{value!r} is not a number; write 0.03 or 8/255") from None


Pixels = Annotated[
    float,
    BeforeValidator(_pixels),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT|N/255",
        instance_from_str=lambda words: float(_pixels(words[0])),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [repr(value)],
    ),
]
"""A length in units of a [0, 1] pixel; may be written as a fraction, 8/255."""


def require(holds: bool, message: str) -> None:
    """Raise `InputError(message)` unless the condition holds. The message names field, value and remedy."""
    if not holds:
        raise InputError(message)
