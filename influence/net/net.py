"""Keras models as risks, with values and derivatives at one theta.

A risk is

    R(theta) = mean_i loss_i(theta) + penalty(theta)

`loss_i` is the loss of row i, and `penalty` is the sum of the model's own Keras regularisers. Every
method uses the model in inference mode. Only `fit` and setting `theta` change the model.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.memory import ACTIVATIONS, fitting
from influence.common.numbers import numbers
from influence.examples import labels as packing
from influence.examples.arrays import label_parts
from influence.examples.examples import Examples
from influence.examples.featured import Featured
from influence.examples.given import Data
from influence.minimisers import lbfgs
from influence.net.batch import Derivatives
from influence.net.compiled import SeveralLosses, model_loss
from influence.net.flat import FlatModel
from influence.net.given import checked_dtype, copied, given, trained_part
from influence.net.heads import activated, ending
from influence.net.losses import per_example
from influence.net.measurements import product
from influence.net.preprocessing import Preparation
from influence.net.probe import check_added, check_apart, check_reported, leaves, probe_of
from influence.net.questions import PerRow, Total, loss_sum
from influence.net.refused import (
    check_inputs,
    check_model,
    check_output,
    check_weights,
    watched_ids,
)
from influence.net.saved import load_model

# Float32 convolutions lose digits when they sum over a large batch. For 5,500 MNIST images, Hessian
# products have an error of 2e-4 with 2,854 rows per batch, and of 8e-6 with 500 rows per batch.
# Batches of 500 rows take a sixth more time.
_FLOAT32_ROWS = 500
# The logits of a model are right if their activation differs by at most this from its output.
_LOGITS_ATOL = 1e-4


class GenericNeuralNet(Derivatives):
    """Built Keras model with a per-example loss.

    Args:
      model: any built `keras.Model` with one floating dtype for its trainable weights. To keep
        weights out of theta, freeze their layers (`layer.trainable = False`) before this call, or
        name the other layers by `layers`.
      loss: a Keras loss, its name, or a callable (y, output) -> (n,) of TensorFlow operations. A
        model with several outputs takes a list or dict of them, as `compile` does. None means the
        compiled loss with its loss weights.
      dtype: "float32" or "float64" for a copy of the model that computes in this dtype, with
        copies of the weights. None means the model itself, and a float32 copy for a model of mixed
        precision.
      layers: names of the layers whose weights form theta, whatever their `trainable` flags. None
        means all trainable weights. The flags do not change.

    Layers in front of theta that depend on no weight of theta are the trunk, such as a frozen
    MobileNet in front of a head. A trunk with a matrix or a kernel runs once for each row of a set.
    Its features are cached with the set, in memory or on disk (`Featured`). The trunk computes in
    its own dtype, also in a copy. Only models that are Sequential or functional have a trunk.

    Lookup layers of strings, such as TextVectorization, and the layers before them are not part of
    the net's model. They are applied once to each set of examples.

    Attributes:
      model: the Keras model. It is shared and not copied, unless `notes` says so. A copy has its
        own weights: `fit` and setting `theta` change the copy, and not the model that was given.
      preparation: the lookup layers in front of the model, or None.
      notes: what was done to the given model, one sentence each. `repr` shows them.
      convex: True if the risk is known to be smooth and strictly convex in theta.
      dtype: the dtype of theta and of every result.

    Raises: TypeError for anything except a Keras model, or mixed weight dtypes. ValueError for a
      model that is unbuilt, has no trainable weight, uses one of Keras' activity regularisers, or
      rounds the input of float64 weights. The errors of `compiled.model_loss`.
    """

    preparation: Preparation | None = None
    notes: tuple[str, ...] = ()

    def __init__(
        self, model: keras.Model, loss: Any = None, *, dtype: Any = None, layers: Any = None
    ):
        self.preparation, parts, self.notes = trained_part(model, dtype, layers)
        check_model(parts.rest, parts.weights)
        self.model = parts.whole
        self.ending = ending(parts.rest)
        self.loss = model_loss(loss, self.model, self.ending)
        self.flat = FlatModel(parts, self.loss, self.preparation)
        self.dtype = self.flat.dtype

    def __repr__(self) -> str:
        """Show the model's name, the sizes, and what was done to the given model."""
        notes = "".join(f" {note}" for note in self.notes)
        name = f"{type(self).__name__}({self.model.name!r}, d={self.num_parameters}, {self.dtype})"
        return name + notes

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        loss: Any = None,
        *,
        model: keras.Model | None = None,
        dtype: Any = None,
    ) -> GenericNeuralNet:
        """Return the net of a model that Keras saved. Python code in the file is never run.

        Args:
          path: a file `.keras` or `.h5` of a whole model, or a file `.weights.h5` for `model`.
          loss: as in the constructor. None means the loss that was compiled before saving.
          model: a built model that gets the weights in the file. It is changed.
          dtype: as in the constructor.

        Raises: FileNotFoundError for a missing file. TypeError or ValueError for another file, a
          model that Keras cannot rebuild, and as the constructor.
        """
        found = load_model(path, model, compiled=loss is None)
        return GenericNeuralNet(found, loss, dtype=dtype)

    def astype(self, dtype: Any) -> GenericNeuralNet:
        """Return a net of the same risk at the same theta that computes in another dtype.

        The result has a copy of the model: `fit` and setting `theta` change only this copy. A net
        that has the dtype already is returned itself.

        Args:
          dtype: "float32" or "float64".

        Raises: ValueError for another dtype, for a model that Keras cannot rebuild, or for a
          subclass whose closed forms have one dtype.
        """
        wanted = checked_dtype(dtype)
        if wanted == self.dtype:
            return self
        if type(self) is not GenericNeuralNet:
            raise ValueError(
                f"dtype must be {self.dtype} for {type(self).__name__}, got {wanted}; "
                f"GenericNeuralNet(net.model, net.loss, dtype={wanted!r}) has no closed forms."
            )
        view = copy.copy(self)
        parts = self.flat.parts.astype(str(wanted))
        view.model, view.flat = parts.whole, FlatModel(parts, self.loss, self.preparation)
        view.dtype, view.fixed, view.memo = view.flat.dtype, None, None
        view.notes += (copied(str(wanted)),)
        if self.fixed is not None:
            view.theta = self.fixed
        return view

    def given(self, value: Any, name: str) -> Examples:
        """Return data as Examples with the inputs that the net's model takes.

        Args:
          value: Examples, (x, y), (x, y, sample_weight), or a dataset of such batches, with inputs
            and labels in any form that `fit` takes. Inputs of a model with lookup layers are
            prepared once.
          name: the argument's name in error messages.

        Raises: TypeError naming `name` for another kind of data, or for strings that the model does
          not take. The errors of Examples and Stream.
        """
        return given(self, value, name)

    def measuring(self, measurement: Any) -> GenericNeuralNet:
        """Return the same model at the same theta, with a measurement in place of its loss.

        Like the `metrics` of Keras, a measurement is not multiplied by sample weights. It takes the
        model's output. If the measurement needs logits and the model ends in a softmax or sigmoid,
        it takes the logits. For a model with several outputs, it takes a dict of labels by output
        name, and the list or dict of outputs that the model returns.

        Args:
          measurement: a function (y, output) -> (n,) of TensorFlow operations, a Keras loss or
            its name.

        Returns: a net that shares this net's model, weights, theta and penalty.
        Raises: TypeError or ValueError for another kind of measurement. ValueError if the
          measurement needs logits, but this net's loss takes probabilities.
        """
        takes_logits = getattr(measurement, "takes_logits", False)
        several = self.ending.names is not None
        loss = per_example(
            measurement, self.model, role="measurement", ends_in=self.ending.heads[0]
        )
        if several and (takes_logits or loss.keras_function is not None):
            raise ValueError(
                f"measurement must take the several outputs {list(self.ending.names or ())}, got "
                f"{loss.name!r}, which takes one; give a function (labels, outputs) -> (n,)."
            )
        if takes_logits and loss.head is None:
            self.loss.check_logits(f"the measurement {loss.name!r}")
        return self._with_loss(loss)

    def pulling(self) -> GenericNeuralNet:
        """Return the same model with the loss y . z of labels y (n, c) and outputs z (n, c).

        z is that of `output_terms`. The gradient of row i's loss is J_i' y_i, with J_i = dz/dtheta.
        """
        loss = replace(self.loss, function=product, keras_function=None, plain=False)
        return self._with_loss(loss)

    def _with_loss(self, loss: Any) -> GenericNeuralNet:
        view = object.__new__(GenericNeuralNet)  # a subclass's closed forms do not apply
        view.model, view.dtype, view.fixed = self.model, self.dtype, self.fixed
        view.loss = loss = replace(loss, masked=self.ending.masks)
        view.flat = FlatModel(self.flat.parts, loss, self.preparation)
        view.preparation, view.notes, view.ending = self.preparation, self.notes, self.ending
        return view

    def at(self, theta: NDArray | None) -> GenericNeuralNet:
        """Return a view of the net at another theta. The model's weights do not change.

        Args:
          theta: (d,) parameters, or None to return the net itself.

        Returns: a net that answers every question at `theta`. Its theta cannot be set.
        """
        if theta is None:
            return self
        view = copy.copy(self)
        view.fixed = self._checked_theta(theta)
        return view

    def uncut(self) -> GenericNeuralNet:
        """Return a view of the net that runs all layers in each pass, also those of the trunk."""
        if self.flat.trunk is None:
            return self
        view = copy.copy(self)
        view.flat = self.flat.uncut
        return view

    def by_row(self) -> GenericNeuralNet:
        """Return a view for test rows. Its means over rows count each row once, without masses."""
        view = copy.copy(self)
        view.weighs = False
        return view

    def remembering(self, memo: dict[str, NDArray] | None) -> GenericNeuralNet:
        """Return a view of the net that may cache results in `memo`.

        Use the view for one batch and one theta only.
        """
        view = copy.copy(self)
        view.memo = memo
        return view

    def features(self, x: Any) -> Any:
        """Return x. A subclass with a frozen trunk returns the inputs of its trainable part."""
        return x

    def featured(self, examples: Examples) -> Examples:
        """Return the examples with their inputs x replaced by `features(x)`."""
        return examples

    @property
    def theta(self) -> NDArray:
        """The weights as one vector (d,), in the order of the model's weights."""
        if self.fixed is not None:
            return self.fixed
        return np.concatenate([np.ravel(w.numpy()) for w in self.flat.weights])

    @theta.setter
    def theta(self, value: NDArray) -> None:
        if self.fixed is not None:
            raise AttributeError("theta of a view that net.at(theta) made is fixed; call at again.")
        value = self._checked_theta(value)
        ends = np.cumsum(self.flat.sizes)[:-1]
        for weight, part in zip(self.flat.weights, np.split(value, ends), strict=True):
            weight.assign(part.reshape(weight.shape))

    def _checked_theta(self, value: NDArray) -> NDArray:
        value = numbers(value, "theta")
        if value.shape != (self.num_parameters,):
            raise ValueError(f"theta must have shape ({self.num_parameters},), got {value.shape}.")
        if not np.isfinite(value).all():
            raise ValueError(
                f"theta must be finite, got {value[~np.isfinite(value)][0]} at position "
                f"{np.flatnonzero(~np.isfinite(value))[0]}."
            )
        return value.astype(self.dtype, copy=False)

    # --- questions about a whole set ----------------------------------------------------------

    def rows_per_batch(self, examples: Examples, num_vectors: int = 1, *, dtype: Any = None) -> int:
        """Return how many rows per batch fit into memory if `num_vectors` vectors are multiplied.

        `dtype` is the dtype in which `directional` computes, if the pass calls `directional`.
        """
        first = examples.take([0])
        loop, per_row = self.flat.facts(*self.flat.batch(first.x, first.y))
        # A loop holds four passes in memory. A vectorised map holds two, and two for each vector.
        copies = 4 if loop else 2 + 2 * num_vectors
        most = len(examples)
        if loop and self.dtype == np.float32:
            most = min(most, _FLOAT32_ROWS)
        return fitting(ACTIVATIONS, per_row * self.dtype.itemsize * copies, most)

    def row_masses(self, examples: Examples) -> NDArray[np.float64]:
        """Return the `masses` v_i of all rows, (n,). They are cached.

        The removal of row i removes the share v_i / sum_j v_j of the penalty.
        """
        if examples not in self.flat.row_masses:
            self.flat.row_masses[examples] = examples.each_row(PerRow("masses"), self)
        return self.flat.row_masses[examples]

    def mass(self, examples: Examples) -> float:
        """Return sum_i v_i, by which the risk divides. It is the number of rows without masks."""
        masked = self.loss.has_masses and self.weighs
        return float(self.row_masses(examples).sum()) if masked else len(examples)

    def risk(self, examples: Data, batch_size: int | None = None) -> float:
        """Return R(theta) = mean_i loss_i + penalty over all examples, in any form of data.

        If positions are masked, the mean is sum_i v_i loss_i / sum_i v_i, with the masses v_i of
        `row_masses`. This is what `model.evaluate` reports for all rows in one batch.
        """
        examples = self.given(examples, "examples")
        total = examples.sum_over(loss_sum, self, batch_size=batch_size)
        return float(total) / (self.mass(examples) or 1) + self.penalty()

    def risk_gradient(
        self, examples: Examples, thetas: NDArray | None = None, batch_size: int | None = None
    ) -> NDArray:
        """Return the risk's gradient (d,), or (d, k) at other parameters `thetas` (d, k)."""
        question = Total("gradient") if thetas is None else Total("gradient", thetas)
        total = examples.sum_over(question, self, batch_size=batch_size)
        return total / (self.mass(examples) or 1) + self.penalty_gradient(thetas)

    def gradient_norm(self, examples: Examples, batch_size: int | None = None) -> float:
        """Return the Euclidean norm of the risk's gradient, which is zero at a minimum.

        A subclass whose risk has kinks returns another number. This number bounds the distance to
        the minimum as the gradient norm of a smooth risk does.
        """
        return float(np.linalg.norm(self.risk_gradient(examples, batch_size=batch_size)))

    def risk_and_gradient(
        self, examples: Examples, batch_size: int | None = None
    ) -> tuple[float, NDArray]:
        """Return R(theta) and its gradient (d,), from one pass."""
        loss, gradient = examples.sum_over(Total("loss_and_gradient"), self, batch_size=batch_size)
        n = self.mass(examples) or 1
        return float(loss) / n + self.penalty(), gradient / n + self.penalty_gradient()

    def hessian(self, examples: Examples, batch_size: int | None = None) -> NDArray | None:
        """Return None. A subclass with a closed form returns the risk's Hessian (d, d)."""
        return None

    def self_influence(self, examples: Examples, rows: NDArray) -> NDArray | None:
        """Return None. A subclass with a closed form returns exact self-influences of (k,) rows.

        The value of row i is grad loss_i' H^-1 grad (loss_i + penalty) / n. H is the risk's
        Hessian.
        """
        return None

    def validate(self, examples: Examples, name: str) -> None:
        """Refuse examples that do not fit this model and loss.

        A few dozen rows of the whole set are asked for their losses, in their order and shuffled.
        If the loss is the compiled one, its mean must be what Keras reports for these rows.

        Raises: TypeError for anything except Examples. ValueError naming `name` for inputs or
          labels of the wrong shape, for labels or embedding ids out of range, or for a loss that
          is not one number per example, depends on other rows or is not the mean that Keras
          reports. ValueError for a model with weights that are not finite.
        """
        if not isinstance(examples, Examples):
            kind = type(examples).__name__
            raise TypeError(f"{name} must be Examples(x, y), got {kind}.")
        takes_weights = self.takes_weights or type(self).losses is Derivatives.losses
        if packing.is_packed(examples.y) and not takes_weights:
            raise ValueError(
                f"{name} must have plain labels without sample_weight for "
                f"{type(self).__name__}, whose closed forms take no others; "
                "GenericNeuralNet(net.model, loss) takes them."
            )
        check_weights(self.model)
        self._check_names(examples, name)
        model, trunk = self.flat.model, self.flat.trunk
        if isinstance(examples, Featured):
            self._check_trunk(examples, name)
        rows, probe = probe_of(examples)
        if trunk is not None and not trunk.gave(probe.x):
            probe = Examples._trusted(trunk(probe.x), probe.y)
        check_inputs(model, probe.x, name)
        with watched_ids(model, self.flat.inputs(probe.x), examples, name) as x:
            raw = check_output(model, x, name)
        shapes = [tuple(t.shape) for t in leaves(raw)]
        shape = ", ".join(map(str, shapes))
        labels = {key: part[: len(probe)] for key, part in label_parts(probe.y).items()}
        given = ", ".join(f"shape {part.shape}, dtype {part.dtype}" for part in labels.values())
        try:
            self.loss.check_labels(examples.y, self.loss.shapes(raw), name)
            z = self._seen(raw, probe)
            y = self.flat.batch(probe.x, probe.y)[1]
            differentiable = self.loss.is_differentiable(y, z)
            losses = self.losses(probe.x, probe.y)
        except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
            if str(error).startswith((f"{name}.", "model must", "y must have", "loss must")):
                raise
            raise ValueError(
                f"{name}.y does not fit the {self.loss.role} {self.loss.name!r}: labels of "
                f"{given}, against outputs of shape {shape}."
            ) from error
        if not differentiable:
            raise ValueError(
                f"{self.loss.role} must be differentiable by the model's output, got no gradient "
                f"from {self.loss.name!r}; argmax, rounding and comparisons have none."
            )
        first_y = next(iter(labels.values())).shape
        self.loss.check_one_each(losses.shape, first_y, shapes[0], name)
        check_apart(self, rows, probe, losses, shape, name)
        if self.loss.role == "loss":
            check_added(self, probe, name)
            check_reported(self, probe, losses, name)

    def _check_trunk(self, examples: Featured, name: str) -> None:
        """Refuse inputs that do not fit the trunk, or whose features depend on other rows."""
        given = examples.given
        check_inputs(self.model, given.take([0]).x, name)
        if any(isinstance(part, keras.layers.Embedding) for part in self.model._flatten_layers()):
            few = self.flat.uncut.inputs(probe_of(given)[1].x)
            with watched_ids(self.model, few, given, name) as x:
                check_output(self.model, x, name)
        examples.trunk.check_rows(examples, name)

    def _check_names(self, examples: Examples, name: str) -> None:
        """Refuse labels by name for a model with one output, unless the name is the output's."""
        given = packing.labels(examples.y)
        known = list(getattr(self.model, "output_names", None) or [])
        if isinstance(given, dict) and self.ending.names is None and known:
            if list(given) != known:
                raise ValueError(
                    f"{name}.y must be an array or have the model's output {known}, got labels for "
                    f"{sorted(given)}."
                )

    def _seen(self, raw: Any, probe: Examples) -> Any:
        """Return what the loss takes from the model's output for a few rows.

        Raises: ValueError if the logits of a softmax or sigmoid do not give the model's output.
        """
        t = self.flat
        if self.loss.head is None and not isinstance(self.loss, SeveralLosses):
            return tf.nest.map_structure(tf.identity, raw)
        z = tf.convert_to_tensor(t.run("seen", t.output, self.theta_tensor(), t.inputs(probe.x)))
        for head, logits, output in self.loss.heads(z, raw):
            gap = float(tf.reduce_max(tf.abs(activated(head, logits) - output)))
            if not gap <= _LOGITS_ATOL:
                raise ValueError(
                    f"model must end in its {head}, got an output of {self.model.name!r} that "
                    f"differs by {gap:.1e} from the {head} of its logits; end the model in "
                    "the logits, with from_logits=True in the loss."
                )
        return z

    def fit(
        self, examples: Data, *, gradient_tolerance: float = 1e-6, max_iterations: int = 10_000
    ) -> GenericNeuralNet:
        """Minimise the risk on all rows by L-BFGS from the current theta, deterministically.

        Args:
          examples: the training set.
          gradient_tolerance: the fit stops if the risk's gradient has at most this Euclidean norm.
          max_iterations: the maximum number of L-BFGS iterations.

        Returns: self. A ConvergenceWarning is issued if the final norm is above the tolerance.
        """
        examples = self.given(examples, "examples")
        self.validate(examples, "examples")

        def at(theta: NDArray) -> tuple[float, NDArray]:
            self.theta = theta
            return self.risk_and_gradient(examples)

        def product(theta: NDArray, v: NDArray) -> NDArray:
            total = examples.sum_over(Total("hvp", v[:, None]), self, theta)[:, 0]
            return total / self.mass(examples) + self.at(theta).penalty_hvp(v)

        self.theta = lbfgs.minimise(at, self.theta, gradient_tolerance, max_iterations, product)
        return self
