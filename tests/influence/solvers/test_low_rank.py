"""Tests of the products and the memory that Nystrom and Lanczos need, and of their answers.

For rank r, they multiply at most r + 10 vectors, and hold at most 3 (r + 10) vectors in memory.
"""

import tracemalloc

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from influence import prepare
from influence.solvers import Lanczos, Nystrom
from influence.solvers import nystrom as sketch
from tests.influence.problems import relative_error, symmetric
from tests.influence.solvers.matrices import counting, inverse


@pytest.mark.parametrize("rank", [1, 7, 30, 60])
@pytest.mark.parametrize("kind", [Nystrom, Lanczos])
def test_at_most_ten_products_more_than_the_rank(kind, rank):
    A, widths = counting(symmetric(np.geomspace(0.1, 2, 100)))
    prepare(A, kind(rank))
    assert sum(widths) <= rank + 10


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [Nystrom, Lanczos])
def test_memory_of_three_blocks(kind, dtype, monkeypatch):
    d, rank = 100_000, 24
    monkeypatch.setattr(sketch, "VECTORS", 1 << 22)  # a product takes only a few vectors at a time
    values = np.geomspace(1, 1e-2, d).astype(dtype)
    scale = lambda V: values[:, None] * V  # noqa: E731
    A = LinearOperator((d, d), matvec=lambda v: scale(v.reshape(d, 1)), matmat=scale, dtype=dtype)
    tracemalloc.start()
    try:
        prepared = prepare(A, kind(rank))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 3 * (rank + 10) * d * np.dtype(dtype).itemsize
    assert np.isfinite(prepared(np.ones(d, dtype)).x).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [Nystrom, Lanczos])
def test_a_matrix_of_low_rank_and_full_rank_give_the_inverse(kind, dtype):
    """Compare with the dense inverse of 0.5 I plus a matrix of rank six, at full rank.

    Lanczos must also give the inverse at rank 7.
    """
    eps = np.finfo(dtype).eps
    A = symmetric([*np.full(194, 0.5), *np.linspace(3.0, 8.0, 6)]).astype(dtype)
    values, vectors = np.linalg.eigh(A.astype(float))
    right = vectors / values @ vectors.T
    assert relative_error(inverse(A, kind(200)), right) < 1e3 * eps
    # Rank 7 has the six larger eigenvalues and 0.5, which replaces all others. This is exact.
    if kind is Lanczos:
        assert relative_error(inverse(A, kind(7)), right) < 1e3 * eps


@pytest.mark.parametrize("rank", [10, 40])
def test_blocks_of_products_do_not_change_the_sketch(rank, monkeypatch):
    A, widths = counting(symmetric(np.geomspace(0.01, 1, 200)))
    whole = inverse(A, Nystrom(rank))
    monkeypatch.setattr(sketch, "VECTORS", 4 * 200 * 8 * 3)
    apart = inverse(A, Nystrom(rank))
    assert widths[0] == rank and widths[1] == 3
    assert relative_error(apart, whole) < 1e-11
