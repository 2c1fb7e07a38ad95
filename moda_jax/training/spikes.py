"""Loss spikes: a loss far above those of the last steps, measured against their median."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

_WINDOW_STEPS = 128
_FEWEST_STEPS = 16  # before that nobody can say what is usual
_DEVIATIONS_PER_MAD = 1.4826  # of a normal distribution
_SMALLEST_DEVIATION = 1e-3  # as a share of the median: a constant loss has none


class LossSpikes:
    """Counts spikes: loss > median + deviations * 1.4826 * (median absolute deviation), over the last 128 steps.

    A spike does not enter the window, unless as many as half of it came in a row: then that is how things are now.

    Args:
        deviations: `train.loss_spike_deviations`; 0: nothing is a spike.
        saved: from `save` of an earlier run.

    Attributes:
        count: spikes so far.
    """

    def __init__(self, deviations: float, saved: dict[str, Any] | None = None):
        saved = saved or {"count": 0, "in_a_row": 0, "losses": []}
        self._deviations = deviations
        self.count: int = saved["count"]
        self._in_a_row: int = saved["in_a_row"]
        self._losses = deque(saved["losses"], maxlen=_WINDOW_STEPS)

    def add(self, loss: float) -> bool:
        """Takes a step's loss, and says whether it is a spike. One that is not finite is counted elsewhere."""
        if not self._deviations or not math.isfinite(loss):
            return False
        is_spike = len(self._losses) >= _FEWEST_STEPS and loss > self._threshold()
        self._in_a_row = self._in_a_row + 1 if is_spike else 0
        self.count += is_spike
        if self._in_a_row > _WINDOW_STEPS // 2:
            self._losses.clear()
            self._in_a_row = 0
        if not is_spike:
            self._losses.append(loss)
        return is_spike

    def save(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        return {"count": self.count, "in_a_row": self._in_a_row, "losses": list(self._losses)}

    def _threshold(self) -> float:
        losses = np.asarray(self._losses)
        median = float(np.median(losses))
        deviation = _DEVIATIONS_PER_MAD * float(np.median(np.abs(losses - median)))
        return median + self._deviations * max(deviation, _SMALLEST_DEVIATION * abs(median))
