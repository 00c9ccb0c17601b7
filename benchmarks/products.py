"""Time of Hessian products, compared with one gradient and with the machine's matrix products."""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.clock import in_turns
from benchmarks.problem import Problem
from influence import GenericNeuralNet, Hessian

_DTYPE = "float32"
_SEED = 0


def run(problem: Problem, *, num_vectors: int, rounds: int, square: int) -> dict[str, Any]:
    """Time `Hessian(net, train) @ V` in float32, by closed form and by TensorFlow's gradient tape.

    A block of m vectors counts as 4 n f c m operations: the two matrix products X V and X' (...).
    Other work, such as the penalty and the forward pass, is not counted. The fraction of the
    machine's rate is therefore a lower bound.

    Args:
      problem: the model and its data.
      num_vectors: m, the number of vectors in the block.
      rounds: number of rounds of `in_turns`.
      square: size of the square matrices whose product gives the machine's rate.

    Returns: `dtype`, `num_vectors`, `flop_of_block`, `machine_gflops`, `closed_form` and `tape`.
      `machine_gflops` has the rates of NumPy and TensorFlow for products of square matrices and of
      matrices with the block's shapes. `closed_form` and `tape` each have the `seconds` of one
      gradient, one product and one block; the ratio `product_per_gradient`; the rate of the block,
      `block_gflops`; this rate divided by that of the fastest square product,
      `fraction_of_machine`; and `largest_error`, the largest relative error of a column of the
      block compared with float64.
    """
    n, f, c = problem.shape
    rng = np.random.default_rng(_SEED)
    V = rng.standard_normal((f * c, num_vectors)).astype(_DTYPE)
    train = problem.train[_DTYPE]
    nets = {"closed_form": problem.closed_form(_DTYPE), "tape": problem.tape(_DTYPE)}

    S, T = rng.standard_normal((2, square, square)).astype(_DTYPE)
    W, U = V.reshape(f, -1), rng.standard_normal((n, c * num_vectors)).astype(_DTYPE)
    x = train.x
    s, t, tx, w, u = (tf.constant(array) for array in (S, T, x, W, U))
    tasks: dict[str, Any] = {
        "square numpy": lambda: S @ T,
        "square tensorflow": lambda: tf.matmul(s, t).numpy(),
        "shapes numpy": lambda: (x @ W, x.T @ U),
        "shapes tensorflow": lambda: (
            tf.matmul(tx, w).numpy(),
            tf.matmul(tx, u, transpose_a=True).numpy(),
        ),
    }
    for name, net in nets.items():
        tasks |= _tasks(name, net, train, V)
    times = in_turns(tasks, rounds)

    work = 4 * n * f * c  # operations for one vector
    machine = {
        name: (2 * square**3 if "square" in name else work * num_vectors) / times[name].best / 1e9
        for name in list(tasks)[:4]
    }
    fastest = max(rate for name, rate in machine.items() if "square" in name)
    exact = Hessian(problem.closed_form("float64"), problem.train["float64"]) @ V.astype(float)
    result: dict[str, Any] = {
        "dtype": _DTYPE,
        "num_vectors": num_vectors,
        "flop_of_block": work * num_vectors,
        "machine_gflops": machine,
    }
    for name, net in nets.items():
        got = {part: times[f"{name} {part}"] for part in ("gradient", "product", "block")}
        rate = work * num_vectors / got["block"].best / 1e9
        error = np.linalg.norm(Hessian(net, train) @ V - exact, axis=0)
        result[name] = {
            "seconds": {part: dataclasses.asdict(timing) for part, timing in got.items()},
            "product_per_gradient": got["product"].best / got["gradient"].best,
            "block_gflops": rate,
            "fraction_of_machine": rate / fastest,
            "largest_error": float((error / np.linalg.norm(exact, axis=0)).max()),
        }
    return result


def _tasks(name: str, net: GenericNeuralNet, train: Any, V: np.ndarray) -> dict[str, Any]:
    H = Hessian(net, train)
    v = V[:, 0].copy()
    return {
        f"{name} gradient": lambda: net.risk_gradient(train),
        f"{name} product": lambda: H @ v,
        f"{name} block": lambda: H @ V,
    }
