"""The targets of the benchmarks, and their comparison with the results."""

from typing import Any

from benchmarks import cnn
from experiments.harness.claims import Check

TARGETS = (
    Check("block_fraction_closed_form", 0.35, None),
    Check("block_fraction_tape", 0.35, None),
    Check("product_per_gradient_closed_form", None, 1.5),
    Check("product_per_gradient_tape", None, 1.5),
    Check("scores_per_gradient_closed_form", None, 2.0),
    Check("scores_per_gradient_tape", None, 2.0),
    Check("all_scores_seconds", None, 300.0),
    Check("all_scores_fraction", 0.35, None),
    Check("speedup_over_default_100_points", 10.0, None),
    Check("refits_seconds", None, 90.0),
    Check("refits_gradient_norm", None, 1e-8),
    Check("lissa_seconds", None, 30.0),
    Check("cnn_seconds", None, 180.0),
    Check("cnn_hessian_seconds", None, 360.0),
    Check("ekfac_prepare", None, 12.0),
    Check("ekfac_self_influence", None, 6.0),
    Check("ekfac_scores_of_1", None, 4.0),
    Check("ekfac_scores_of_100", None, 12.0),
    Check("ekfac_one_step_of_1", None, 10.0),
    Check("ekfac_memory_gb", None, 1.5),
    Check("audit_seconds", None, 600.0),
    Check("audit_recall", 0.95, None),
)
MEANING = {
    "block_fraction": "Hessian products in one block, float32: fraction of the machine's rate",
    "product_per_gradient": "one Hessian product, float32: time divided by that of one gradient",
    "scores_per_gradient": "scores of all rows without s_test, float32: time divided by that of "
    "one gradient",
    "all_scores_seconds": "scores of all rows for all test points, written to a file, with float64 "
    "solves: seconds",
    "all_scores_fraction": "the multiplication for that file, float32: fraction of the machine's "
    "rate",
    "speedup_over_default": "s_test to the same true residual: time of pyDVL's default CgInfluence "
    "divided by that of our fastest solver",
    "refits_seconds": "exact refits, with the factorisation: seconds",
    "refits_gradient_norm": "exact refits: largest gradient norm",
    "lissa_seconds": "LiSSA at the paper's setting, one test point: seconds",
    "cnn_hessian_seconds": "the exact Hessian of that network, formed and factored: seconds",
    "ekfac_memory_gb": "EK-FAC of a network of 1.8 million weights: memory over the model, GB",
    "ekfac": "EK-FAC of that network, time in passes of `fit`",
    "audit_seconds": "factors and self-influence of all rows of MNIST, that network: seconds",
    "audit_recall": "wrong labels found by self-influence with a tenth of these rows checked",
    "cnn_seconds": "s_test of the convolutional network, one test point, by the fastest method "
    "that reaches a relative residual of 1e-4: seconds",
}


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """Collect the metrics of the targets from the results. Omit metrics without a value."""
    found: dict[str, float | None] = {}
    for way in ("closed_form", "tape"):
        if "products" in result:
            product = result["products"][way]
            found[f"block_fraction_{way}"] = product["fraction_of_machine"]
            found[f"product_per_gradient_{way}"] = product["product_per_gradient"]
        if "scores" in result:
            score = result["scores"][f"{way} float32"]
            found[f"scores_per_gradient_{way}"] = score["one_per_gradient"]
    if "all-scores" in result:
        part = result["all-scores"]
        found["all_scores_seconds"] = part["seconds"]["all"] if part["converged"] else None
        found["all_scores_fraction"] = part["fraction_of_machine"]
    if "solves" in result:
        for points, value in result["solves"]["speedup_over_default"].items():
            found[f"speedup_over_default_{points}_points"] = value
    if "refits" in result:
        found["refits_seconds"] = result["refits"]["seconds"]
        found["refits_gradient_norm"] = result["refits"]["worst_gradient_norm"]
    if "lissa" in result:
        found["lissa_seconds"] = result["lissa"]["seconds"]
    if "cnn" in result:
        best = cnn.fastest(result["cnn"])
        found["cnn_seconds"] = None if best is None else best["seconds"]
        for run in result["cnn"]["runs"]:
            if run["method"] == "Direct" and "error" not in run:
                found["cnn_hessian_seconds"] = run["prepare_seconds"]
    if "networks" in result:
        part = result["networks"]
        found |= {f"ekfac_{name}": value for name, value in part["passes"].items()}
        found["ekfac_memory_gb"] = part["memory_gb"]
        seconds = part["audit"]["seconds"]
        found["audit_seconds"] = seconds["prepare"] + seconds["self_influence"]
        found["audit_recall"] = part["audit"]["recall"]["self_influence"][1]
    return {name: value for name, value in found.items() if value is not None}


def judged(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare the results with every target.

    Returns: {metric, low, high, value, holds} for each target. `holds` is None on stand-in data.
    """
    values, stand_in = metrics(result), result["data"]["stand_in"]
    return [
        {
            "metric": target.metric,
            "low": target.low,
            "high": target.high,
            "value": values.get(target.metric),
            "holds": None if stand_in else target.passes(values),
        }
        for target in TARGETS
    ]


def meaning(metric: str) -> str:
    """Return a description of a metric in words."""
    stem = next(stem for stem in MEANING if metric.startswith(stem))
    rest = metric[len(stem) + 1 :].replace("_", " ")
    return f"{MEANING[stem]} ({rest})" if rest else MEANING[stem]
