"""cleanlab's label quality scores, computed in a separate environment.

`python cleanlab_scores.py FOLDER` reads out-of-fold probabilities from the .npz files in FOLDER. It
writes the scores to FOLDER/cleanlab/. A wrong label has a small score. This script imports nothing
of this repository.
"""

import sys
import time
from pathlib import Path

import numpy as np
from cleanlab.rank import get_label_quality_scores  # pyright: ignore[reportMissingImports]

METHODS = ("self_confidence", "normalized_margin")


def main(folder: Path) -> None:
    """Score every case in the folder."""
    (folder / "cleanlab").mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as case:
            given, probabilities = case["given"], case["probabilities"]
        found = {}
        for method in METHODS:
            begun = time.perf_counter()
            found[method] = get_label_quality_scores(given, probabilities, method=method)
            found[f"seconds_{method}"] = np.array(time.perf_counter() - begun)
        np.savez(folder / "cleanlab" / path.name, **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
