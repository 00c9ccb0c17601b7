"""Tests of a net and its data before scores are computed. They show if scores can be trusted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from influence.common.progress import progress
from influence.curvature.operators import (
    Curvature,
    GaussNewton,
    Hessian,
    check_batch_size,
    check_damping,
)
from influence.examples.examples import Examples
from influence.examples.given import Data
from influence.net.checked import Net, checked
from influence.net.net import GenericNeuralNet
from influence.preflight import hessian, labels, risk, rows
from influence.preflight.report import Finding, Line, Report
from influence.preflight.rows import sample
from influence.solvers import CG
from influence.solvers.plan import Planner
from influence.solvers.spectrum import spectrum

# The progress bar expects this many lines of the report.
_NUM_LINES = 13
# `spectrum` stops at this residual, relative to the largest |eigenvalue|.
_RTOL = 1e-4
# For d > 1024, `spectrum` makes at most about this many products for each end of the spectrum.
_MOST_PRODUCTS = 512
# This many Lanczos steps give the largest eigenvalue of a Gauss-Newton matrix to a few per cent.
_LANCZOS_STEPS = 6
# Hessian products are compared with finite differences on at most this many rows.
_DERIVATIVE_ROWS = 512


def check(
    net: Net,
    train: Data,
    *,
    damping: float | None = None,
    curvature: type[Curvature] | None = None,
    test: Data = None,
    batch_size: int | None = None,
) -> Report:
    """Check the assumptions of influence functions for a net before scores are computed.

    The check tests three assumptions. First, the risk is a mean of per-example losses plus the
    penalty. Second, theta is a minimum of the risk. Third, derivatives are correct, and the matrix
    that `Influence` would use is invertible. Each line of the report is the result of one test: its
    name, a value, the meaning and a remedy. If a line about the rows fails, derivatives are not
    checked. The line "labels" is an exception: if it fails, they are still checked.

    The check takes about seven passes over the training set, eight gradients and three Hessian
    products on at most 512 rows, and at most 20 steps of CG on three vectors. For a Hessian,
    `spectrum` needs further products: d products if d <= 1024, else some hundreds. For a damped
    Gauss-Newton matrix, a positive lower bound on the eigenvalues is known, and 7 products are
    enough. The net does not change.

    Args:
      net: the model, at the theta that will be explained, in any form that `Influence` takes.
      train: the training set, in any form that `fit` takes.
      damping: the damping that `Influence` will get.
      curvature: the curvature that `Influence` will get.
      test: rows whose losses will be explained. None uses training rows instead.
      batch_size: number of rows in a batch. It limits memory and does not change results. None lets
        the net choose.

    Returns: Report. `print(report)` shows a table. `report.ok` is True if every line is ok.
    Raises: TypeError if `net` is not a GenericNeuralNet or a set is not Examples; ValueError for a
      negative damping, a bad batch size or a single row. Faults of the model, loss or data
      do not raise an error, but appear in the report.
    """
    net, _, _ = checked(net)
    train = net.given(train, "train")
    test = None if test is None else net.given(test, "test")
    if damping is not None:
        check_damping(damping)
    check_batch_size(batch_size)
    if len(train) < 2:
        raise ValueError("train must have at least 2 rows to leave one out, got 1.")
    options = {"damping": damping, "curvature": curvature, "batch_size": batch_size}
    lines = _lines(net, train, test, options)
    return Report(tuple(progress(lines, "checking the net", _NUM_LINES)))


def check_rows(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples | None = None,
    batch_size: int | None = None,
) -> Report:
    """Return a report with the lines of `check` about the rows and the risk only.

    The lines about derivatives are left out. The report needs a few passes over the data in
    inference mode. The arguments are those of `check`.
    """
    return Report(tuple(_about_rows(net, train, test, batch_size)))


def _lines(
    net: GenericNeuralNet, train: Examples, test: Examples | None, options: dict[str, Any]
) -> Iterator[Line]:
    found, size = [], options["batch_size"]
    for line in _about_rows(net, train, test, size):
        found.append(line)
        yield line
    if any(line.verdict == "fail" and line.name != "labels" for line in found):
        yield Finding("derivatives").warn(
            "Gradient, Hessian and minimum were not looked at: with the failures above they have "
            "no meaning.",
            "Mend those first and check again.",
        )
        return
    some = train.take(sample(len(train), _DERIVATIVE_ROWS))
    yield from hessian.derivatives(net, Hessian(net, some, batch_size=size))
    # Without a solver, Planner may choose another dtype. With CG it keeps the net's dtype.
    try:
        A = Planner(net, train, solver=CG(), **options).operator
    except ValueError as error:
        yield Finding("curvature").fail(str(error), "Scores have no meaning without a curvature.")
        return
    known = A.smallest_eigenvalue_bound
    if known > 0 and isinstance(A, GaussNewton):
        yield from hessian.bounded(A, _LANCZOS_STEPS)
        yield hessian.stationary(net, A, test, 0.0)
        return
    found = spectrum(A, rtol=_RTOL, max_products=_MOST_PRODUCTS)
    low, high = float(found.smallest[0]), float(found.largest[0])
    noise = 4 * np.sqrt(A.shape[0]) * float(np.finfo(net.dtype).eps) * max(high, 0.0)
    yield hessian.largest(found)
    yield hessian.smallest(found, known, A.damping, noise)
    yield hessian.precision(found, known, net.dtype)
    shift = 0.0 if low > noise else 2 * abs(low) + 1e-6 * abs(high)
    yield hessian.stationary(net, A, test, shift)


def _about_rows(
    net: GenericNeuralNet, train: Examples, test: Examples | None, batch_size: int | None
) -> Iterator[Line]:
    unfit = rows.finite_weights(net)
    if unfit:
        yield unfit
        return
    fits = [rows.fits(net, train, "train")]
    if test is not None:
        fits.append(rows.fits(net, test, "test"))
    yield from fits
    refused = any(line.verdict == "fail" for line in fits)
    try:
        outside = labels.in_range(net, train)
        if outside:
            yield outside
            return
        separate = rows.separate(net, train)
    except (TypeError, ValueError, tf.errors.OpError):
        if refused:  # an earlier line reports the fault
            return
        raise
    yield separate
    if np.isnan(separate.value):
        return
    of_train = rows.Answers.of(net, train, batch_size)
    yield rows.same_twice(net, of_train)
    if refused:
        return
    yield rows.finite(net, of_train, "train")
    of_test = None if test is None else rows.Answers.of(net, test, batch_size)
    if of_test is not None:
        yield rows.finite(net, of_test, "test")
    yield labels.plausible(net, of_train, of_test)
    yield risk.frozen(net)
    yield risk.penalty(net, float(of_train.losses.mean()))
