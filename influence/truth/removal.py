"""The contributions of groups of training rows to the risk's gradient and Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.convergence import DivergenceError
from influence.common.memory import VECTORS, fitting
from influence.common.numbers import dots
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.solvers import Prepared
from influence.truth.runs import Groups

# Conjugate gradients take at most this many steps to subtract a group's own curvature.
_MOST_STEPS = 10
# Conjugate gradients stop at this relative residual. A smaller residual would not help: the Newton
# step uses the Hessian at the initial theta, so even an exact step leaves a larger fraction of the
# gradient.
_RTOL = 1e-3


class Removal:
    """Sums of gradients, and of Hessian products, over the rows of each of k groups.

    If the loss masks positions, row i has the mass v_i as its weight, and n is the sum of all
    masses.

    Groups are divided into parts that fit into memory. One call of the net processes several parts
    of equal length. In the methods, `columns` (j,) are the numbers of j groups, and arrays have a
    column for each of these groups.

    Args:
      net: a net at the theta where the curvature is computed.
      train: the training set, n rows.
      groups: k arrays of row numbers.
      batch_size: the largest number of rows in memory at a time; None: chosen by the library.
      fraction: the fraction of each row's weight that is removed. It multiplies every sum.
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
        # `whole` is the total mass of all rows, and `masses[g]` is the mass of group g. Without
        # masks, each row has mass 1.
        self.whole, self.masses = net.mass(train), self.sizes
        if net.loss.has_masses:
            rows = net.row_masses(train)
            self.masses = np.array([rows[group].sum() for group in groups])
        first = train.take([0]).x
        parts = first.values() if isinstance(first, dict) else (first,)
        row = sum(int(np.prod(part.shape[1:])) * part.dtype.itemsize for part in parts)
        # Inputs are dense in a batch, even if they are sparse in the set.
        self._together = batch_size or fitting(VECTORS, row, net.rows_per_batch(train))

    def gradients(self, thetas: NDArray, columns: NDArray) -> NDArray:
        """Return sums (d, j) of grad (loss_i + penalty) over the groups, at thetas (d, j)."""
        return self._summed("gradient", self.net.penalty_gradient(thetas), thetas, columns)

    def hvp(self, V: NDArray, columns: NDArray) -> NDArray:
        """Return H_g v for each group g and its column v of V: (d, j).

        H_g is the sum of the Hessians of loss_i + penalty over the rows of group g.
        """
        return self._summed("hvp", self.net.penalty_hvp(V), V, columns)

    def solve(self, inverse: Prepared, B: NDArray, columns: NDArray) -> NDArray:
        """Solve (A - H_g / n) x = b to a low precision, for each column b of B (d, j).

        A is the matrix of `inverse`, and `hvp` defines H_g. The method is conjugate gradients,
        preconditioned by A^-1. If A - H_g / n has no positive curvature along A^-1 b, the result is
        A^-1 b.

        Returns: (d, j).
        Raises: DivergenceError if A is not positive definite.
        """
        X = np.zeros_like(B)
        for step, (at, p, _, length) in enumerate(self._directions(inverse, B, columns)):
            X[:, at] += np.where(length > 0, length, float(step == 0)) * p
        return X

    def pairs(self, inverse: Prepared, B: NDArray) -> list[tuple[NDArray, NDArray]]:
        """Find directions P (d, k) in which A - H_g / n differs from A, and (A - H_g / n) P.

        A is the matrix of `inverse`, and `hvp` defines H_g. The directions are those of conjugate
        gradients for (A - H_g / n) x = b, preconditioned by A^-1. Each direction p and its product
        (A - H_g / n) p form a pair. Secant updates with these pairs turn A^-1 into an operator that
        maps b approximately to x. The number of pairs that a small group needs is about the number
        of model outputs for its rows. A large group gets fewer pairs, because its products cost as
        much as the data passes that they would save.

        Args:
          inverse: a solver prepared for A.
          B: (d, k) right-hand sides b, one for each group.

        Returns: pairs (P, (A - H_g / n) P). A column is zero if its group needs no more directions,
          or if A - H_g / n has no positive curvature along the direction.
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
        """Yield the steps of preconditioned conjugate gradients.

        A p needs no product with A. The directions follow the recurrence p <- z + beta p with
        z = A^-1 r, so that A p <- r + beta A p. Each step therefore costs only one product with H_g
        and one with A^-1. If A - H_g / n has no positive curvature along p, the column gets the
        length 0 and ends.

        Yields: positions (r,) in `columns`, directions p (d, r), (A - H_g / n) p (d, r), and the
          lengths of the steps (r,).
        """
        n = self.whole
        limit = np.clip(len(self.train) // self.sizes[columns], 1, _MOST_STEPS)
        at = np.flatnonzero(B.any(axis=0))  # These columns are not solved yet.
        if not len(at):
            return
        r = B[:, at]
        z = apply(inverse, r)
        p, Ap = z, r  # `Ap` is A p, and p = A^-1 r
        rz = dots(r, z)
        target = _RTOL**2 * rz
        for step in range(1, _MOST_STEPS + 1):
            Hp = Ap - self.hvp(p, columns[at]) / n
            curvature = dots(p, Hp)
            length = np.divide(rz, curvature, out=np.zeros_like(rz), where=curvature > 0)
            yield at, p, Hp, length
            stay = (length > 0) & (step < limit[at])
            if not stay.any():
                return
            r = r - length * Hp
            at, (r, p, Ap, rz, target) = at[stay], _columns(stay, r, p, Ap, rz, target)
            z = apply(inverse, r)
            before, rz = rz, dots(r, z)
            stay = rz > target
            if not stay.any():
                return
            at, (r, z, p, Ap, before, rz, target) = (
                at[stay],
                _columns(stay, r, z, p, Ap, before, rz, target),
            )
            p, Ap = z + rz / before * p, r + rz / before * Ap

    def _summed(self, question: Any, penalty: NDArray, V: NDArray, columns: NDArray) -> NDArray:
        """Return (d, j): the sum of `net.each_batch` over each group, plus the penalty's part."""
        total = penalty * self.masses[columns].astype(self.net.dtype)
        for at, x, y in self._batches(columns):
            own = self.net.each_batch(question, x, y, V[:, at].T[:, :, None])
            total[:, at] += own[:, :, 0].T * y.shape[1]
        return total * self.fraction

    def _batches(self, columns: NDArray) -> Iterator[tuple[NDArray, Any, NDArray]]:
        """Yield batches of r parts of groups. Each part has b rows.

        A batch contains at most one part of each group. All parts of a group except the last one
        fill a whole batch.

        Yields: the parts' positions (r,) in `columns`, x (r, b, ...), y (r, b, ...).
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
    """Return A^-1 B for the matrix A of `inverse`.

    Raises: DivergenceError if A is not positive definite.
    """
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
