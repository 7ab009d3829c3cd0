"""Batches that are made ahead, and where a run goes on in them."""

import threading

import grain
import jax
import numpy as np
import pytest

from examples.llm.errors import UsageError
from examples.llm.instructions.batches import PairBatches
from examples.llm.instructions.encoding import EncodedText
from examples.llm.sampling import shuffled
from examples.llm.training.feeding import Feed


@pytest.fixture
def batches(rng):
    """Of two texts; four in a row have one shape."""
    texts = [EncodedText((int(n),) * n, (True,) * n) for n in rng.integers(2, 90, 50)]
    return PairBatches(texts, 2, alike=4, seed=5).random


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_step_depends_on_its_number_alone(batches):
    whole = Feed(batches, 1)
    steps = [whole.step(number) for number in range(30)]
    for number, (batch, own) in enumerate(steps):
        assert own == number and own.dtype == np.int32
        assert_equal(batch, batches[number])
    # A run that goes on after a stop, and one that begins again.
    resumed = Feed(batches, 1)
    for number in (17, 18, 19, 3, 4, 0):
        assert_equal(resumed.step(number), steps[number])


def test_batches_of_a_step_are_stacked(batches):
    feed = Feed(batches, 4)
    for number in (0, 1, 7):
        stacked, own = feed.step(number)
        assert own.tolist() == [*range(4 * number, 4 * number + 4)]
        for place in range(4):
            one = jax.tree.map(lambda x, place=place: x[place], stacked)
            assert_equal(one, batches[4 * number + place])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_batches_of_one_are_stacked_as_others_are(size, accumulate):
    """Endless data have more of them than of any other, and nearly more than can be counted."""
    feed = Feed(shuffled(7, size, seed=0), accumulate)
    batch, _ = feed.step(5)
    assert batch.shape == ((accumulate, size) if accumulate > 1 else (size,))


def test_the_next_batch_is_made_before_it_is_asked_for():
    made = {number: threading.Event() for number in range(5)}

    def make(number):
        made[number].set() if number in made else None
        return number

    feed = Feed(grain.MapDataset.range(100).map(make), 1)
    assert feed.step(0)[0] == 0
    assert made[1].wait(timeout=60)


def test_what_is_wrong_with_data_stays_one_line():
    def make(number):
        raise UsageError("--sequence-length: the texts are too short")

    with pytest.raises(UsageError) as error:
        Feed(grain.MapDataset.range(100).map(make), 1).step(0)
    assert str(error.value) == "--sequence-length: the texts are too short"
