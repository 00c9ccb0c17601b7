"""Groups of training rows about to be removed: their share of gradients and of the curvature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.convergence import DivergenceError
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.solvers import Prepared
from influence.truth.runs import Groups

_MOST_STEPS = 10  # of conjugate gradients that take a group's own curvature out
_RTOL = 1e-3  # of those steps; what a chord leaves of the gradient is more than that
_BYTES = 1 << 28  # of dense inputs handled in one call


class Removal:
    """k groups of rows, a column each: sums over a group of what its rows bring to the risk.

    Rows are read in batches of one length, many groups' in a call, and groups larger than a batch
    in several.

    Args:
      net: at the theta where curvature is taken.
      train: the training set.
      groups: k arrays of row numbers.
      batch_size: rows at a time at most; None: chosen.
      fraction: of the rows' weight that is taken out, a factor of every sum.
    """

    def __init__(
        self,
        net: GenericNeuralNet,
        train: Examples,
        groups: Groups,
        batch_size: int | None,
        fraction: float = 1.0,
    ):
        self.net, self.train, self.groups, self.fraction = net, train, groups, fraction
        self.sizes = np.array([len(group) for group in groups])
        first = train.take([0]).x
        parts = first.values() if isinstance(first, dict) else (first,)
        row = sum(int(np.prod(part.shape[1:])) * part.dtype.itemsize for part in parts)
        chosen = min(net.rows_per_batch(train), max(_BYTES // max(row, 1), 1))
        self._together = batch_size or chosen

    def gradients(self, thetas: NDArray, columns: NDArray) -> NDArray:
        """(d, j): sum over a group of grad (loss_i + penalty), at a column of thetas (d, j)."""
        total = self.net.penalty_gradient(thetas) * self._sizes(columns)
        for at, x, y in self._batches(columns):
            own = self.net.each_batch("gradient", x, y, thetas[:, at].T[:, :, None])
            total[:, at] += own[:, :, 0].T * y.shape[1]
        return total * self.fraction

    def hvp(self, V: NDArray, columns: NDArray) -> NDArray:
        """(d, j): sum over a group of the Hessian of loss_i + penalty at theta, times a column."""
        total = self.net.penalty_hvp(V) * self._sizes(columns)
        for at, x, y in self._batches(columns):
            products = self.net.each_batch("hvp", x, y, V[:, at].T[:, :, None])
            total[:, at] += products[:, :, 0].T * y.shape[1]
        return total * self.fraction

    def solve(self, inverse: Prepared, B: NDArray, columns: NDArray) -> NDArray:
        """About (A - H_g / n)^-1 b, (d, j), for the matrix A of `inverse` and H_g as in `hvp`.

        By the steps of conjugate gradients that `pairs` names; A^-1 b for a group that leaves no
        curvature along it.

        Raises: DivergenceError if A is not positive definite.
        """
        X = np.zeros_like(B)
        for step, (at, p, _, length) in enumerate(self._directions(inverse, B, columns)):
            X[:, at] += np.where(length > 0, length, float(step == 0)) * p
        return X

    def pairs(self, inverse: Prepared, B: NDArray) -> list[tuple[NDArray, NDArray]]:
        """Directions P (d, k), and what A - H_g / n makes of them, that tell it from A.

        A is the matrix of `inverse`, H_g as in `hvp`. The directions are those of conjugate
        gradients for (A - H_g / n) x = b, preconditioned by A^-1: secant updates of A^-1 by these
        pairs solve for b. About as many are needed as a small group has outputs. Large groups,
        whose products cost as much as the data passes that they are to save, get fewer.

        Args:
          inverse: of A; positive definite.
          B: (d, k) right-hand sides, one a group.

        Returns: pairs (P, (A - H_g / n) P); zero for a group that has had its directions, or that
          leaves no curvature along one.
        Raises: DivergenceError if A is not positive definite.
        """
        pairs = []
        for at, p, Hp, length in self._directions(inverse, B, np.arange(B.shape[1])):
            P, Y = np.zeros_like(B), np.zeros_like(B)
            P[:, at], Y[:, at] = np.where(length > 0, p, 0), np.where(length > 0, Hp, 0)
            pairs.append((P, Y))
        return pairs

    def _directions(
        self, inverse: Prepared, B: NDArray, columns: NDArray
    ) -> Iterator[tuple[NDArray, NDArray, NDArray, NDArray]]:
        """(positions in columns (r,), p (d, r), (A - H_g / n) p (d, r), length of the step (r,)).

        Preconditioned conjugate gradients. A p follows from the recurrence of p, so that a step
        costs one product with the group's own rows. A length of 0, which is a column's last, says
        that no curvature is left along p.
        """
        n = len(self.train)
        limit = np.clip(n // self.sizes[columns], 1, _MOST_STEPS)
        at = np.flatnonzero(B.any(axis=0))  # the columns still open
        if not len(at):
            return
        r = B[:, at]
        z = apply(inverse, r)
        p, Ap = z, r  # Ap: what A, without the groups taken out, makes of p
        rz = _dot(r, z)
        target = _RTOL**2 * rz
        for step in range(1, _MOST_STEPS + 1):
            Hp = Ap - self.hvp(p, columns[at]) / n
            curvature = _dot(p, Hp)
            length = np.divide(rz, curvature, out=np.zeros_like(rz), where=curvature > 0)
            yield at, p, Hp, length
            stay = (length > 0) & (step < limit[at])
            if not stay.any():
                return
            r = r - length * Hp
            at, (r, p, Ap, rz, target) = at[stay], _columns(stay, r, p, Ap, rz, target)
            z = apply(inverse, r)
            before, rz = rz, _dot(r, z)
            stay = rz > target
            if not stay.any():
                return
            at, (r, z, p, Ap, before, rz, target) = (
                at[stay],
                _columns(stay, r, z, p, Ap, before, rz, target),
            )
            p, Ap = z + rz / before * p, r + rz / before * Ap

    def _sizes(self, columns: NDArray) -> NDArray:
        return self.sizes[columns].astype(self.net.dtype)

    def _batches(self, columns: NDArray) -> Iterator[tuple[NDArray, Any, NDArray]]:
        """(positions in columns (r,), x (r, b, ...), y (r, b, ...)): batches of equal length b.

        A position occurs once in a batch: a group's parts are full ones, alone, and a shorter rest.
        """
        by_length: dict[int, list[tuple[int, NDArray]]] = {}
        for position, column in enumerate(columns):
            group = self.groups[column]
            for start in range(0, len(group), self._together):
                part = group[start : start + self._together]
                by_length.setdefault(len(part), []).append((position, part))
        for length, found in by_length.items():
            num = max(self._together // length, 1)
            for start in range(0, len(found), num):
                at, rows = zip(*found[start : start + num], strict=True)
                yield np.array(at), *self.train.stacked(np.stack(rows))


def apply(inverse: Prepared, B: NDArray) -> NDArray:
    """A^-1 B for the matrix A of `inverse`; DivergenceError if it is not positive definite."""
    raw = inverse.apply(B)
    if np.any(np.asarray(raw.min_curvature) <= 0):
        smallest = np.nanmin(raw.min_curvature)
        more = f" by more than {-smallest:.3g}" if smallest else ""
        raise DivergenceError(
            f"the curvature at theta must be positive definite, got {smallest:.3g} in some "
            f"direction; raise the damping{more} or, where there is none, retrain by method='fit'."
        )
    return raw.x


def _columns(which: NDArray, *parts: NDArray) -> list[NDArray]:
    return [part[..., which] for part in parts]


def _dot(U: NDArray, V: NDArray) -> NDArray:
    return np.einsum("ij,ij->j", U, V)
