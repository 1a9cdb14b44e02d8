"""Spectra and hashes against their definitions in float64."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.fft import dctn

from data_loaders.perceptual_hash import CUTS, MIRROR, VIEWS, WHOLE, Box, hashes, near, spectra, thumbnails


@pytest.fixture(scope="module")
def thumbs() -> NDArray[np.uint8]:
    """(40, 32, 32): parts of photographs."""
    from sklearn.datasets import load_sample_images

    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in load_sample_images().images]
    return np.stack(
        [
            image[t : t + 32, left : left + 32]
            for image in grey
            for t in (0, 90, 180, 270)
            for left in range(0, 500, 100)
        ]
    )


def test_a_spectrum_is_the_weighed_cosine_transform(thumbs: NDArray[np.uint8]) -> None:
    transform = dctn(thumbs.astype(np.float64), norm="ortho", axes=(1, 2))[:, :12, :12]
    weighed = (transform * np.hypot(*np.indices((12, 12)))).reshape(len(thumbs), -1)
    expected = weighed / np.linalg.norm(weighed, axis=1, keepdims=True)
    assert spectra(thumbs, [WHOLE])[:, 0] == pytest.approx(expected, abs=1e-4)


def test_a_view_is_the_part_enlarged(thumbs: NDArray[np.uint8]) -> None:
    found = spectra(thumbs, [Box(1, 3, 28)])
    enlarged = [cv2.resize(thumb[1:29, 3:31].astype(np.float32), (32, 32)) for thumb in thumbs]
    assert found == pytest.approx(spectra(np.stack(enlarged), [WHOLE]), abs=1e-4)
    assert VIEWS[0] == WHOLE and {box.size for box in CUTS} == {27, 28, 29, 30, 31, 32}
    assert all(0 <= box.top <= 32 - box.size and 0 <= box.left <= 32 - box.size for box in (*VIEWS, *CUTS))


def test_a_hash_is_the_signs_and_mirrors(thumbs: NDArray[np.uint8]) -> None:
    transform = dctn(thumbs.astype(np.float64), norm="ortho", axes=(1, 2))[:, :8, :8].reshape(len(thumbs), 64)
    transform[:, 0] = 0
    expected = [sum(1 << int(bit) for bit in np.flatnonzero(row > 0)) for row in transform]
    of = hashes(spectra(thumbs))[:, 0]
    assert of.tolist() == expected
    assert (hashes(spectra(thumbs[:, :, ::-1]))[:, 0] == of ^ MIRROR).mean() > 0.9


def test_near_finds_all_pairs_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_loaders.perceptual_hash._BLOCK", 7)
    random = np.random.default_rng(0)
    mine, others = random.integers(0, 2**64, 5, np.uint64), random.integers(0, 2**64, 30, np.uint64)
    others[20] = mine[3] ^ np.uint64(0b111)
    apart = np.array([[int(a ^ b).bit_count() for b in others] for a in mine])
    places, found = near(mine, others, 26)
    assert set(zip(places.tolist(), found.tolist(), strict=True)) == set(
        zip(*map(list, np.nonzero(apart <= 26)), strict=True)
    )
    assert [pair.tolist() for pair in near(mine, others, 3)] == [[3], [20]]
    assert [pair.tolist() for pair in near(mine, others, 2)] == [[], []]


def test_an_image_that_is_not_square_has_two_pictures() -> None:
    image = np.zeros((60, 90, 3), np.uint8)
    image[:, :15] = 255
    whole, middle = thumbnails(image)
    assert whole.shape == middle.shape == (32, 32)
    assert whole[:, :5].min() == 255 and whole[:, 7:].max() == 0 and middle.max() == 0
    assert len(thumbnails(image[:60, :60])) == 1


def test_pictures_without_content_have_no_direction() -> None:
    even = np.full((1, 32, 32), 200, np.uint8)
    assert not spectra(even).any()
