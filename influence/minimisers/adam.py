"""Adam's step (Kingma & Ba 2015), and the rows of its minibatches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# These are Keras' defaults: the decay rates of both running means and the denominator's constant.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


@dataclass(frozen=True, eq=False)
class Moments:
    """Adam's state. With this state and theta, a training can continue.

    Attributes:
      steps: number of steps taken.
      first: (d,) running mean of the gradients, not corrected for its start at zero.
      second: (d,) running mean of the squared gradients, not corrected either.
    """

    steps: int
    first: NDArray
    second: NDArray

    @classmethod
    def none(cls, num_parameters: int, dtype: Any) -> Moments:
        """Return the state before the first step."""
        zero = np.zeros(num_parameters, dtype)
        return cls(0, zero, zero)

    def step(self, thetas: NDArray, gradients: NDArray, rate: float) -> tuple[NDArray, Moments]:
        """Take one step of k trainings. Return their parameters (d, k) and their new moments.

        Step t subtracts rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon) from theta. m and
        v are the running means, and b1 and b2 are their decay rates. Keras uses this form, which
        Kingma & Ba (2015) give at the end of section 2. Its epsilon differs from the epsilon in
        their algorithm 1.
        """
        t = self.steps + 1
        m, v = (a[:, None] if a.ndim == 1 else a for a in (self.first, self.second))
        m = m + (gradients - m) * (1 - BETA_1)
        v = v + (gradients**2 - v) * (1 - BETA_2)
        length = rate * np.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
        moved = thetas - (length * m / (np.sqrt(v) + EPSILON)).astype(thetas.dtype)
        return moved, Moments(t, m, v)


def batch_rows(num_examples: int, batch_size: int, seed: int, first: int) -> Iterator[NDArray]:
    """Yield the row numbers of each minibatch, from step `first` on, without end.

    A generator with the seed (seed, p) shuffles the rows of pass p over the data. The last
    minibatch of a pass is filled up with rows of the next pass.
    """
    batch_size = min(batch_size, num_examples)
    number, offset = divmod(first * batch_size, num_examples)

    def shuffled(number: int) -> NDArray:
        return np.random.default_rng((seed, number)).permutation(num_examples)

    waiting = shuffled(number)[offset:]
    while True:
        while len(waiting) < batch_size:
            number += 1
            waiting = np.concatenate([waiting, shuffled(number)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
