"""What counts as a loss spike."""

from __future__ import annotations

import numpy as np

from moiety.training.spikes import FEWEST, WINDOW, SpikeDetector


def test_noise_of_several_domains_is_no_spike():
    rng = np.random.default_rng(0)
    detector = SpikeDetector()
    losses = rng.choice([0.8, 2.0, 3.0], 2000) * rng.lognormal(0, 0.2, 2000)
    assert not [step for step, loss in enumerate(losses) if detector.add(float(loss)) is not None]
    assert len(detector.losses) == WINDOW


def test_a_loss_far_above_the_last_ones_is_a_spike_and_does_not_hide_the_next():
    rng = np.random.default_rng(1)
    detector = SpikeDetector()
    losses = 2.0 * rng.lognormal(0, 0.2, 300)
    losses[[200, 201, 250]] *= 10
    assert [step for step, loss in enumerate(losses) if detector.add(float(loss)) is not None] == [200, 201, 250]


def test_the_first_steps_are_compared_with_nothing():
    detector = SpikeDetector()
    assert all(detector.add(loss) is None for loss in [1.0] * (FEWEST - 1) + [100.0])


def test_a_loss_that_falls_slowly_is_followed():
    detector = SpikeDetector([float(5 * 0.99**step) for step in range(128)])
    assert detector.add(1.5) is None and detector.add(50.0) is not None
