"""s_test by pyDVL's CgInfluence, in the peers' environment: `... -m benchmarks.solve_pydvl FOLDER`.

What pyDVL needs to be told for the same problem and tolerance, from its 0.10.0 sources:

- its Hessian is of the mean loss, so `regularization` = our weight decay makes it ours;
- it averages over batches without weights, so the batch size must divide the number of rows;
- CG starts from x = b, and stops at |b - A x| < max(rtol^2 |b|, atol^2), with |b| taken along the
  wrong axis unless `solve_simultaneously`; so one by one, atol is set for each point;
- `solve_simultaneously=True` is a true block CG: one search space for all right-hand sides.

Batches are handed over as finished tensors, which spares its DataLoader the collating of rows, and
of the possible batch sizes the one with the fastest Hessian product is taken; neither is timed.
"""

import time
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from pydvl.influence.torch import CgInfluence  # pyright: ignore[reportMissingImports]
from pydvl.influence.torch.operator import HessianOperator  # pyright: ignore[reportMissingImports]
from pydvl.influence.torch.preconditioner import (  # pyright: ignore[reportMissingImports]
    NystroemPreconditioner,
)
from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

from benchmarks import child

_BATCHES = (100, 50, 10, 1)  # into how many batches the rows may be cut; one is for one vector
_ENOUGH_ITERATIONS = 500


class _Passes(DataLoader):
    """Finished batches in order; counts how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def made_ready(arrays: child.Arrays, setting: dict[str, Any]) -> child.Solve:
    """The torch model, its data and the batch size; what `child.main` times is the rest."""
    x, y, x_test, y_test = (
        torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test")
    )
    f, c = arrays["theta"].shape
    model = torch.nn.Linear(f, c, bias=False, dtype=x.dtype)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(arrays["theta"].T))
    at_once = setting["solved"] if setting["method"] == "block" else 1
    rates = _rates(model, x, y, at_once)
    batch_size = max(rates, key=lambda size: rates[size])
    batches = [(x[i : i + batch_size], y[i : i + batch_size]) for i in range(0, len(x), batch_size)]
    data = _Passes(batches, batch_size=None)
    tolerance, rank = setting["tolerance"], setting["preconditioner_rank"]
    E = torch.softmax(model(x_test).detach(), dim=1) - torch.nn.functional.one_hot(y_test, c)
    norms = (x_test.norm(dim=1) * E.norm(dim=1)).tolist()  # of the test gradients

    def influence(**options: Any) -> Any:
        return CgInfluence(
            model,
            torch.nn.functional.cross_entropy,
            regularization=setting["weight_decay"],
            maxiter=_ENOUGH_ITERATIONS,
            preconditioner=NystroemPreconditioner(rank) if rank else None,
            **options,
        ).fit(data)

    def solve() -> tuple[NDArray, dict[str, Any]]:
        data.passes = 0
        if setting["method"] == "block":
            solver = influence(rtol=tolerance**0.5, atol=0.0, solve_simultaneously=True)
            found = solver.influence_factors(x_test, y_test)
        else:
            parts = []
            for i, norm in enumerate(norms):
                solver = influence(rtol=0.0, atol=(tolerance * norm) ** 0.5)
                parts.append(solver.influence_factors(x_test[i : i + 1], y_test[i : i + 1]))
            found = torch.cat(parts)
        report = {"products": data.passes, "batch_size": batch_size}
        ours = found.detach().numpy().reshape(-1, c, f).transpose(2, 1, 0)  # from (m, c, f)
        return np.ascontiguousarray(ours.reshape(f * c, -1)), report

    return solve


def _rates(model: Any, x: Any, y: Any, num_vectors: int) -> dict[int, float]:
    """Rows a second that Hessian products of this many vectors take, by batch size."""
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
