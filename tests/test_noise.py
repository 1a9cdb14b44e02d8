"""Noise is held to what it promises: a pure function of its keys, uniform and independent across all of them."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from robustscale.noise import Noise, key_of, permutation

INDEX = torch.arange(20_000)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()[:16]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


# --- Golden values: a change of any would silently change every result made before


def test_keys_are_frozen() -> None:
    assert key_of(0, "attack", 0) == -1364417778011932724
    assert Noise.of(0, torch.tensor([0, 1, 49_999, 2**40]), "attack", 7).keys.tolist() == [
        4485640135773781629,
        -9207271132161160879,
        -3369616006111521030,
        776606031373827636,
    ]


def test_draws_are_frozen() -> None:
    noise = Noise.of(3, torch.arange(64), "attack", 7)
    assert digest(noise.uniform(3, 5)) == "008471dc095c616d"
    assert digest(noise.below(10, 5)) == "e9aba2b199b37560"
    assert digest(noise.fold("restart", 1).uniform(3, 5)) == "1d75421b9b631181"
    assert noise.uniform(2)[:2].tolist() == [
        [0.93780118227005, 0.2761492133140564],
        [0.8337056636810303, 0.6983476281166077],
    ]
    assert noise.normal(2)[:2].flatten().tolist() == pytest.approx(
        [-1.56201005, -0.801908195, 0.999282777, 0.206798062], rel=1e-5
    )


def test_permutations_are_frozen() -> None:
    assert permutation(10, 0, "order", 0).tolist() == [2, 4, 9, 6, 1, 8, 3, 5, 0, 7]
    assert digest(torch.from_numpy(permutation(1000, 1, "order", 5))) == "a8e8e669ff8134e0"


# --- A pure function of the example


def test_the_batch_that_an_example_falls_into_changes_nothing() -> None:
    whole = Noise.of(1, INDEX[:100], "attack", 3)
    chosen = torch.tensor([97, 3, 50, 3])
    part = Noise.of(1, chosen, "attack", 3)
    for draw in (lambda n: n.uniform(3, 4), lambda n: n.normal(3, 4), lambda n: n.below(7, 2), lambda n: n.uniform()):
        assert torch.equal(draw(whole)[chosen], draw(part))
    assert torch.equal(whole.fold("restart", 2).uniform(5)[chosen], part.fold("restart", 2).uniform(5))


def test_drawing_leaves_no_trace() -> None:
    noise, before = Noise.of(1, INDEX[:10], "attack"), torch.random.get_rng_state()
    first = noise.uniform(4)
    noise.normal(100)
    assert torch.equal(noise.uniform(4), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_index_may_be_of_any_integer_type() -> None:
    expected = Noise.of(1, INDEX[:200]).keys
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(Noise.of(1, INDEX[:200].to(dtype)).keys, expected)


def test_integers_of_numpy_make_the_same_keys() -> None:
    assert key_of(int(np.int64(3)), "order", 4) == key_of(np.int64(3), "order", np.uint8(4))  # type: ignore[arg-type]


def test_shapes_ranges_and_types() -> None:
    noise = Noise.of(0, INDEX, "x")
    assert noise.uniform(2, 3).shape == (20_000, 2, 3) and noise.uniform().shape == (20_000,)
    assert noise.uniform(3).dtype == noise.normal(3).dtype == torch.float32
    assert noise.below(3).dtype == torch.int64
    u = noise.uniform(50)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.equal(u, (u * 2**24).round() / 2**24)
    assert noise.normal(50).isfinite().all()
    assert Noise.of(0, INDEX[:0]).uniform(3).shape == (0, 3)
    assert noise.uniform(0).shape == (20_000, 0)


# --- Different keys, different streams


def test_every_part_of_the_path_matters() -> None:
    index = INDEX[:1]
    paths: list[tuple[int | str, ...]] = [
        ("a",),
        ("b",),
        ("a", 0),
        ("a", 1),
        ("a", "0"),
        ("a", 0, 0),
        ("a", "b"),
        ("ab",),
    ]
    keys = [Noise.of(seed, index, *path).keys.item() for seed in (0, 1) for path in paths]
    keys += [Noise.of(0, index, "a").fold(*path).keys.item() for path in paths]
    keys += [Noise.of(0, index + 1, "a").keys.item()]
    assert len(set(keys)) == len(keys)


def test_no_two_examples_steps_or_seeds_share_a_key() -> None:
    keys = torch.cat([Noise.of(seed, INDEX, "attack", step).keys for seed in range(5) for step in range(5)])
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("draw", ["uniform", "normal"])
def test_neighbours_are_not_correlated(draw: str) -> None:
    """|r| of n independent pairs stays below 4.5 / √n (p = 7e-6)."""

    def of(seed: int, step: int, purpose: str = "attack", shift: int = 0) -> Tensor:
        return getattr(Noise.of(seed, INDEX + shift, purpose, step), draw)(8)

    base, limit = of(0, 0), 4.5 / (8 * 20_000) ** 0.5
    others = {
        "next example": of(0, 0, shift=1),
        "example 1024 on": of(0, 0, shift=1024),
        "next step": of(0, 1),
        "next seed": of(1, 0),
        "another purpose": of(0, 0, "order"),
        "next element": base.roll(1, 1),
        "fold": getattr(Noise.of(0, INDEX, "attack", 0).fold("restart", 1), draw)(8),
    }
    found = {name: correlation(base, other) for name, other in others.items()}
    assert {name: r for name, r in found.items() if abs(r) > limit} == {}


def test_a_stream_and_its_neighbour_share_no_run_of_values() -> None:
    """Counters are spaced like the keys of neighbours: without hashing between, streams would be shifted copies."""
    values = Noise.of(0, torch.arange(200), "attack", 0).uniform(200)
    assert len((values.flatten() * 2**24).long().unique()) > 0.99 * values.numel()


# --- Distributions


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_uniform(seed: int) -> None:
    values = Noise.of(seed, INDEX, "attack", 5).uniform(10).flatten().double().numpy()
    assert values.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / len(values)) ** 0.5)
    assert values.var() == pytest.approx(1 / 12, rel=0.01)
    assert scipy.stats.kstest(values, "uniform").pvalue > 1e-3
    counts = np.bincount((values * 256).astype(int), minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_normal(seed: int) -> None:
    values = Noise.of(seed, INDEX, "attack", 5).normal(10).flatten().double().numpy()
    assert values.mean() == pytest.approx(0.0, abs=4 / len(values) ** 0.5)
    assert values.var() == pytest.approx(1.0, rel=0.015)
    assert scipy.stats.kurtosis(values) == pytest.approx(0.0, abs=0.06)
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-3
    assert 3.5 < np.abs(values).max() < 6


def test_uniform_over_examples_for_one_element_and_over_elements_for_one_example() -> None:
    across = Noise.of(0, INDEX, "attack", 0).uniform().double().numpy()
    along = Noise.of(0, INDEX[:1], "attack", 0).uniform(20_000).flatten().double().numpy()
    over_steps = torch.cat([Noise.of(0, INDEX[:1], "attack", s).uniform() for s in range(3000)]).double().numpy()
    for values in (across, along, over_steps):
        assert scipy.stats.kstest(values, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("bit", range(0, 64, 7))
def test_a_flipped_bit_of_the_index_flips_half_of_the_key(bit: int) -> None:
    index = INDEX[:2000] * 2_654_435_761
    flipped = index ^ (1 << bit if bit < 63 else -(1 << 63))
    difference = (Noise.of(0, index, "a").keys ^ Noise.of(0, flipped, "a").keys).numpy().view(np.uint8)
    assert np.unpackbits(difference).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000])
def test_below(high: int) -> None:
    values = Noise.of(0, INDEX, "target").below(high, 5).flatten().numpy()
    assert values.min() >= 0 and values.max() < high
    if high > 1:
        assert scipy.stats.chisquare(np.bincount(values, minlength=high)).pvalue > 1e-3


# --- Permutations


@pytest.mark.parametrize("n", [0, 1, 2, 3, 1000, 60_000])
def test_permutation_is_one(n: int) -> None:
    order = permutation(n, 0, "order", 0)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_permutations_differ_and_leave_no_order_behind() -> None:
    orders = [permutation(1000, 0, "order", epoch) for epoch in range(20)] + [permutation(1000, 1, "order", 0)]
    assert len({order.tobytes() for order in orders}) == 21
    for order in orders:
        assert abs(scipy.stats.spearmanr(order, np.arange(1000)).statistic) < 4.5 / 1000**0.5
        assert (order == np.arange(1000)).sum() < 10
    for first, second in itertools.pairwise(orders):
        assert abs(scipy.stats.spearmanr(first, second).statistic) < 4.5 / 1000**0.5


def test_all_small_permutations_are_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        order = tuple(permutation(4, 0, "order", epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 1e-3
