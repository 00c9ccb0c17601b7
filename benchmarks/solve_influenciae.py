"""s_test by influenciae, under tf_keras: `python -m benchmarks.solve_influenciae FOLDER`.

`solves.interpreter` sets the variables PYTHONPATH and TF_USE_LEGACY_KERAS for this process.
influenciae solves the same problem with these settings (sources of 0.3.0):

- its Hessian is that of the mean loss without a penalty. We therefore add the penalty to the loss
  of each row. A right-hand side must not include the penalty, so a second model without the penalty
  computes the right-hand sides;
- `ConjugateGradientDescentIHVP` always stops at a relative residual of 1e-3 or an absolute residual
  of 1e-5. We use its base class `IterativeIHVP` with the same solver and another tolerance;
- `LissaIHVP` uses all rows in each step, and it works only in float32. It adds `damping` times
  `scale` to the diagonal, so we set `damping` to 0;
- `ArnoldiInfluenceCalculator` uses the k eigenvalues nearest zero. We set k to the dimension of its
  space, so that it uses all of them. Its basis comes from one pass of Gram-Schmidt and loses
  orthogonality as the space grows.

Every product processes the rows one by one (`tf.map_fn`), and the right-hand sides one by one.
"""

from typing import Any

import numpy as np
import tensorflow as tf
from deel.influenciae.common import (  # pyright: ignore[reportMissingImports]
    ExactIHVP,
    InfluenceModel,
    LissaIHVP,
)
from deel.influenciae.common.inverse_hessian_vector_product import (  # pyright: ignore[reportMissingImports]
    IterativeIHVP,
)
from deel.influenciae.influence.arnoldi_influence_calculator import (  # pyright: ignore[reportMissingImports]
    ArnoldiInfluenceCalculator,
)
from deel.influenciae.utils import (  # pyright: ignore[reportMissingImports]
    conjugate_gradients_solve,
)
from numpy.typing import NDArray

from benchmarks import child

# The exact Hessian copies the parameters for each row of a batch, and propagates each copy through
# all rows of the batch. Batches of one row avoid this.
_EXACT_BATCH = 1
_BATCH = 1000
_ENOUGH_ITERATIONS = 500


def made_ready(arrays: child.Arrays, setting: dict[str, Any]) -> child.Solve:
    """Make the tf_keras model and its data. Return the call that `child.main` times."""
    f, c = arrays["theta"].shape
    keras: Any = tf.keras  # tf_keras
    keras.backend.set_floatx(setting["dtype"])
    # IterativeIHVP treats the first layer as the feature extractor.
    layers = [keras.layers.Activation("linear"), keras.layers.Dense(c, use_bias=False)]
    model = keras.Sequential([keras.layers.InputLayer((f,)), *layers])
    kernel = model.layers[-1].kernel
    kernel.assign(arrays["theta"])
    labels, test_labels = (tf.one_hot(arrays[k], c, dtype=kernel.dtype) for k in ("y", "y_test"))
    method, half = setting["method"], setting["weight_decay"] / 2

    def loss(y, z, sample_weight=None):
        return tf.nn.softmax_cross_entropy_with_logits(y, z)

    def risk(y, z, sample_weight=None):
        return loss(y, z) + half * tf.reduce_sum(tf.square(kernel))

    batch_size = _EXACT_BATCH if method == "exact" else _BATCH
    data = tf.data.Dataset.from_tensor_slices((arrays["x"], labels)).batch(batch_size)

    def solve() -> tuple[NDArray, dict[str, Any]]:
        plain = InfluenceModel(model, start_layer=-1, loss_function=loss)
        train = InfluenceModel(model, start_layer=-1, loss_function=risk)
        B = plain.batch_jacobian_tensor((arrays["x_test"], test_labels))
        if method == "Arnoldi":
            rank = setting["rank"]
            arnoldi = ArnoldiInfluenceCalculator(train, data, rank, True, rank, kernel.dtype)
            inner = tf.matmul(B, arnoldi.G, transpose_b=True) / arnoldi.eig_vals
            return tf.matmul(arnoldi.G, inner, transpose_a=True, transpose_b=True).numpy(), {}
        if method == "exact":
            inverse = ExactIHVP(train, data)
        elif method == "CGD":
            inverse = IterativeIHVP(
                lambda H, v, steps: conjugate_gradients_solve(
                    H, v, maxiter=steps, tol=setting["tolerance"], atol=0.0
                ),
                train,
                -1,
                data,
                _ENOUGH_ITERATIONS,
            )
        else:
            inverse = LissaIHVP(
                train, -1, data, setting["steps"], damping=0.0, scale=setting["scale"]
            )
        found = inverse.compute_ihvp(
            tf.data.Dataset.from_tensor_slices((B,)).batch(len(B)), use_gradient=False
        )
        return np.concatenate([np.asarray(part) for part in found], axis=1), {}

    return solve


if __name__ == "__main__":
    tf.random.set_seed(0)
    child.main(made_ready)
