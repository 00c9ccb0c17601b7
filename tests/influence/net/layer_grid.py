"""Compare every layer of `layer_kinds` with a plain tape in float64, each in its own process.

    python -m tests.influence.net.layer_grid FILE [NAME ...]

`make layers` runs this twice, with oneDNN's operations and without them. For each layer, a process
computes every answer of the library 20 times in float32, with two threads. Without oneDNN it also
computes each answer once in float64. FILE gets one JSON line for each layer. Layers that FILE
already contains are skipped, so an interrupted grid continues. If the plain model raises an error,
the status of the layer is "failed", and the next call repeats the layer.

The expected values come from `tests.oracles`. First derivatives come from a plain tape in float64,
row by row. Hessian products come from central differences of the plain gradient.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # TensorFlow reads these variables when it starts. With one thread, errors of oneDNN would not
    # appear.
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["OMP_NUM_THREADS"] = "2"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from influence import Examples, GenericNeuralNet  # noqa: E402
from tests import oracles  # noqa: E402
from tests.influence.net.layer_kinds import KINDS, Kind  # noqa: E402

REPEATS = 20
VECTORS = 3
SECONDS = 900
# The largest relative error that counts as right, for each dtype. In float32 it allows for the
# rounding errors of all layers. In float64 it allows for the error of finite differences, 1e-9.
LIMITS = {"float32": 1e-5, "float64": 1e-7}
# The largest relative error that counts as right for layers that TensorFlow always computes in
# float32, in nets of both dtypes.
ROUNDED = 2e-5


def squares(y: Any, output: Any) -> Any:
    return tf.reduce_mean((y - output) ** 2, axis=1)


def built(make: Any, dtype: str, weights: Any = None) -> keras.Model:
    """Return a recipe's model in the given dtype, with the given weights or random ones."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        model = make()
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
    if weights is None:
        rng = np.random.default_rng(7)
        weights = [rng.standard_normal(w.shape) / 2 for w in model.trainable_weights]
    for weight, value in zip(model.trainable_weights, weights, strict=True):
        weight.assign(value.astype("float32"))
    return model


def expected(kind: Kind, x: Any, y: Any, V: Any) -> dict[str, Any]:
    """Return the correct values for `answers`, computed without the library."""
    model = built(kind.twin or kind.make, "float64")
    x = x if kind.shape is None else x.astype("float64")
    dense = oracles.dense_derivatives(model, squares, x, y)
    theta = np.concatenate([np.ravel(w.numpy()) for w in model.trainable_weights])
    # With the short step, a relu rarely changes its sign. Layers in float32 need the long one.
    step = 0.5 if kind.rounds else 1e-6

    def products(x, y):
        at = oracles.plain_gradient_at(model, squares, x, y)
        return np.stack([oracles.central_difference(at, theta, v, step) for v in V.T], axis=1)

    return {
        "gradients": dense.gradients,
        "directional": dense.gradients @ V,
        "directional of one row": dense.gradients[:1] @ V,
        "hvp": products(x, y),
        "hvp of one row": products(x[:1], y[:1]),
        "gauss_newton": dense.gauss_newton @ V,
        "hvp of batches": np.stack([products(x[i : i + 1], y[i : i + 1]) for i in (0, 1)]),
    }


def answers(net: GenericNeuralNet, x: Any, y: Any, V: Any) -> dict[str, Any]:
    one = tf.nest.map_structure(lambda part: part[:1], x)
    pairs = tf.nest.map_structure(lambda part: part[:2, None], x), y[:2, None]
    return {
        "gradients": net.gradients(x, y),
        "directional": net.directional(x, y, V),
        "directional of one row": net.directional(one, y[:1], V),
        "hvp": net.hvp(x, y, V),
        "hvp of one row": net.hvp(one, y[:1], V),
        "gauss_newton": net.gauss_newton_product(x, y, V),
        "hvp of batches": net.each_batch("hvp", *pairs, np.stack([V, V])),
    }


def measured(name: str, repeats: int = REPEATS, double: bool = True) -> dict[str, Any]:
    """Compute all answers for a layer `repeats` times in float32, and compare with `expected`.

    If `double` is true, the answers are also computed once in float64.

    Returns: a dict with `status` "right", "wrong: ..." or "refused". A refused model also has the
      library's `message`. Others have `errors`: the largest error of each answer and dtype.
    """
    kind, rng = KINDS[name], np.random.default_rng(8)
    x, y = kind.inputs(rng), rng.standard_normal((3, 2)).astype("float32").astype("float64")
    x = x if kind.shape is None else x.astype("float32")
    errors: dict[str, float] = {}
    model = built(kind.make, "float32")
    d = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    V = rng.standard_normal((d, VECTORS)).astype("float32").astype("float64")
    true = expected(kind, x, y, V)
    try:
        runs = [("float32", model, repeats)]
        if double and (kind.twin is None or kind.rounds):
            runs.append(("float64", built(kind.make, "float64"), 1))
        for dtype, model, times in runs:
            net = GenericNeuralNet(model, "mse")
            rows = x if kind.shape is None else x.astype(dtype)
            # `given` applies lookup layers once and returns the inputs of the layers after them.
            examples = net.given(Examples(rows, y.astype(dtype)), "train")
            net.validate(examples, "train")
            rows = examples.x
            for _ in range(times):
                for question, got in answers(net, rows, y.astype(dtype), V).items():
                    scale = max(np.linalg.norm(true[question]), 1e-3)
                    error = float(np.linalg.norm(got - true[question]) / scale)
                    key = f"{question}, {dtype}"
                    # Treat NaN as an infinite error.
                    errors[key] = np.inf if np.isnan(error) else max(error, errors.get(key, 0))
    except (NotImplementedError, ValueError, tf.errors.OpError) as error:
        return {"status": "refused", "message": f"{type(error).__name__}: {error}"[:300]}
    limits = {d: max(limit, ROUNDED) if kind.rounds else limit for d, limit in LIMITS.items()}
    bad = [key for key, error in errors.items() if not error <= limits[key.split(", ")[1]]]
    return {"status": "wrong: " + "; ".join(bad) if bad else "right", "errors": errors}


def in_a_process(name: str) -> dict[str, Any]:
    """Return `measured(name)` from a child process, or how the child died."""
    reading, writing = os.pipe()
    child = os.fork()
    # The parent has run no TensorFlow operation, so the forked child can use TensorFlow.
    if child == 0:
        os.close(reading)
        import signal

        signal.alarm(SECONDS)
        try:
            # oneDNN has no operations for float64.
            found = measured(name, double=os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0")
        except BaseException as error:
            found = {"status": "failed", "message": f"{type(error).__name__}: {error}"[:300]}
        with os.fdopen(writing, "w") as stream:
            json.dump(found, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"status": f"died of signal {os.WTERMSIG(status)}"}
    return json.loads(text)


def main(file: Path, names: list[str]) -> int:
    """Run the named layers, or all. Return the number of layers whose status is not "right".

    Every layer of `layer_kinds` should have answers, so a refusal counts as a failure too.
    """
    onednn = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1") != "0"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text().splitlines() if file.exists() else []
    runs = [run for run in map(json.loads, lines) if run["status"] != "failed"]
    done = {(run["layer"], run["onednn"]): run["status"] for run in runs}
    for name in names or KINDS:
        if (name, onednn) in done:
            continue
        start = time.monotonic()
        found = {"layer": name, "onednn": onednn, "repeats": REPEATS, **in_a_process(name)}
        found["seconds"] = round(time.monotonic() - start, 1)
        with file.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        done[name, onednn] = found["status"]
        print(f"{name:32s} oneDNN {onednn!s:5s} {found['status']}", flush=True)
    return sum(status != "right" for status in done.values())


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]), sys.argv[2:]), 1))
