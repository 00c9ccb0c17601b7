"""s_test by captum, in the peers' environment: `python -m benchmarks.solve_captum FOLDER`.

captum returns scores g' H^-1 g as products of embeddings g' R with H^-1 ~ R R'. Its R is public, so
s_test = R (R' g), whose residual can be checked. Its settings for the same problem, from its 0.9.0
sources:

- its Hessian is that of the summed loss, H n. So its inverse is n times too small, and its
  `hessian_reg`, which it adds to the diagonal, is our weight decay times n;
- `NaiveInfluenceFunction` uses `projection_dim` eigenvectors, all of them if that is d. It drops
  eigenvalues up to `hessian_inverse_tol`: none is that small here;
- `ArnoldiInfluenceFunction` drops the last direction of its space, so `arnoldi_dim` is the wanted
  dimension plus one. If it judges the space invariant, below `arnoldi_tol`, it drops a direction
  that matters, so `arnoldi_tol` is zero;
- `ArnoldiInfluenceFunction` is not among `captum.influence`'s public names;
- it takes the matrix as zero outside the Krylov space: R R' inverts only the part inside, and no
  regularisation acts outside.

One batch has all rows, as a finished tensor, so that its DataLoader need not collate rows.
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
    """Make the torch model and its data; `child.main` times the returned call."""
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
        if not torch.is_tensor(R):  # Arnoldi's is a list of columns shaped like the parameters
            R = torch.stack([torch.cat([part.reshape(-1) for part in column]) for column in R], 1)
        found = (n * R @ embedding.T).detach().numpy()  # (c f, m)
        ours = found.reshape(c, f, -1).transpose(1, 0, 2)
        return np.ascontiguousarray(ours.reshape(f * c, -1)), {"rank": R.shape[1]}

    return solve


if __name__ == "__main__":
    child.main(made_ready)
