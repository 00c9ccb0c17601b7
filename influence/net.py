"""GenericNeuralNet: a Keras model as a risk, and the questions one can ask of it at one theta.

    R(theta) = mean_i loss_i(theta) + penalty(theta)

`loss_i` is the data term of row i, `penalty` the sum of the model's own Keras regularisers. Every
method looks at the model in inference mode and leaves it as it was; only `fit` and setting `theta`
change it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import scipy.optimize
import scipy.sparse
import tensorflow as tf
from numpy.typing import NDArray

from influence import tape
from influence.convergence import warn_unconverged
from influence.examples import Examples
from influence.keras_model import check_inputs, check_model, check_output
from influence.losses import per_example

_BYTES_PER_PASS = 1 << 30  # what the activations of one batch may take
_PROBE_ROWS = 3
_MIXING_RTOL = 1e-3  # far above float32 rounding, far below a loss of another row


class GenericNeuralNet:
    """A built Keras model with a per-example loss.

    Args:
      model: any built `keras.Model` with one floating dtype for its trainable weights. Freezing a
        layer (`layer.trainable = False`) before this call chooses the subset that theta is.
      loss: a Keras loss, its name, or a callable (y, output) -> (n,) of TensorFlow operations;
        None takes the compiled one.

    Attributes:
      model: the Keras model, shared, not copied.
      convex: True if the risk is known to be strictly convex in theta.
      dtype: of theta and of every result.

    Raises: TypeError for something else than a Keras model or mixed weight dtypes; ValueError for a
      model that is unbuilt, has no trainable weight, uses an activity regulariser, or rounds the
      input of float64 weights.
    """

    convex = False

    def __init__(self, model: keras.Model, loss: Any = None):
        check_model(model)
        self.model = model
        self.loss = per_example(loss, model)
        self.dtype = np.dtype(model.trainable_weights[0].dtype)
        self._sizes = [int(np.prod(w.shape)) for w in model.trainable_weights]
        self._functions: dict[str, Any] = {}

    def __getstate__(self) -> dict:
        """Traced functions stay in the process; the loss and the model travel."""
        return {**self.__dict__, "_functions": {}}

    @property
    def num_parameters(self) -> int:
        """The length of theta, d."""
        return sum(self._sizes)

    @property
    def theta(self) -> NDArray:
        """(d,) the trainable weights, flattened in the order of `model.trainable_weights`."""
        return np.concatenate([np.ravel(w.numpy()) for w in self.model.trainable_weights])

    @theta.setter
    def theta(self, value: NDArray) -> None:
        value = np.asarray(value)
        if value.shape != (self.num_parameters,):
            raise ValueError(f"theta must have shape ({self.num_parameters},), got {value.shape}.")
        if not np.isfinite(value).all():
            raise ValueError(
                f"theta must be finite, got {value[~np.isfinite(value)][0]} at position "
                f"{np.flatnonzero(~np.isfinite(value))[0]}."
            )
        ends = np.cumsum(self._sizes)[:-1]
        for weight, part in zip(self.model.trainable_weights, np.split(value, ends), strict=True):
            weight.assign(part.reshape(weight.shape).astype(self.dtype))

    # --- questions about one batch -----------------------------------------------------------

    def outputs(self, x: Any) -> NDArray:
        """What the model answers for a batch, in inference mode: (n, ...)."""
        return self._run("outputs", self._output, self._theta(), self._x(x))

    def losses(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """The data term of each example, without the penalty.

        Args:
          x: (n, ...) inputs, or a dict of them.
          y: (n, ...) labels.
          thetas: (d, k) other parameter vectors to ask about instead of the model's own.

        Returns: (n,), or (n, k) with `thetas`; nats for log losses.
        """
        return self._at("losses", self._losses, thetas, *self._xy(x, y))

    def gradient(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Gradient of the batch's mean loss, without the penalty.

        Returns: (d,), or (d, k) at k other parameter vectors `thetas` (d, k).
        """

        def mean_gradient(theta, x, y):
            return tape.gradient(tape.mean_loss(self._losses, x, y), theta)

        return self._at("gradient", mean_gradient, thetas, *self._xy(x, y))

    def loss_and_gradient(self, x: Any, y: Any) -> tuple[float, NDArray]:
        """The batch's mean loss and its gradient from one pass, without the penalty: (), (d,)."""

        def both(theta, x, y):
            return tape.value_and_gradient(tape.mean_loss(self._losses, x, y), theta)

        loss, gradient = self._run("loss_and_gradient", both, self._theta(), *self._xy(x, y))
        return float(loss), gradient

    def gradients(self, x: Any, y: Any, thetas: NDArray | None = None) -> NDArray:
        """Gradient of each example's loss, without the penalty.

        The one method with a vector of length d for each example; `directional` needs none.

        Args:
          x: (n, ...) inputs.
          y: (n, ...) labels.
          thetas: (d, n): example i's gradient is taken at column i instead of the model's theta.

        Returns: (n, d).
        """
        if thetas is None:
            thetas = np.repeat(self.theta[:, None], len(y), axis=1)
        return self._run(
            "gradients",
            partial(tape.gradients, self._losses),
            self._block(thetas, "thetas"),
            *self._xy(x, y),
        )

    def hvp(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Products of the Hessian of the batch's mean loss with m vectors, in one pass.

        H V with H = (1/n) sum_i d2 loss_i / d theta2. The penalty's share is `penalty_hvp`.

        Args:
          x: (n, ...) inputs.
          y: (n, ...) labels.
          V: (d, m) vectors, or (d,).

        Returns: the shape of V.
        """
        rows = self._block(V, "V")
        function = partial(tape.hvp, self._losses)
        return _like(self._run("hvp", function, self._theta(), *self._xy(x, y), rows), V)

    def hvp_each(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Hessian products of r small batches, each with its own vectors.

        Args:
          x: (r, b, ...) inputs of r batches of b examples.
          y: (r, b, ...) labels.
          V: (r, d, m) the vectors of each batch.

        Returns: (r, d, m): batch j's mean-loss Hessian times V[j].
        """
        num_batches, num_parameters, num_vectors = V.shape
        again = partial(np.repeat, repeats=num_vectors, axis=0)
        x = {k: again(v) for k, v in x.items()} if isinstance(x, dict) else again(x)
        flat = np.moveaxis(V, 2, 1).reshape(-1, num_parameters)
        products = self._run(
            "hvp_each",
            partial(tape.hvp_each, self._losses),
            self._theta(),
            *self._xy(x, again(y)),
            self._block(flat.T, "V"),
        )
        return np.moveaxis(products.reshape(num_batches, num_vectors, -1), 1, 2)

    def gauss_newton_product(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Products with the batch's generalised Gauss-Newton matrix (Schraudolph 2002).

        G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i, J_i the Jacobian of the model's output.

        Args: as `hvp`.
        Returns: the shape of V.
        Raises: ValueError for a cross-entropy of probabilities: at a softmax or sigmoid output this
          matrix is the empirical Fisher, not the Gauss-Newton matrix.
        """
        if not self.loss.from_logits:
            raise ValueError(
                f"loss must take logits for a Gauss-Newton matrix, got {self.loss.name!r} of "
                "probabilities; drop the model's last softmax or sigmoid and use from_logits=True."
            )
        rows = self._block(V, "V")
        function = partial(tape.gauss_newton, self._output, self.loss.function)
        return _like(self._run("gauss_newton", function, self._theta(), *self._xy(x, y), rows), V)

    def directional(self, x: Any, y: Any, V: NDArray) -> NDArray:
        """Gradient of each example's loss along m vectors, in one pass: grad loss_i . v_j.

        Args: as `hvp`.
        Returns: (n, m), or (n,) for a vector V. The penalty is not included.
        """
        rows = self._block(V, "V")
        function = partial(tape.directional, self._losses)
        return _like(self._run("directional", function, self._theta(), *self._xy(x, y), rows), V)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> Any:
        """d/dx_i of (grad loss_i . v), for each example.

        Args:
          x: (n, ...) floating inputs, or a dict of them.
          y: (n, ...) labels.
          v: (d,) direction in parameter space.

        Returns: arrays of x's shape.
        Raises: TypeError for integer inputs, which have no gradient.
        """
        parts = {f"x[{k!r}]": p for k, p in x.items()} if isinstance(x, dict) else {"x": x}
        for name, part in parts.items():
            if part.dtype.kind != "f":
                raise TypeError(f"{name} must be floating to be differentiated, got {part.dtype}.")
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        direction = self._block(v, "v")[0]
        function = partial(tape.input_gradient, self._losses)
        return self._run("input_gradient", function, self._theta(), *self._xy(x, y), direction)

    # --- the penalty --------------------------------------------------------------------------

    def penalty(self) -> float:
        """Sum of the model's own Keras regularisers at theta: ()."""
        return float(self._run("penalty", self._penalty, self._theta()))

    def penalty_gradient(self, thetas: NDArray | None = None) -> NDArray:
        """Gradient of the penalty: (d,), or (d, k) at other parameter vectors `thetas` (d, k)."""
        return self._at("penalty_gradient", partial(tape.gradient, self._penalty), thetas)

    def penalty_hvp(self, V: NDArray) -> NDArray:
        """Products of the penalty's Hessian with m vectors: the shape of V."""

        def products(theta, V):
            return tf.vectorized_map(tape.hessian_map(self._penalty, theta), V)

        return _like(self._run("penalty_hvp", products, self._theta(), self._block(V, "V")), V)

    # --- questions about a whole set ----------------------------------------------------------

    def rows_per_batch(self, examples: Examples, num_vectors: int = 1) -> int:
        """Rows that one pass over `num_vectors` vectors takes; bounds memory, changes no result."""
        if "activations" not in self._functions:
            first = examples.take([0])
            x, y = self._xy(first.x, first.y)
            traced = tf.function(self._losses).get_concrete_function(self._theta(), x, y)
            tensors = [t for op in traced.graph.get_operations() for t in op.outputs]
            sizes = [t.shape.num_elements() or 1 for t in tensors if t.shape.rank]
            # What has a parameter's size is there once, not once a row.
            self._functions["activations"] = sum(s for s in sizes if s not in self._sizes) or 1
        per_row = self._functions["activations"] * self.dtype.itemsize * (2 + 2 * num_vectors)
        return int(np.clip(_BYTES_PER_PASS // per_row, 1, len(examples)))

    def mean_over(self, examples: Examples, batch_size: int | None, question: Callable) -> Any:
        """Mean of `question(x, y)` over batches, weighted by rows."""
        total = 0.0
        size = batch_size or self.rows_per_batch(examples)
        for x, y in examples.batches(size):
            total = total + question(x, y) * (len(y) / len(examples))
        return total

    def risk(self, examples: Examples, batch_size: int | None = None) -> float:
        """R(theta) = mean_i loss_i + penalty over all examples."""
        mean = self.mean_over(examples, batch_size, lambda x, y: self.losses(x, y).mean())
        return float(mean) + self.penalty()

    def risk_gradient(
        self, examples: Examples, thetas: NDArray | None = None, batch_size: int | None = None
    ) -> NDArray:
        """Gradient of the risk: (d,), or (d, k) at other parameter vectors `thetas` (d, k)."""
        if batch_size is None:
            num_vectors = 1 if thetas is None else thetas.shape[1]
            batch_size = self.rows_per_batch(examples, num_vectors)
        mean = self.mean_over(examples, batch_size, lambda x, y: self.gradient(x, y, thetas))
        return mean + self.penalty_gradient(thetas)

    def risk_and_gradient(
        self, examples: Examples, batch_size: int | None = None
    ) -> tuple[float, NDArray]:
        """R(theta) and its gradient in one pass: (), (d,)."""
        loss, gradient = 0.0, self.penalty_gradient()
        for x, y in examples.batches(batch_size or self.rows_per_batch(examples)):
            part = self.loss_and_gradient(x, y)
            loss += part[0] * len(y) / len(examples)
            gradient = gradient + part[1] * (len(y) / len(examples))
        return loss + self.penalty(), gradient

    def hessian(self, examples: Examples) -> NDArray | None:
        """The risk's Hessian (d, d) where a model knows a closed form; None here."""
        return None

    def validate(self, examples: Examples, name: str) -> None:
        """Refuse examples that this model and loss have no meaning for, before any long work.

        Raises: TypeError for anything but Examples; ValueError naming `name` for inputs or labels
          of the wrong shape, labels out of range, or a loss that is not one number per example, and
          for a model with several outputs or losses of its own.
        """
        if not isinstance(examples, Examples):
            raise TypeError(f"{name} must be Examples(x, y), got {type(examples).__name__}.")
        check_inputs(self.model, examples.x, name)
        probe = examples.take(slice(0, _PROBE_ROWS))
        output_shape = check_output(self.model, self._x(probe.x), name)
        self.loss.check_labels(examples.y, output_shape, name)
        try:
            losses = self.losses(probe.x, probe.y)
        except (ValueError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"{name}.y does not fit the loss {self.loss.name!r}: labels of shape "
                f"{probe.y.shape}, dtype {probe.y.dtype}, against outputs of shape {output_shape}."
            ) from error
        if losses.shape != (len(probe),):
            raise ValueError(
                f"loss must give one number per example, got shape {losses.shape} from "
                f"{self.loss.name!r} for {len(probe)} examples of {name}; leave out the mean or "
                "sum over examples."
            )
        first = probe.take([0])
        alone = float(self.losses(first.x, first.y)[0])
        if abs(alone - losses[0]) > _MIXING_RTOL * np.abs(losses).max():
            raise ValueError(
                f"loss must depend on its own row alone, got {losses[0]:.4g} from "
                f"{self.loss.name!r} for row 0 of {name} among {len(probe)} rows and {alone:.4g} "
                f"for it by itself; labels of shape {probe.y.shape} broadcast against outputs of "
                f"shape {output_shape}, or a layer that mixes rows, would do that."
            )

    def fit(
        self, examples: Examples, *, gradient_tolerance: float = 1e-6, max_iterations: int = 10_000
    ) -> GenericNeuralNet:
        """Minimise the risk from the present theta by L-BFGS on all rows; deterministic.

        Args:
          examples: the training set.
          gradient_tolerance: Euclidean norm of the risk's gradient to stop at.
          max_iterations: L-BFGS iterations at most.

        Returns: self. Warns with ConvergenceWarning when the norm reached is larger.
        """
        self.validate(examples, "examples")

        def at(theta):
            self.theta = theta
            risk, gradient = self.risk_and_gradient(examples)
            return risk, gradient.astype(np.float64)

        found = scipy.optimize.minimize(
            at,
            self.theta.astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "maxcor": 20,
                "ftol": 0.0,
                # scipy's tolerance is on the largest entry.
                "gtol": gradient_tolerance / np.sqrt(self.num_parameters),
            },
        )
        self.theta = found.x
        norm = float(np.linalg.norm(self.risk_gradient(examples)))
        if norm > gradient_tolerance:
            warn_unconverged(
                f"L-BFGS stopped at a gradient norm of {norm:.1e}, above {gradient_tolerance:.1e}, "
                f"after {found.nit} iterations; use float64, more iterations or a larger tolerance."
            )
        return self

    # --- TensorFlow inside ---------------------------------------------------------------------

    def _output(self, theta: Any, x: Any) -> Any:
        weights = self.model.trainable_weights
        parts = tf.split(theta, self._sizes)
        mapping = [(w, tf.reshape(p, w.shape)) for w, p in zip(weights, parts, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return self.model(x, training=False)

    def _losses(self, theta: Any, x: Any, y: Any) -> Any:
        return tf.cast(self.loss.function(y, self._output(theta, x)), theta.dtype)

    def _penalty(self, theta: Any) -> Any:
        total = tf.zeros((), theta.dtype)
        weights = self.model.trainable_weights
        for weight, part in zip(weights, tf.split(theta, self._sizes), strict=True):
            if weight.regularizer is not None:
                total += tf.cast(weight.regularizer(tf.reshape(part, weight.shape)), theta.dtype)
        return total

    def _run(self, name: str, function: Callable, *tensors: Any) -> Any:
        if name not in self._functions:
            self._functions[name] = tf.function(function, reduce_retracing=True)
        return tf.nest.map_structure(lambda t: t.numpy(), self._functions[name](*tensors))

    def _at(self, name: str, function: Callable, thetas: NDArray | None, *batch: Any) -> Any:
        """`function(theta, *batch)` at the model's theta or, as last axis, at each of thetas."""
        if thetas is None:
            return self._run(name, function, self._theta(), *batch)

        def at_each(thetas, *batch):
            return tf.vectorized_map(lambda theta: function(theta, *batch), thetas)

        return self._run(f"{name} at", at_each, self._block(thetas, "thetas"), *batch).T

    def _theta(self) -> Any:
        return tf.concat([tf.reshape(w.value, [-1]) for w in self.model.trainable_weights], 0)

    def _tensor(self, array: Any) -> Any:
        """Floats in the dtype of theta, integers as they are, sparse rows dense."""
        if scipy.sparse.issparse(array):
            array = array.toarray()
        array = np.asarray(array)
        return tf.convert_to_tensor(
            array.astype(self.dtype, copy=False) if array.dtype.kind == "f" else array
        )

    def _x(self, x: Any) -> Any:
        return (
            {k: self._tensor(v) for k, v in x.items()} if isinstance(x, dict) else self._tensor(x)
        )

    def _xy(self, x: Any, y: Any) -> tuple[Any, Any]:
        return self._x(x), self._tensor(y)

    def _block(self, V: Any, name: str) -> Any:
        """(m, d) rows from (d,) or (d, m) columns: vectorized_map runs over the first axis."""
        V = np.asarray(V)
        if V.ndim not in (1, 2) or V.shape[0] != self.num_parameters:
            raise ValueError(
                f"{name} must have shape ({self.num_parameters},) or ({self.num_parameters}, m), "
                f"got {V.shape}."
            )
        return self._tensor(np.ascontiguousarray(np.atleast_2d(V.T)).astype(self.dtype, copy=False))


def _like(rows: NDArray, V: Any) -> NDArray:
    """Rows (m, ...) as the columns of a block, or the one row of a vector."""
    return rows.T if np.ndim(V) == 2 else rows[0]
