"""A run's numbers as markdown."""

from collections.abc import Callable
from typing import Any

from benchmarks.peers import ROUNDING
from benchmarks.solves import OURS, PYDVL, describe
from benchmarks.targets import meaning

PARTS = ("products", "scores", "all-scores", "refits", "solves", "lissa", "cnn", "peers")
_VERDICTS = {True: "holds", False: "FALLS SHORT", None: "not judged"}
_WAYS = {"closed_form": "closed form", "tape": "tape"}


def page(result: dict[str, Any]) -> str:
    """Write the whole page, results/benchmarks/README.md, from the available parts."""
    sections: dict[str, Callable[[dict[str, Any]], str]] = {
        "products": lambda r: "## Hessian products and scores\n\n" + _products(r),
        "scores": _scores,
        "all-scores": lambda r: "## All scores, in a file\n\n" + _all_scores(r),
        "refits": lambda r: "## Exact leave-one-out refits\n\n" + _refits(r),
        "solves": lambda r: "## The same systems solved by two libraries\n\n" + _solves(r),
        "lissa": lambda r: "## LiSSA at the paper's setting\n\n" + _lissa(r),
        "cnn": lambda r: "## The convolutional network\n\n" + _cnn(r),
        "peers": _all_peers,
    }
    parts = [
        "# Benchmarks\n\nWritten by `make bench`; the same numbers and more are in "
        "[benchmarks.json](benchmarks.json). All ratios are within one part's run.",
        _where(result),
        "## Targets\n\n" + targets(result),
        *(sections[part](result) for part in PARTS if part in result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def targets(result: dict[str, Any]) -> str:
    """Write the table of targets."""
    lines = ["| what | measured | target | |", "|---|---|---|---|"]
    for target in result["targets"]:
        band = (
            f"at least {target['low']:g}"
            if target["low"] is not None
            else f"at most {target['high']:g}"
        )
        value = "not measured" if target["value"] is None else _number(target["value"])
        lines.append(
            f"| {meaning(target['metric'])} | {value} | {band} | {_VERDICTS[target['holds']]} |"
        )
    return "\n".join(lines)


def _where(result: dict[str, Any]) -> str:
    machine, data, shape = result["machine"], result["data"], result["shape"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    stand_in = " (a stand-in)" if data["stand_in"] else ""
    there = {name: result[name] for name in PARTS if name in result}
    busy = {name: part["watched"]["cores_used_by_others"] for name, part in there.items()}
    commits = {name: part["run"]["commit"][:12] for name, part in there.items()}
    quiet = {name: part["run"]["quiet"] for name, part in there.items()}
    return (
        f"Logistic regression on {data['name']}{stand_in}: n = {shape['n']:,} rows, "
        f"d = {shape['f'] * shape['c']:,} parameters.\n"
        f"{machine['cores']} cores, {machine['cpu']}; BLAS {'; '.join(machine['blas'])}; "
        f"{versions}; commit {_by_part(commits)}.\n"
        f"Quiet before the run: {_by_part(quiet)}; cores used by others meanwhile: "
        f"{', '.join(f'{name} {value}' for name, value in busy.items())}."
    )


def _by_part(values: dict[str, Any]) -> str:
    """Write one value if all parts have the same, otherwise each value with its parts."""
    parts: dict[Any, list[str]] = {}
    for name, value in values.items():
        parts.setdefault(value, []).append(name)
    if len(parts) == 1:
        return str(next(iter(parts)))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in parts.items())


def _products(result: dict[str, Any]) -> str:
    part = result["products"]
    rates = "; ".join(f"{name} {rate:.0f}" for name, rate in part["machine_gflops"].items())
    lines = [
        f"{part['dtype']}; a block is {part['num_vectors']} vectors and "
        f"{part['flop_of_block']:.2e} operations (4 n f c m). Matrix products of the machine, "
        f"GFLOP/s: {rates}; `shapes` are those of the block.\n",
        "| by | gradient, s | one product, s | / gradient | block, s | GFLOP/s | of the machine "
        "| largest error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, words in _WAYS.items():
        row = part[way]
        seconds = {name: _number(timing["best"]) for name, timing in row["seconds"].items()}
        lines.append(
            f"| {words} | {seconds['gradient']} | {seconds['product']} "
            f"| {_number(row['product_per_gradient'])} | {seconds['block']} "
            f"| {row['block_gflops']:.0f} | {row['fraction_of_machine']:.0%} "
            f"| {row['largest_error']:.1e} |"
        )
    return "\n".join(lines)


def _scores(result: dict[str, Any]) -> str:
    part = result["scores"]
    lines = [
        f"Scores of all {result['shape']['n']:,} rows, s_test given:\n",
        f"| by | gradient, s | one point, s | / gradient | {part['num_points']} points, s "
        "| / gradient | largest error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (f"{way} {dtype}" for way in _WAYS for dtype in ("float32", "float64")):
        row = part[name]
        seconds = {key: _number(timing["best"]) for key, timing in row["seconds"].items()}
        lines.append(
            f"| {name.replace('_', ' ')} | {seconds['gradient']} | {seconds['one']} "
            f"| {_number(row['one_per_gradient'])} | {seconds['many']} "
            f"| {_number(row['many_per_gradient'])} | {row['largest_error']:.1e} |"
        )
    return "\n".join(lines)


def _refits(result: dict[str, Any]) -> str:
    part = result["refits"]
    return (
        f"{part['num_refits']} rows, each removed alone: {part['seconds']:.1f} s, the "
        f"factorisation of the Hessian included; {part['passes_per_refit']:.1f} data passes a "
        f"refit, shared by the refits of a block; worst gradient norm "
        f"{part['worst_gradient_norm']:.1e}."
    )


def _solves(result: dict[str, Any]) -> str:
    part = result["solves"]
    peers = part["peers"]
    against = (
        "pyDVL is not installed here."
        if peers is None
        else ", ".join(f"{name} {version}" for name, version in peers.items()) + "."
    )
    lines = [
        f"Relative residual {part['tolerance']:.0e}, recomputed for both in float64 by our "
        "operator. Each in its own process; seconds are the least of up to three runs and exclude "
        "imports and reading; memory is the process's peak, and what it held before solving. "
        f"{against}\n",
        "| solver, dtype: test points solved | seconds | / our fastest | residual, largest "
        "| within | peak MB | before MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in part["runs"]:
        if "error" in run:
            lines.append(f"| {describe(run)} | {run['error']} | | | | | |")
            continue
        ours = part["fastest"][str(run["points"])]["ours"]
        ratio = run["seconds_for_all"] / part["runs"][ours]["seconds"] if ours is not None else None
        lines.append(
            f"| {describe(run)} | {_seconds(run)} | {'' if ratio is None else _number(ratio)} "
            f"| {run['largest_residual']:.1e} | {'yes' if run['meets'] else 'no'} "
            f"| {run['peak_rss_mb']} | {run['rss_before_mb']} |"
        )
    for points, best in part["fastest"].items():
        plural = "s" * (points != "1")
        for which, speedup, theirs in (
            ("as it comes", part["speedup_over_default"], part["fastest_default"][points]),
            ("at its fastest", part["speedup"], best[PYDVL]),
        ):
            if speedup[points] is not None:
                lines.append(
                    f"\n{points} test point{plural}: ours is {_number(speedup[points])} times as "
                    f"fast as pyDVL {which}: {describe(part['runs'][theirs])}."
                )
    return "\n".join(lines)


def _all_scores(result: dict[str, Any]) -> str:
    part = result["all-scores"]
    seconds = {name: _number(value) for name, value in part["seconds"].items()}
    return (
        f"{part['num_tests']:,} test points x {result['shape']['n']:,} rows, {part['dtype']} from "
        f"float64 solves, {part['megabytes']:,.0f} MB: {seconds['all']} s, of which preparing "
        f"`Direct` {seconds['prepare']}, solving {seconds['solve']}, multiplying and writing "
        f"{seconds['multiply']}, all else {seconds['other']}.\n"
        f"The multiplication, {part['flop_of_multiply']:.2e} operations (2 n d m), ran at "
        f"{part['multiply_gflops']:.0f} GFLOP/s, {part['fraction_of_machine']:.0%} of the "
        f"machine's {part['machine_gflops']:.0f} in the same process.\n"
        f"Largest residual {part['largest_residual']:.1e}; largest error of a sample, relative to "
        f"its largest score, {part['largest_error']:.1e}."
    )


def _lissa(result: dict[str, Any]) -> str:
    part = result["lissa"]
    return (
        f"Scale {part['scale']:g}, depth {part['depth']:,}, {part['repeats']} repeats, batches of "
        f"{part['batch_size']} row, test point {part['point']}: {_number(part['seconds'])} s. "
        f"Residual {_number(part['residual'])}; correlation of all rows' scores with exact ones "
        f"{part['pearson']:.4f}."
    )


def _cnn(result: dict[str, Any]) -> str:
    part = result["cnn"]
    network, iterations = part["network"], part["cg_iterations"]
    steps = sum(steps for steps, _ in network["schedule"])
    lines = [
        f"s_test of test point {network['point']}, {network['num_rows']:,} images, d = "
        f"{part['d']:,}, float32, after {steps:,} steps of training (not timed): risk "
        f"{_number(part['risk'])}, gradient norm {part['gradient_norm']:.1e}. Hessian damped by "
        f"{network['damping']:g}, to a relative residual of {network['rtol']:g}. One Hessian "
        f"product takes {_number(part['product_seconds'])} s; CG is stopped after products of "
        f"{network['patience']:g} s.\n",
        "| way | seconds | of which preparing | iterations | residual | within |",
        "|---|---|---|---|---|---|",
    ]
    for run in part["runs"]:
        if "error" in run:
            lines.append(f"| {run['method']} | {run['error']} | | | | no |")
            continue
        lines.append(
            f"| {run['method']} | {_number(run['seconds'])} | {_number(run['prepare_seconds'])} "
            f"| {run['iterations']} | {run['residual']:.1e} | {'yes' if run['meets'] else 'no'} |"
        )
    lines += [
        "\nIterations of CG in float64, and the factor by which each preconditioner cuts them; "
        "EK-FAC is damped as the matrix, or 100 times as much; `layers` is the exact inverse of "
        "every layer's own block of the Gauss-Newton matrix:\n",
        "| matrix | " + " | ".join(iterations["Hessian"]) + " |",
        "|---" * (1 + len(iterations["Hessian"])) + "|",
    ]
    for matrix, found in iterations.items():
        cells = [_cut(found["none"], count) for count in found.values()]
        lines.append(f"| {matrix} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cut(none: int | None, count: int | None) -> str:
    """Write a count and the factor by which it is less than without a preconditioner."""
    if count is None:
        return "negative curvature"
    return f"{count} ({_number(none / count)})" if none is not None else f"{count}"


def _all_peers(result: dict[str, Any]) -> str:
    found = result["peers"]["problems"]
    return "\n\n".join("## Every solver of every peer: " + _peers(part) for part in found)


def _peers(part: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{by} is not installed here" if found is None else ", ".join(map(" ".join, found.items()))
        for by, found in part["versions"].items()
    )
    runs = part["runs"]
    lines = [
        f"{part['data']}\n\nLogistic regression, n = {part['n']:,}, d = {part['d']:,}, "
        f"{part['points']} test points, weight decay in every H. The residual, recomputed in "
        "float64, is that of the Hessian, whatever matrix a solver inverts; 1 is what x = 0 "
        f"leaves, and below {ROUNDING:.0e} all is rounding. Each peer's row names our fastest "
        "solver that comes at least as close, and its own seconds over that one's. "
        f"Stopped after {part['patience']:g} s a process, start and repetitions included. "
        f"{versions}.\n",
        "| solver, dtype: test points solved | inverts | seconds | residual, largest "
        "| ours at this residual | / ours |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        if run["by"] != OURS and part["versions"][run["by"]] is None:
            continue
        if "error" in run:
            lines.append(f"| {describe(run)} | {run['inverts']} | {run['error']} | | | |")
            continue
        best = None if run["by"] == OURS else run["ours"]
        beside = "none |" if best is None else f"{describe(runs[best])} | {_number(run['ratio'])}"
        lines.append(
            f"| {describe(run)} | {run['inverts']} | {_seconds(run)} "
            f"| {run['largest_residual']:.1e} | {'|' if run['by'] == OURS else beside} |"
        )
    return "\n".join(lines)


def _seconds(run: dict[str, Any]) -> str:
    seconds = _number(run["seconds"])
    if run["solved"] == run["points"]:
        return seconds
    return f"{seconds} (extrapolated: {_number(run['seconds_for_all'])} for {run['points']})"


def _number(value: float) -> str:
    return f"{value:.3g}"
