from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustscale.errors import InputError
from tune.ranges import Choice, Integer, Log, Range, Uniform, Value, number, read

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-300, max_value=1e300)
whole = st.integers(-(10**17), 10**17)
pixels = st.integers(0, 255).map(lambda k: k / 255)
words = st.text("abxyz09_.:/+-", min_size=1, max_size=8).map("w".__add__) | st.sampled_from(("trades", "none"))


def interval(kind: type[Range], ends: st.SearchStrategy[float]) -> st.SearchStrategy[Range]:
    return st.tuples(ends, ends).map(lambda pair: kind(*sorted(pair)))


ranges = st.one_of(
    interval(Uniform, finite | pixels),
    interval(Log, positive | pixels.filter(lambda p: p > 0)),
    interval(Integer, whole),
    st.lists(words | whole | finite | st.booleans() | st.none(), min_size=1, unique=True).map(
        lambda values: Choice(tuple(values))
    ),
)


@given(ranges)
def test_what_is_written_reads_back(dimension: Range) -> None:
    assert read(dimension.text, "a.b") == dimension


@given(finite | pixels)
def test_a_number_reads_back_to_the_last_bit(value: float) -> None:
    low = read(f"choice({number(value)})", "a").ends[0]
    assert low == value


@given(st.one_of(interval(Uniform, st.floats(-1e6, 1e6)), interval(Log, st.floats(1e-9, 1e9))), st.integers(2, 9))
def test_a_grid_goes_from_end_to_end_and_rises(dimension: Range, points: int) -> None:
    grid = dimension.grid(points)
    assert (grid[0], grid[-1]) == dimension.ends
    assert grid == sorted(set(grid)) and len(grid) <= points
    assert all(dimension.ends[0] <= value <= dimension.ends[1] for value in grid)


@given(st.integers(-50, 50), st.integers(0, 30), st.integers(1, 12))
def test_a_grid_of_whole_numbers_has_no_number_twice(low: int, width: int, points: int) -> None:
    grid = Integer(low, low + width).grid(points)
    assert grid == sorted(set(grid)) and len(grid) == min(points, width + 1)
    assert all(low <= value <= low + width and isinstance(value, int) for value in grid)
    if len(grid) > 1:
        gaps = [b - a for a, b in itertools.pairwise(grid)]
        assert (grid[0], grid[-1]) == (low, low + width) and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "text, dimension",
    [
        ("uniform(0,1)", Uniform(0, 1)),
        (" uniform( 2/255 , 8/255 ) ", Uniform(2 / 255, 8 / 255)),
        ("log(0.1,10)", Log(0.1, 10)),
        ("log(1e-4,1e-1)", Log(1e-4, 0.1)),
        ("int(1,8)", Integer(1, 8)),
        ("int(1.0,8)", Integer(1, 8)),
        ("choice(trades,mart)", Choice(("trades", "mart"))),
        ("choice(null, true, false)", Choice((None, True, False))),
        ("choice(none,3)", Choice(("none", 3))),
        ("choice(1/255,0.5)", Choice((1 / 255, 0.5))),
    ],
)
def test_read(text: str, dimension: Range) -> None:
    assert read(text, "a") == dimension


@pytest.mark.parametrize(
    "dimension, text",
    [
        (Uniform(2 / 255, 12 / 255), "uniform(2/255,12/255)"),
        (Uniform(0.2, 1.0), "uniform(0.2,1)"),  # 51/255 and 255/255 would be longer
        (Log(0.1, 10.0), "log(0.1,10)"),
        (Choice(("a", None, True, 0.5)), "choice(a,null,true,0.5)"),
    ],
)
def test_a_range_is_written_as_a_person_would(dimension: Range, text: str) -> None:
    assert dimension.text == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("uniform()", "objective.beta: uniform() is empty; give its two ends, as in uniform(1,8)"),
        ("log(3)", "objective.beta: log(3) is not two numbers, a low end and a high one, as in log(1,8)"),
        ("int(1,2,3)", "objective.beta: int(1,2,3) is not two numbers, a low end and a high one, as in int(1,8)"),
        ("log(10,0.1)", "objective.beta: log(10,0.1) runs from high to low; write log(0.1,10)"),
        ("uniform(0,inf)", "objective.beta: uniform(0,inf) is not finite; give two numbers"),
        ("uniform(nan,1)", "objective.beta: uniform(nan,1) is not finite; give two numbers"),
        ("int(0,inf)", "objective.beta: int(0,inf) is not finite; give two numbers"),
        (f"uniform(0,{'9' * 400})", "objective.beta: uniform(0,inf) is not finite; give two numbers"),
        (
            "log(0,10)",
            "objective.beta: log(0,10) begins at 0, which has no logarithm; take a positive low end, or uniform(0,10)",
        ),
        (
            "log(-1,10)",
            "objective.beta: log(-1,10) begins at -1, which has no logarithm; take a positive low end, or "
            "uniform(-1,10)",
        ),
        ("int(1.5,8)", "objective.beta: int(1.5,8): 1.5 is not a whole number; take uniform(1.5,8)"),
        ("uniform(a,1)", "objective.beta: uniform(a,1): 'a' is not a number; write 0.03 or 8/255"),
        ("uniform(1/0,1)", "objective.beta: uniform(1/0,1): '1/0' is not a number; write 0.03 or 8/255"),
        ("uniform(true,1)", "objective.beta: uniform(true,1): 'true' is not a number; write 0.03 or 8/255"),
        ("choice()", "objective.beta: choice() is empty; name what to choose from, as in choice(trades,mart)"),
        ("choice(a,)", "objective.beta: choice(a,) has an empty place; leave out the comma"),
        ("choice(a,b,a)", "objective.beta: choice(a,b,a) has a twice; leave one out"),
        ("choice(1,true)", "objective.beta: choice(1,true) has true twice; leave one out"),
        ("choice(1,inf)", "objective.beta: choice(1,inf) is not finite; leave inf out"),
        (
            "choice(a b)",
            "objective.beta: choice: 'a b' can't be written; take a word of letters, digits and '_.:/+-'",
        ),
        ("logg(1,2)", "objective.beta: range: 'logg' is not known; did you mean 'log'?"),
        ("(1,2)", "objective.beta: range: '' is not known; choose one of uniform, log, int, choice"),
        (
            "6",
            "objective.beta: '6' is no range; write uniform(0,1), log(0.1,10), int(1,8) or choice(a,b), or fix the "
            "field with --objective.beta 6",
        ),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        read(text, "objective.beta")
    assert str(refused.value) == message


@pytest.mark.parametrize("value", ["true", "null", "1", "1e3", "8/255", "a,b", "", "inf", "a(b)"])
def test_a_word_that_would_read_back_as_something_else_is_no_choice(value: str) -> None:
    with pytest.raises(InputError, match="can't be written"):
        Choice((value, "other"))


@pytest.mark.parametrize(
    "dimension, size",
    [(Uniform(0, 1), None), (Log(1, 2), None), (Uniform(1, 1), 1), (Integer(1, 8), 8), (Choice(("a", "b")), 2)],
)
def test_size(dimension: Range, size: int | None) -> None:
    assert dimension.size == size


def test_one_point_of_a_grid_is_the_middle() -> None:
    assert Uniform(0, 1).grid(1) == [0.5]
    assert math.isclose(Log(0.1, 10).grid(1)[0], 1)
    assert Integer(1, 8).grid(1) == [4]
    assert Choice(("a", "b")).grid(1) == ["a", "b"]


class Asked:
    """Says what it was asked for."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.question: tuple[object, ...] = ("float", name, low, high, log)
        return low

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.question = ("int", name, low, high)
        return low

    def suggest_categorical(self, name: str, choices: Sequence[Value]) -> Value:
        self.question = ("categorical", name, list(choices))
        return choices[0]


@pytest.mark.parametrize(
    "dimension, question",
    [
        (Uniform(0, 1), ("float", "a.b", 0, 1, False)),
        (Log(0.1, 1), ("float", "a.b", 0.1, 1, True)),
        (Integer(1, 8), ("int", "a.b", 1, 8)),
        (Choice(("x", None)), ("categorical", "a.b", ["x", None])),
    ],
)
def test_suggest(dimension: Range, question: tuple[object, ...]) -> None:
    trial = Asked()
    assert dimension.suggest(trial, "a.b") == dimension.ends[0]
    assert trial.question == question
