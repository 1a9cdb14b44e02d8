from __future__ import annotations

import json

import pytest

from robustscale.engine.early_stopping import EarlyStopping
from robustscale.errors import InputError

NAN = float("nan")


def looks(stopping: EarlyStopping, *values: float) -> list[tuple[bool, bool]]:
    return [stopping.look(value) for value in values]


def test_stops_at_the_patience_th_look_without_a_rise() -> None:
    better, stop = zip(*looks(EarlyStopping(2), 0.2, 0.3, 0.25, 0.31, 0.1, 0.3), strict=True)
    assert better == (True, True, False, True, False, False)
    assert stop == (False, False, False, False, False, True)


def test_patience_of_one_stops_at_the_first_fall() -> None:
    assert looks(EarlyStopping(1), 0.2, 0.1) == [(True, False), (False, True)]


def test_without_patience_it_never_stops_and_knows_the_best() -> None:
    stopping = EarlyStopping(None)
    assert not any(stop for _, stop in looks(stopping, 0.5, *[0.4] * 1000))
    assert stopping.best == 0.5


def test_a_tie_is_no_rise() -> None:
    assert looks(EarlyStopping(2), 0.5, 0.5, 0.5) == [(True, False), (False, False), (False, True)]


def test_zero_is_a_best() -> None:
    assert looks(EarlyStopping(1), 0.0, 0.0) == [(True, False), (False, True)]


def test_nan_is_never_the_best_and_hides_nothing() -> None:
    stopping = EarlyStopping(3)
    assert looks(stopping, NAN, 0.1, NAN, 0.2, NAN, NAN) == [
        (False, False),
        (True, False),
        (False, False),
        (True, False),
        (False, False),
        (False, False),
    ]
    assert stopping.best == 0.2
    assert stopping.look(NAN) == (False, True)
    assert looks(EarlyStopping(2), NAN, NAN) == [(False, False), (False, True)]


@pytest.mark.parametrize("cut", range(7))
def test_goes_on_after_json_as_if_never_interrupted(cut: int) -> None:
    values = (NAN, 0.2, 0.3, 0.3, 0.1, NAN, 0.2)
    whole, first, second = EarlyStopping(4), EarlyStopping(4), EarlyStopping(4)
    expected = looks(whole, *values)
    before = looks(first, *values[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert before + looks(second, *values[cut:]) == expected
    assert second.best == whole.best


def test_refuses_what_is_no_fraction() -> None:
    stopping = EarlyStopping(1)
    for value in (51.3, -0.1, float("inf")):
        with pytest.raises(InputError, match=r"ra: .* is outside \[0, 1\]; it is a fraction"):
            stopping.look(value)
    assert stopping.best is None
    with pytest.raises(InputError, match="patience: 0 is below 1"):
        EarlyStopping(0)
