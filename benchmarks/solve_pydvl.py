"""s_test by pyDVL, in the peers' environment: `python -m benchmarks.solve_pydvl FOLDER`.

pyDVL solves the same problem to the same tolerance with these settings (sources of 0.10.0):

- its Hessian is that of the mean loss. It equals ours if `regularization` is our weight decay;
- it averages over batches without weights, so the batch size must divide the number of rows;
- CG starts from x = b and stops at |b - A x| < max(rtol^2 |b|, atol^2). Without
  `solve_simultaneously` it takes |b| along the wrong axis. If points are solved one by one, we
  therefore set `atol` for each point;
- `solve_simultaneously=True` is a true block CG: one search space for all right-hand sides;
- each step of `LissaInfluence` draws one whole batch of the loader, with replacement. Its noise
  therefore needs a larger scale than that of our LiSSA; `peers.settings` has the best scale. Its
  early stop tests single entries, so we switch it off. It adds `dampen` times `scale` to the
  diagonal, so `dampen` is 0;
- `ArnoldiInfluence` treats the matrix as zero outside the span of its eigenvectors. With
  `use_woodbury` it uses only the regularisation there, like `NystroemSketchInfluence`;
- `EkfacInfluence` treats the last weights of every layer as biases. If a layer has no biases, it
  permutes the weights. `_Ekfac` puts them where `EkfacInfluence` expects them. `update_diagonal`
  makes it EK-FAC. It uses one pseudo-gradient per row, sum_c sqrt(p_c) grad log p_c. The outer
  product of this vector has cross terms between classes. The Fisher matrix has none, so the two
  differ.

`InverseHarmonicMeanInfluence` is not compared, because it does not weight its first batch.

Batches are finished tensors, so the DataLoader need not collate rows. Their size is the size with
the fastest Hessian product. The time excludes making the batches and choosing their size.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from pydvl.influence.torch import (  # pyright: ignore[reportMissingImports]
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from pydvl.influence.torch.operator import HessianOperator  # pyright: ignore[reportMissingImports]
from pydvl.influence.torch.preconditioner import (  # pyright: ignore[reportMissingImports]
    NystroemPreconditioner,
)
from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

from benchmarks import child

# The numbers of batches to try. A single batch is tried only for products with one vector.
_BATCHES = (100, 50, 10, 1)
_ENOUGH_ITERATIONS = 500
# For each method, the field of the setting that has the number of vectors in one Hessian product.
# "" means one vector.
_VECTORS_AT_ONCE = {"one by one": "", "block": "solved", "Nystrom": "rank", "Arnoldi": ""}


class _Ekfac(EkfacInfluence):
    """EK-FAC for one layer without biases. The last input's weights take the place of biases."""

    def _solve_hvp(self, rhs: Any) -> Any:
        (layer,) = self.active_layers.values()
        W = rhs.reshape(len(rhs), *layer.weight.shape)
        found = super()._solve_hvp(torch.cat([W[:, :, :-1].flatten(1), W[:, :, -1]], dim=1))
        weights, last = found[:, : -W.shape[1]], found[:, -W.shape[1] :]
        return torch.cat([weights.reshape(W[:, :, :-1].shape), last[:, :, None]], 2).flatten(1)


class _Passes(DataLoader):
    """A loader of finished batches, in a fixed order. It counts the passes over the data."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def made_ready(arrays: child.Arrays, setting: dict[str, Any]) -> child.Solve:
    """Make the torch model and its batches. Return the call that `child.main` times."""
    x, y, x_test, y_test = (
        torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test")
    )
    f, c = arrays["theta"].shape
    torch.set_default_dtype(x.dtype)  # the dtype of EkfacInfluence's matrices
    model = torch.nn.Linear(f, c, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(arrays["theta"].T))
    method, decay = setting["method"], setting["weight_decay"]
    if method in _VECTORS_AT_ONCE:
        rates = _rates(model, x, y, setting.get(_VECTORS_AT_ONCE[method], 1))
        batch_size = max(rates, key=lambda size: rates[size])
    else:
        batch_size = setting["batch_size"] or len(x)
    batches = [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    data = _Passes(batches, batch_size=None)
    tolerance, rank = setting["tolerance"], setting["preconditioner_rank"]
    loss = torch.nn.functional.cross_entropy
    E = torch.softmax(model(x_test).detach(), dim=1) - torch.nn.functional.one_hot(y_test, c)
    norms = (x_test.norm(dim=1) * E.norm(dim=1)).tolist()  # norms of the test gradients

    def cg(**options: Any) -> Any:
        return CgInfluence(
            model,
            loss,
            regularization=decay,
            maxiter=_ENOUGH_ITERATIONS,
            preconditioner=NystroemPreconditioner(rank) if rank else None,
            **options,
        ).fit(data)

    others: dict[str, Callable[[], Any]] = {
        "Arnoldi": lambda: ArnoldiInfluence(
            model, loss, decay, rank=setting["rank"], use_woodbury=True
        ),
        "direct": lambda: DirectInfluence(model, loss, decay),
        "EK-FAC": lambda: _Ekfac(model, update_diagonal=True, hessian_regularization=decay),
        "LiSSA": lambda: LissaInfluence(
            model, loss, decay, maxiter=setting["steps"], scale=setting["scale"], rtol=0.0
        ),
        "Nystrom": lambda: NystroemSketchInfluence(model, loss, decay, setting["rank"]),
    }

    def solve() -> tuple[NDArray, dict[str, Any]]:
        data.passes = 0
        if method in others:
            found = others[method]().fit(data).influence_factors(x_test, y_test)
        elif method == "block":
            solver = cg(rtol=tolerance**0.5, atol=0.0, solve_simultaneously=True)
            found = solver.influence_factors(x_test, y_test)
        else:
            parts = []
            for i, norm in enumerate(norms):
                solver = cg(rtol=0.0, atol=(tolerance * norm) ** 0.5)
                parts.append(solver.influence_factors(x_test[i : i + 1], y_test[i : i + 1]))
            found = torch.cat(parts)
        report = {"products": data.passes, "batch_size": batch_size}
        ours = found.detach().numpy().reshape(-1, c, f).transpose(2, 1, 0)  # from (m, c, f)
        return np.ascontiguousarray(ours.reshape(f * c, -1)), report

    return solve


def _rates(model: Any, x: Any, y: Any, num_vectors: int) -> dict[int, float]:
    """Measure the rows per second of Hessian products with `num_vectors` vectors, by batch size."""
    V = torch.randn(num_vectors, model.weight.numel(), dtype=x.dtype)
    rates = {}
    counts = [k for k in _BATCHES if len(x) % k == 0 and (k > 1 or num_vectors == 1)] or [1]
    for size in (len(x) // k for k in counts):
        one = DataLoader([(x[:size], y[:size])], batch_size=None)
        operator = HessianOperator(model, torch.nn.functional.cross_entropy, one)
        begun = time.perf_counter()
        operator.apply(V)
        rates[size] = size / (time.perf_counter() - begun)
    return rates


if __name__ == "__main__":
    torch.manual_seed(0)
    child.main(made_ready)
