"""The global order and the counter-based random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cast_fast.data import sampling
from cast_fast.data.saliency_crop import WINDOW_SHAPE
from cast_fast.errors import UserError


@pytest.mark.parametrize("length", [0, 1, 2, 449])
def test_epoch_order_is_a_permutation(length: int) -> None:
    assert sorted(sampling.epoch_order(length, 3, 5)) == list(range(length))


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    order = sampling.epoch_order(100, 3, 5)
    assert np.array_equal(order, sampling.epoch_order(100, 3, 5))
    for seed, epoch in ((4, 5), (3, 6), (5, 3), (2**64 - 1, 5), (3, 2**40)):
        assert not np.array_equal(order, sampling.epoch_order(100, seed, epoch))


@pytest.mark.parametrize("draw_order", [sampling.epoch_order, sampling.shuffle_order], ids=["epochs", "steps"])
def test_orders_of_neighbours_have_nothing_in_common(draw_order: Callable[[int, int, int], np.ndarray]) -> None:
    """Not even shifted: words of one stream that overlapped with the next one's would give the same order moved on."""
    first, second = (np.argsort(draw_order(4000, 7, number)) for number in (3, 4))
    for shift in range(-8, 9):
        pairs = first[8:-8], second[8 + shift : len(second) - 8 + shift]
        assert abs(np.corrcoef(*pairs)[0, 1]) < 0.08  # five standard deviations


def test_first_places_are_uniform() -> None:
    counts = np.bincount([sampling.epoch_order(10, seed, 0)[0] for seed in range(2000)], minlength=10)
    # Binomial with mean 200 and standard deviation 13.4.
    assert counts.min() > 200 - 5 * 13.4
    assert counts.max() < 200 + 5 * 13.4


def test_streams_are_frozen() -> None:
    """A run can be resumed under another version of NumPy only while these words stay what they were."""
    assert sampling.epoch_order(8, 0, 0).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]
    digest = hashlib.sha256(sampling.draw(7, np.array([0, 1, 10**12])).augment.tobytes()).hexdigest()
    assert digest[:16] == "f846ce747859bd2c"
    assert [sampling.replacement(1000, 0, 5, attempt) for attempt in range(4)] == [556, 141, 24, 770]


@given(
    seed=st.integers(0, 2**64 - 1),
    positions=st.lists(st.one_of(st.integers(0, 12), st.integers(0, 2**62)), max_size=8),
)
def test_a_position_owns_its_numbers(seed: int, positions: list[int]) -> None:
    """Whatever is drawn together, in any order and with repeats, a position gets the same numbers."""
    together = sampling.draw(seed, np.array(positions, dtype=np.int64))
    assert together.windows.shape == (len(positions), *WINDOW_SHAPE)
    assert together.augment.shape == (len(positions), 2, sampling.AUGMENT_DRAWS)
    for place, position in enumerate(positions):
        alone = sampling.draw(seed, np.array([position]))
        assert np.array_equal(together.windows[place], alone.windows[0])
        assert np.array_equal(together.augment[place], alone.augment[0])


def test_numbers_are_uniform_and_independent() -> None:
    augment = sampling.draw(11, np.arange(4000)).augment.reshape(4000, -1)
    assert augment.min() >= 0
    assert augment.max() < 1
    assert np.abs(augment.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 4000)
    correlation = np.corrcoef(augment.T) - np.eye(augment.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    neighbours = (augment[1:] * augment[:-1]).mean(axis=0) - 0.25
    assert np.abs(neighbours).max() < 5 * np.sqrt(7 / 144 / 4000)


def test_positions_share_no_numbers() -> None:
    numbers = sampling.draw(0, np.arange(50)).augment
    assert len(np.unique(numbers)) == numbers.size


def test_window_numbers_are_ready_for_the_crop_rule() -> None:
    windows = sampling.draw(0, np.arange(200)).windows
    area, ratio = windows[:, :, :10, 0], windows[:, :, :10, 1]
    assert area.min() >= 0.2
    assert area.max() < 1
    assert ratio.min() >= 0.75
    assert ratio.max() <= 4 / 3
    assert windows[:, :, 10].max() < 1


@pytest.mark.parametrize("positions", [[-1], [[1, 2]]])
def test_draw_refuses_bad_positions(positions: list) -> None:
    with pytest.raises(ValueError, match="positions"):
        sampling.draw(0, np.array(positions))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_have_64_bits(seed: int) -> None:
    with pytest.raises(ValueError, match="seed"):
        sampling.draw(seed, np.array([0]))
    with pytest.raises(ValueError, match="seed"):
        sampling.epoch_order(3, seed, 0)


@pytest.mark.parametrize("length", [1, 7, 1_300_000])
def test_replacements_are_indices(length: int) -> None:
    found = [sampling.replacement(length, 9, position, attempt) for position in range(40) for attempt in range(5)]
    assert min(found) >= 0
    assert max(found) < length
    assert length < 1000 or len(set(found)) > 190


@given(length=st.integers(8, 60), seed=st.integers(0, 100), step=st.integers(0, 40))
def test_ranks_share_out_one_global_batch(length: int, seed: int, step: int) -> None:
    whole = sampling.GlobalOrder(length, seed, 8).at(step)
    for world in (2, 4, 8):
        parts = [sampling.GlobalOrder(length, seed, 8 // world, rank, world).at(step) for rank in range(world)]
        assert np.array_equal(np.stack([indices for indices, _ in parts], axis=1).ravel(), whole[0])
        assert np.array_equal(np.stack([positions for _, positions in parts], axis=1).ravel(), whole[1])


@given(length=st.integers(1, 50), batch=st.integers(1, 10), seed=st.integers(0, 5))
def test_an_epoch_shows_no_sample_twice(length: int, batch: int, seed: int) -> None:
    if length < batch:
        with pytest.raises(UserError, match=f"--batch: got {batch}.*{length}"):
            sampling.GlobalOrder(length, seed, batch)
        return
    order = sampling.GlobalOrder(length, seed, batch)
    assert order.steps_per_epoch == length // batch
    for epoch in (0, 1):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        seen = np.concatenate([order.at(step)[0] for step in steps])
        assert len(seen) == len(np.unique(seen)) == order.steps_per_epoch * batch
        assert seen.min() >= 0
        assert seen.max() < length
    positions = np.concatenate([order.at(step)[1] for step in range(2 * order.steps_per_epoch)])
    assert np.array_equal(positions, np.arange(len(positions)))


def test_the_remainder_differs_between_epochs() -> None:
    order = sampling.GlobalOrder(10, 0, 4)
    left_out = [set(range(10)) - set(np.concatenate([order.at(2 * e)[0], order.at(2 * e + 1)[0]])) for e in range(8)]
    assert len({tuple(sorted(rest)) for rest in left_out}) > 1


def test_order_names_all_processes() -> None:
    with pytest.raises(UserError, match="4 processes"):
        sampling.GlobalOrder(10, 0, 4, rank=1, world=4)


@pytest.mark.parametrize(("batch", "rank", "world"), [(0, 0, 1), (1, 1, 1), (1, -1, 2), (1, 0, 0)])
def test_order_refuses_impossible_ranks(batch: int, rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="expected batch >= 1"):
        sampling.GlobalOrder(10, 0, batch, rank, world)


def test_order_refuses_negative_steps() -> None:
    with pytest.raises(ValueError, match="step"):
        sampling.GlobalOrder(10, 0, 2).at(-1)
