"""Generated pictures of dogs and fish, which can replace the photographs of dogfish.

A fish is a long body with a tail. A dog is a trunk with a head, on legs.
"""

from pathlib import Path

import numpy as np

from data.splits import DataSet, Split

NUM_TRAIN, NUM_TEST = 200, 80  # numbers of pictures, half of them fish
SIDE = 32
SEED = 0

# Each class has this mean colour, in RGB.
_DOGS, _FISH = (150, 110, 70), (190, 120, 60)
# A colour differs from the mean by at most this much, so colour does not separate the classes.
_SPREAD = 40
_NOISE = 10.0


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Draw the pictures. Every call draws the same pictures.

    Args:
      folder: ignored; every reader has this argument.
      dtype: ignored. Pictures are bytes, like those of dogfish.
    Returns: (train, test), each (x, y): x (n, 32, 32, 3) uint8; y (n,) int64, dog 0, fish 1.
    """
    rng = np.random.RandomState(SEED)  # same numbers in every version of NumPy
    parts = []
    for count in (NUM_TRAIN, NUM_TEST):
        y = rng.permutation(count) % 2
        parts.append((_pictures(rng, y), y.astype(np.int64)))
    return parts[0], parts[1]


def pictures(count: int, seed: int) -> Split:
    """Draw further pictures, for example to train a network before it sees the data set.

    Args:
      count: number of pictures, half of them fish.
      seed: seed of the draw. SEED gives pictures of the data set.
    Returns: (x, y), in the form of `read`.
    """
    rng = np.random.RandomState(seed)
    y = rng.permutation(count) % 2
    return _pictures(rng, y), y.astype(np.int64)


def _pictures(rng: np.random.RandomState, y: np.ndarray) -> np.ndarray:
    n = len(y)
    v, u = np.mgrid[:SIDE, :SIDE] / SIDE  # down, across
    across, down = rng.uniform(0.35, 0.65, (2, n, 1, 1))
    facing = np.where(rng.random_sample(n) < 0.5, 1, -1)[:, None, None]
    size = rng.uniform(0.8, 1.2, (n, 1, 1))
    u, v = facing * (u - across) / size, (v - down) / size

    body = (u / 0.3) ** 2 + (v / 0.13) ** 2 < 1
    tail = (u < -0.2) & (u > -0.42) & (np.abs(v) < (-0.2 - u) * 0.7 + 0.02)
    trunk = (np.abs(u) < 0.22) & (np.abs(v) < 0.1)
    legs = (np.abs(np.abs(u) - 0.16) < 0.04) & (v > 0) & (v < 0.32)
    head = (u - 0.27) ** 2 + (v + 0.12) ** 2 < 0.01
    fish = (y == 1)[:, None, None]
    inside = np.where(fish, body | tail, trunk | legs | head)[..., None]

    colour = np.where(fish[..., None], _FISH, _DOGS) + rng.uniform(-_SPREAD, _SPREAD, (n, 1, 1, 3))
    above, below = rng.uniform(40, 215, (2, n, 1, 1, 3))
    slope = np.arange(SIDE).reshape(-1, 1, 1) / SIDE
    levels = np.where(inside, colour, above + (below - above) * slope)
    levels = levels + _NOISE * rng.standard_normal(levels.shape)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


DATASET = DataSet(
    name="fishlike",
    what="stand-in for dogfish, generated, 32x32: 200 train, 80 test",
    terms="none needed",
    read=read,
    stand_in=True,
)
