"""Adam's step (Kingma & Ba 2015), and the order in which its minibatches take the rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The decay rates of the two running means, and what keeps the division finite; those of Keras.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


@dataclass(frozen=True, eq=False)
class Moments:
    """Adam's state after a training: what continuing it needs besides theta.

    Attributes:
      steps: taken.
      first: (d,) running mean of the gradients, not yet corrected for its start at zero.
      second: (d,) that of their squares.
    """

    steps: int
    first: NDArray
    second: NDArray

    @classmethod
    def none(cls, num_parameters: int, dtype: Any) -> Moments:
        """Return the state before the first step, of theta (num_parameters,)."""
        zero = np.zeros(num_parameters, dtype)
        return cls(0, zero, zero)

    def step(self, thetas: NDArray, gradients: NDArray, rate: float) -> tuple[NDArray, Moments]:
        """The next parameters and moments of k trainings at once, (d, k) each, as Keras has them.

        theta - rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon), Kingma & Ba (2015, end of
        section 2), where epsilon is not the one of their algorithm 1.
        """
        t = self.steps + 1
        m, v = (a[:, None] if a.ndim == 1 else a for a in (self.first, self.second))
        m = m + (gradients - m) * (1 - BETA_1)
        v = v + (gradients**2 - v) * (1 - BETA_2)
        length = rate * np.sqrt(1 - BETA_2**t) / (1 - BETA_1**t)
        moved = thetas - (length * m / (np.sqrt(v) + EPSILON)).astype(thetas.dtype)
        return moved, Moments(t, m, v)


def batch_rows(num_examples: int, batch_size: int, seed: int, first: int) -> Iterator[NDArray]:
    """The rows of step `first` and of all that follow: pass p is shuffled by (seed, p)."""
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
