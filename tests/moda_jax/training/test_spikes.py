import json
import math
import random

from moda_jax.training.spikes import LossSpikes


def noisy(seed, count, level=3.0):
    source = random.Random(seed)
    return [level + source.gauss(0, 0.05) for _ in range(count)]


def test_a_jump_is_a_spike_and_noise_is_none():
    spikes = LossSpikes(6.0)
    assert not any(spikes.add(loss) for loss in noisy(0, 500))
    assert spikes.add(4.0) and spikes.count == 1
    assert not spikes.add(2.0)  # downwards is none
    assert not any(spikes.add(loss) for loss in noisy(1, 100))
    assert spikes.count == 1


def test_a_falling_loss_has_no_spikes():
    spikes = LossSpikes(6.0)
    assert not any(spikes.add(5.5 * math.exp(-step / 50) + 1.5) for step in range(500))


def test_the_first_steps_and_values_without_a_number_are_never_spikes():
    spikes = LossSpikes(6.0)
    assert not any(spikes.add(loss) for loss in (1.0, 100.0, math.nan, math.inf))
    assert not LossSpikes(0.0).add(1e9)


def test_a_new_level_is_accepted_in_the_end():
    spikes = LossSpikes(6.0)
    for loss in noisy(0, 200) + noisy(1, 200, level=5.0):
        spikes.add(loss)
    assert spikes.count == 65  # half of the window, and the one that tips it
    assert not spikes.add(5.0)


def test_what_is_saved_goes_on_as_if_nothing_had_been():
    losses = noisy(2, 300)
    losses[150] = losses[250] = 9.0
    whole, half = LossSpikes(6.0), LossSpikes(6.0)
    for loss in losses[:200]:
        whole.add(loss), half.add(loss)
    half = LossSpikes(6.0, json.loads(json.dumps(half.save())))
    assert [whole.add(loss) for loss in losses[200:]] == [half.add(loss) for loss in losses[200:]]
    assert whole.count == half.count == 2
