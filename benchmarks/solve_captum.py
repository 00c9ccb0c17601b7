"""s_test by captum, in the peers' environment: `python -m benchmarks.solve_captum FOLDER`.

captum computes scores g' H^-1 g as products of embeddings g' R, where R R' approximates H^-1. R is
public. We compute s_test = R (R' g) and check its residual. captum solves the same problem with
these settings (sources of 0.9.0):

- captum's Hessian is that of the summed loss, n H. Its inverse is therefore n times smaller than
  ours. captum adds `hessian_reg` to the diagonal of n H, so it is our weight decay times n;
- `NaiveInfluenceFunction` uses `projection_dim` eigenvectors. We set it to d, so all are used.
  Eigenvalues up to `hessian_inverse_tol` are dropped, but no eigenvalue is so small here;
- `ArnoldiInfluenceFunction` drops the last direction of its Krylov space. We therefore set
  `arnoldi_dim` to the wanted dimension plus one. It also drops a direction if `arnoldi_tol` makes
  it take the space for invariant. That direction matters, so we set `arnoldi_tol` to zero;
- `ArnoldiInfluenceFunction` is not among the public names of `captum.influence`;
- `ArnoldiInfluenceFunction` treats the matrix as zero outside the Krylov space. R R' inverts only
  the part inside the space, and no regularisation acts outside.

All rows are one batch, given as a finished tensor. The DataLoader then need not collate rows.
"""

from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from captum.influence import NaiveInfluenceFunction  # pyright: ignore[reportMissingImports]
from captum.influence._core.arnoldi_influence_function import (  # pyright: ignore[reportMissingImports]
    ArnoldiInfluenceFunction,
)
from numpy.typing import NDArray
from torch.utils.data import DataLoader  # pyright: ignore[reportMissingImports]

from benchmarks import child


def made_ready(arrays: child.Arrays, setting: dict[str, Any]) -> child.Solve:
    """Make the torch model and its data. Return the call that `child.main` times."""
    x, y, x_test, y_test = (
        torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test")
    )
    f, c = arrays["theta"].shape
    n = len(x)
    torch.set_default_dtype(x.dtype)
    model = torch.nn.Linear(f, c, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(arrays["theta"].T))
    options: dict[str, Any] = {
        "checkpoint": "",
        "checkpoints_load_func": lambda model, path: 1.0,  # the weights are already set
        "loss_fn": torch.nn.CrossEntropyLoss(reduction="none"),
        "projection_dim": f * c,
        "hessian_reg": n * setting["weight_decay"],
    }
    if setting["method"] == "Arnoldi":
        kind = ArnoldiInfluenceFunction
        options |= {"arnoldi_dim": setting["rank"] + 1, "arnoldi_tol": 0.0}
    else:
        kind = NaiveInfluenceFunction
    data = DataLoader([(x, y)], batch_size=None)

    def solve() -> tuple[NDArray, dict[str, Any]]:
        influence = kind(model, data, **options)
        embedding = influence.compute_intermediate_quantities((x_test, y_test)).detach()
        R = influence.R
        # ArnoldiInfluenceFunction has a list of columns. Each has the shapes of the parameters.
        if not torch.is_tensor(R):
            R = torch.stack([torch.cat([part.reshape(-1) for part in column]) for column in R], 1)
        found = (n * R @ embedding.T).detach().numpy()  # (c f, m)
        ours = found.reshape(c, f, -1).transpose(1, 0, 2)
        return np.ascontiguousarray(ours.reshape(f * c, -1)), {"rank": R.shape[1]}

    return solve


if __name__ == "__main__":
    child.main(made_ready)
