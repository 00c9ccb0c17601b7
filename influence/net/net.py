"""The risk of a Keras model, with its values and derivatives at one theta.

    R(theta) = mean_i loss_i(theta) + penalty(theta)

`loss_i` is the loss of row i, and `penalty` is the sum of the model's own Keras regularisers. Every
method uses the model in inference mode. Only `fit` and assignments to `theta` change the weights.
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

# Float32 convolutions lose digits when they sum over a large batch. For 5,500 MNIST images, the
# error of a Hessian product is 2e-4 with 2,854 rows per batch, and 8e-6 with 500 rows per batch.
# The product takes a sixth more time with 500 rows than with 2,854.
_FLOAT32_ROWS = 500
# The softmax or sigmoid of a model's logits must equal its output, up to this absolute difference.
_LOGITS_ATOL = 1e-4


class GenericNeuralNet(Derivatives):
    """Built Keras model with a per-example loss.

    Args:
      model: a built `keras.Model` whose trainable weights have one floating dtype. To keep weights
        out of theta, freeze their layers (`layer.trainable = False`) before this call, or list
        only the other layers in `layers`.
      loss: a Keras loss, its name, or a callable (y, output) -> (n,) of TensorFlow operations. A
        model with several outputs takes a list or dict of losses, as `compile` does. None means
        the compiled loss with its loss weights.
      dtype: "float32" or "float64" to compute in this dtype. None means the dtype of the weights.
        A model that computes in another dtype or in mixed precision is copied with its weights.
      layers: names of the layers whose weights form theta. Their `trainable` flags are ignored and
        do not change. None means all trainable weights.

    The trunk is the part of the model that depends on no weight of theta, such as a frozen
    MobileNet in front of a head. If the trunk multiplies by a matrix or a kernel, it runs once for
    each row of a set. Its outputs, the features, are cached in memory or on disk (`Featured`). A
    copy in another dtype has the same trunk. Only Sequential and functional models have a trunk.

    Lookup layers, such as TextVectorization, and the layers before them are not part of the net's
    model. The net applies them once to each set of examples.

    Attributes:
      model: the Keras model. It shares the weights of the given model, unless `notes` reports a
        copy. Then `fit` and assignments to `theta` change the copy, and not the given model.
      preparation: the lookup layers in front of the model, or None.
      notes: sentences that say how the net split or copied the given model. `repr` shows them.
      convex: True if the risk is known to be smooth and strictly convex in theta.
      dtype: the dtype of theta and of every result.

    Raises: TypeError for anything except a Keras model, or for weights of several dtypes.
      ValueError for a model that is unbuilt, has no trainable weight, uses one of Keras' activity
      regularisers, or has float64 weights but rounds its input. The errors of
      `compiled.model_loss`.
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
        """Return a text with the model's name, d, the dtype and the notes."""
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
        """Load a model that Keras saved, and return its net. Python code in the file is never run.

        Args:
          path: a `.keras` or `.h5` file of a whole model, or a `.weights.h5` file for `model`.
          loss: as in the constructor. None means the loss that was compiled before saving.
          model: a built model. The weights in the file replace its weights.
          dtype: as in the constructor.

        Raises: FileNotFoundError for a missing file. TypeError or ValueError for another kind of
          file or for a model that Keras cannot rebuild. The errors of the constructor.
        """
        found = load_model(path, model, compiled=loss is None)
        return GenericNeuralNet(found, loss, dtype=dtype)

    def astype(self, dtype: Any) -> GenericNeuralNet:
        """Return a net that computes the same risk in another dtype, at the same theta.

        The new net has a copy of the model, so its `fit` and assignments to its `theta` do not
        change this net. If this net already has the dtype, it is returned itself.

        Args:
          dtype: "float32" or "float64".

        Raises: ValueError for any other dtype, for a model that Keras cannot rebuild, or for a
          subclass, whose closed forms exist in one dtype only.
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
        """Convert data to Examples with the inputs that the net's model takes.

        Args:
          value: Examples, (x, y), (x, y, sample_weight), or a dataset of such batches. Inputs and
            labels may have any form that `fit` takes. The model's lookup layers, if any, are
            applied to the inputs once.
          name: the argument's name in error messages.

        Raises: TypeError naming `name` for another kind of data, or for strings that the model does
          not take. The errors of Examples and Stream.
        """
        return given(self, value, name)

    def measuring(self, measurement: Any) -> GenericNeuralNet:
        """Return a net with the same model and theta, and a measurement in place of the loss.

        Sample weights do not multiply a measurement, just as Keras does not apply them to
        `metrics`. The measurement takes the model's output. If it needs logits and the model ends
        in a softmax or sigmoid, it takes the logits. For a model with several outputs, it takes a
        dict of labels by output name, and the list or dict of outputs that the model returns.

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
        """Return a net with the same model and the loss y_i . z_i of row i, with vector labels y_i.

        z_i are row i's outputs from `output_terms`. The gradient of row i's loss is J_i' y_i, where
        J_i is the Jacobian of z_i with respect to theta.
        """
        loss = replace(self.loss, function=product, keras_function=None, plain=False)
        return self._with_loss(loss)

    def _with_loss(self, loss: Any) -> GenericNeuralNet:
        view = object.__new__(GenericNeuralNet)  # a subclass's closed forms need its own loss
        view.model, view.dtype, view.fixed = self.model, self.dtype, self.fixed
        view.loss = loss = replace(loss, masked=self.ending.masks)
        view.flat = FlatModel(self.flat.parts, loss, self.preparation)
        view.preparation, view.notes, view.ending = self.preparation, self.notes, self.ending
        return view

    def at(self, theta: NDArray | None) -> GenericNeuralNet:
        """Return a view of the net at another theta. The model's weights do not change.

        Args:
          theta: (d,) parameters, or None to return the net itself.

        Returns: a net whose methods compute at `theta`. Its property `theta` cannot be assigned.
        """
        if theta is None:
            return self
        view = copy.copy(self)
        view.fixed = self._checked_theta(theta)
        return view

    def uncut(self) -> GenericNeuralNet:
        """Return a view of the net without a trunk. Each pass then runs all layers."""
        if self.flat.trunk is None:
            return self
        view = copy.copy(self)
        view.flat = self.flat.uncut
        return view

    def by_row(self) -> GenericNeuralNet:
        """Return a view of the net for test rows. Its means weigh all rows equally, not by mass."""
        view = copy.copy(self)
        view.weighs = False
        return view

    def remembering(self, memo: dict[str, NDArray] | None) -> GenericNeuralNet:
        """Return a view of the net that may cache results of one batch at one theta in `memo`."""
        view = copy.copy(self)
        view.memo = memo
        return view

    def features(self, x: Any) -> Any:
        """Return x. A subclass with its own feature extractor returns the features of x."""
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
        """Return the number of rows per batch for a pass that multiplies `num_vectors` vectors.

        The batch's activations then fit the memory budget `ACTIVATIONS`. `dtype` is the argument
        `dtype` of `directional`, for a pass that calls this method. Only subclasses use it.
        """
        first = examples.take([0])
        loop, per_row = self.flat.facts(*self.flat.batch(first.x, first.y))
        # The vectors are mapped by a loop or vectorised. A loop stores the activations of four
        # passes through the model. A vectorised map stores two, and two more for each vector.
        copies = 4 if loop else 2 + 2 * num_vectors
        most = len(examples)
        if loop and self.dtype == np.float32:
            most = min(most, _FLOAT32_ROWS)
        return fitting(ACTIVATIONS, per_row * self.dtype.itemsize * copies, most)

    def row_masses(self, examples: Examples) -> NDArray[np.float64]:
        """Return the masses v_i of all rows, (n,), as `masses` defines them. They are cached.

        If row i is removed, the fraction v_i / sum_j v_j of the penalty is removed with it.
        """
        if examples not in self.flat.row_masses:
            self.flat.row_masses[examples] = examples.each_row(PerRow("masses"), self)
        return self.flat.row_masses[examples]

    def mass(self, examples: Examples) -> float:
        """Return sum_i v_i, by which the risk divides. Without masks, it is the number of rows."""
        masked = self.loss.has_masses and self.weighs
        return float(self.row_masses(examples).sum()) if masked else len(examples)

    def risk(self, examples: Data, batch_size: int | None = None) -> float:
        """Return the risk R(theta) = mean_i loss_i + penalty of data in any form.

        If positions are masked, the mean is sum_i v_i loss_i / sum_i v_i, with the masses v_i of
        `row_masses`. `model.evaluate` reports the same value for all rows in one batch.
        """
        examples = self.given(examples, "examples")
        total = examples.sum_over(loss_sum, self, batch_size=batch_size)
        return float(total) / (self.mass(examples) or 1) + self.penalty()

    def risk_gradient(
        self, examples: Examples, thetas: NDArray | None = None, batch_size: int | None = None
    ) -> NDArray:
        """Return the risk's gradient (d,) at theta, or (d, k) at the columns of `thetas` (d, k)."""
        question = Total("gradient") if thetas is None else Total("gradient", thetas)
        total = examples.sum_over(question, self, batch_size=batch_size)
        return total / (self.mass(examples) or 1) + self.penalty_gradient(thetas)

    def gradient_norm(self, examples: Examples, batch_size: int | None = None) -> float:
        """Return the Euclidean norm of the risk's gradient, which is zero at a minimum.

        A subclass whose risk has kinks returns another number. It bounds the distance from theta to
        the minimum in the same way as the gradient norm of a smooth risk does.
        """
        return float(np.linalg.norm(self.risk_gradient(examples, batch_size=batch_size)))

    def risk_and_gradient(
        self, examples: Examples, batch_size: int | None = None
    ) -> tuple[float, NDArray]:
        """Return R(theta) and its gradient (d,). Both come from one pass over the examples."""
        loss, gradient = examples.sum_over(Total("loss_and_gradient"), self, batch_size=batch_size)
        n = self.mass(examples) or 1
        return float(loss) / n + self.penalty(), gradient / n + self.penalty_gradient()

    def hessian(self, examples: Examples, batch_size: int | None = None) -> NDArray | None:
        """Return None, or the risk's Hessian (d, d) in a subclass with a closed form."""
        return None

    def self_influence(self, examples: Examples, rows: NDArray) -> NDArray | None:
        """Return None, or exact self-influences (k,) of rows in a subclass with a closed form.

        The value of row i is grad loss_i' H^-1 grad (loss_i + penalty) / n. H is the risk's
        Hessian.
        """
        return None

    def validate(self, examples: Examples, name: str) -> None:
        """Refuse examples that do not fit this model and loss.

        The method computes the losses of a few rows of the set, in order and shuffled. If the net
        has the compiled loss, its mean must be the loss that Keras reports for these rows.

        Raises: TypeError for anything except Examples. ValueError naming `name` for inputs or
          labels of the wrong shape, and for labels or embedding ids out of range. ValueError for a
          loss that is not one number per example, depends on other rows, or has another mean than
          Keras reports. ValueError for a model with weights that are not finite.
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
        """Refuse inputs that do not fit the trunk, and a trunk that mixes rows."""
        given = examples.given
        check_inputs(self.model, given.take([0]).x, name)
        if any(isinstance(part, keras.layers.Embedding) for part in self.model._flatten_layers()):
            few = self.flat.uncut.inputs(probe_of(given)[1].x)
            with watched_ids(self.model, few, given, name) as x:
                check_output(self.model, x, name)
        examples.trunk.check_rows(examples, name)

    def _check_names(self, examples: Examples, name: str) -> None:
        """Refuse a dict of labels for a model with one output, unless its key names this output."""
        given = packing.labels(examples.y)
        known = list(getattr(self.model, "output_names", None) or [])
        if isinstance(given, dict) and self.ending.names is None and known:
            if list(given) != known:
                raise ValueError(
                    f"{name}.y must be an array or have the model's output {known}, got labels for "
                    f"{sorted(given)}."
                )

    def _seen(self, raw: Any, probe: Examples) -> Any:
        """Convert the outputs `raw` of a few rows to the form that the loss takes, such as logits.

        Raises: ValueError if the softmax or sigmoid of the logits differs from the output.
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
        """Minimise the risk on all rows by L-BFGS, from the current theta and without randomness.

        Args:
          examples: the training set.
          gradient_tolerance: the fit stops when the Euclidean norm of the risk's gradient is at
            most this number.
          max_iterations: the maximum number of L-BFGS iterations.

        Returns: self. If the final norm is above the tolerance, a ConvergenceWarning says so.
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
