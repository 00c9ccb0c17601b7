"""The page with the results of the benchmarks, in markdown."""

from collections.abc import Callable
from typing import Any

from benchmarks.networks import CHECKED
from benchmarks.peers import ROUNDING
from benchmarks.solves import OURS, PYDVL, describe
from benchmarks.targets import meaning

PARTS = (
    "products",
    "scores",
    "all-scores",
    "refits",
    "solves",
    "lissa",
    "cnn",
    "networks",
    "peers",
)
_VERDICTS = {True: "holds", False: "FALLS SHORT", None: "not judged"}
_WAYS = {"closed_form": "closed form", "tape": "tape"}


def page(result: dict[str, Any]) -> str:
    """Return the text of results/benchmarks/README.md, with a section for each part that ran."""
    sections: dict[str, Callable[[dict[str, Any]], str]] = {
        "products": lambda r: "## Hessian products and scores\n\n" + _products(r),
        "scores": _scores,
        "all-scores": lambda r: "## All scores, in a file\n\n" + _all_scores(r),
        "refits": lambda r: "## Exact leave-one-out refits\n\n" + _refits(r),
        "solves": lambda r: "## The same systems solved by two libraries\n\n" + _solves(r),
        "lissa": lambda r: "## LiSSA at the paper's setting\n\n" + _lissa(r),
        "cnn": lambda r: "## The convolutional network\n\n" + _cnn(r),
        "networks": lambda r: "## A network of a million weights\n\n" + _networks(r),
        "peers": _all_peers,
    }
    parts = [
        "# Benchmarks\n\n`make bench` writes this page. [benchmarks.json](benchmarks.json) has the "
        "same numbers and more. The two times of a ratio always come from the same run.",
        _where(result),
        "## Targets\n\n" + targets(result),
        *(sections[part](result) for part in PARTS if part in result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def targets(result: dict[str, Any]) -> str:
    """Return the table of targets."""
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
        f"The machine was quiet before the run: {_by_part(quiet)}. Cores that other processes used "
        f"during the run: {', '.join(f'{name} {value}' for name, value in busy.items())}."
    )


def _by_part(values: dict[str, Any]) -> str:
    """Return the value as text if all parts share it, otherwise each value with its parts."""
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
        f"All numbers are in {part['dtype']}. A block has {part['num_vectors']} vectors and takes "
        f"{part['flop_of_block']:.2e} operations (4 n f c m). The machine's own rates for matrix "
        f"products, in GFLOP/s: {rates}. `shapes` are matrices of the block's shapes, `square` are "
        "square matrices.\n",
        "| method | gradient, s | one product, s | / gradient | block, s | GFLOP/s "
        "| of the machine's rate | largest error |",
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
        f"Scores of all {result['shape']['n']:,} rows; the time to compute s_test is not "
        "included:\n",
        f"| method | gradient, s | one point, s | / gradient | {part['num_points']} points, s "
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
        f"{part['num_refits']} rows are removed one at a time. All refits take "
        f"{part['seconds']:.1f} s, including the factorisation of the Hessian. The refits of a "
        "block share their passes over the data; this makes "
        f"{part['passes_per_refit']:.1f} passes per refit. The largest gradient norm after a refit "
        f"is {part['worst_gradient_norm']:.1e}."
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
        f"The required relative residual is {part['tolerance']:.0e}. For both libraries it is "
        "recomputed in float64 by our operator. Each solver runs in its own process. The seconds "
        "are the shortest of up to three runs, without imports and reading. `peak MB` is the peak "
        "memory of the process, `before MB` its memory before solving. `within` says whether the "
        f"residual is within the required one. {against}\n",
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
            ("by default", part["speedup_over_default"], part["fastest_default"][points]),
            ("with its fastest solver", part["speedup"], best[PYDVL]),
        ):
            if speedup[points] is not None:
                lines.append(
                    f"\n{points} test point{plural}: ours is {_number(speedup[points])} times as "
                    f"fast as pyDVL {which} ({describe(part['runs'][theirs])})."
                )
    return "\n".join(lines)


def _all_scores(result: dict[str, Any]) -> str:
    part = result["all-scores"]
    seconds = {name: _number(value) for name, value in part["seconds"].items()}
    return (
        f"The file holds the scores of {result['shape']['n']:,} rows for {part['num_tests']:,} "
        f"test points. It has {part['megabytes']:,.0f} MB of {part['dtype']}, computed from "
        f"float64 solves. The whole takes {seconds['all']} s. Of these, preparing `Direct` takes "
        f"{seconds['prepare']}, solving {seconds['solve']}, multiplying and writing "
        f"{seconds['multiply']}, everything else {seconds['other']}.\n"
        f"The multiplication takes {part['flop_of_multiply']:.2e} operations (2 n d m) and runs at "
        f"{part['multiply_gflops']:.0f} GFLOP/s. This is {part['fraction_of_machine']:.0%} of the "
        f"machine's {part['machine_gflops']:.0f} GFLOP/s, measured in the same process.\n"
        f"The largest residual is {part['largest_residual']:.1e}. A sample of the scores is "
        "compared with scores in float64. The largest error, relative to the largest score of the "
        f"sample, is {part['largest_error']:.1e}."
    )


def _lissa(result: dict[str, Any]) -> str:
    part = result["lissa"]
    return (
        f"Scale {part['scale']:g}, depth {part['depth']:,}, {part['repeats']} repeats, batches of "
        f"{part['batch_size']} row, test point {part['point']}: {_number(part['seconds'])} s. "
        f"The residual is {_number(part['residual'])}. The correlation between the scores of all "
        f"rows and the exact scores is {part['pearson']:.4f}."
    )


def _networks(result: dict[str, Any]) -> str:
    part = result["networks"]
    shape, audit = part["network"], part["audit"]
    lines = [
        f"A perceptron with {part['d']:,} weights, {shape['num_rows']:,} rows, EK-FAC. One pass is "
        f"an epoch of `fit` over these rows, {part['pass_seconds']:.2f} s. The process grew by "
        f"{part['memory_gb']:.2f} GB.",
        "",
        "| question | passes |",
        "|---|---|",
        *(f"| {name.replace('_', ' ')} | {value:.1f} |" for name, value in part["passes"].items()),
        "",
        f"An audit of {audit['num_rows']:,} rows, {audit['num_wrong']:,} labels wrong: "
        + ", ".join(f"{name} {value:.0f} s" for name, value in audit["seconds"].items())
        + ". Share of the wrong labels found:",
        "",
        "| ranking | " + " | ".join(f"{share:.0%} checked" for share in CHECKED) + " |",
        "|---" * (len(CHECKED) + 1) + "|",
        *(
            f"| {name.replace('_', '-')} | " + " | ".join(f"{value:.3f}" for value in found) + " |"
            for name, found in audit["recall"].items()
        ),
    ]
    return "\n".join(lines)


def _cnn(result: dict[str, Any]) -> str:
    part = result["cnn"]
    network, iterations = part["network"], part["cg_iterations"]
    steps = sum(steps for steps, _ in network["schedule"])
    lines = [
        f"s_test of test point {network['point']}, {network['num_rows']:,} images, d = "
        f"{part['d']:,}, float32, after {steps:,} steps of training (not timed). The risk is "
        f"{_number(part['risk'])} and its gradient norm {part['gradient_norm']:.1e}. The Hessian "
        f"is damped by {network['damping']:g}. The required relative residual is "
        f"{network['rtol']:g}. One Hessian product takes {_number(part['product_seconds'])} s. CG "
        f"stops when its products have taken {network['patience']:g} s.\n",
        "| method | seconds | of which preparing | iterations | residual | within |",
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
        "\nThe next table counts CG's iterations in float64. In brackets: the number without a "
        "preconditioner, divided by the number with it; above 1, the preconditioner helps. "
        "`EK-FAC` has the damping of the matrix, `EK-FAC damped more` 100 times that. `layers` is "
        "the exact inverse of every layer's own block of the Gauss-Newton matrix:\n",
        "| matrix | " + " | ".join(iterations["Hessian"]) + " |",
        "|---" * (1 + len(iterations["Hessian"])) + "|",
    ]
    for matrix, found in iterations.items():
        cells = [_cut(found["none"], count) for count in found.values()]
        lines.append(f"| {matrix} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cut(none: int | None, count: int | None) -> str:
    """Return `count` iterations as text.

    In brackets: `none`, the iterations without a preconditioner, divided by `count`.
    """
    if count is None:
        return "negative curvature"
    return f"{count} ({_number(none / count)})" if none is not None else f"{count}"


def _all_peers(result: dict[str, Any]) -> str:
    found = result["peers"]["problems"]
    return "\n\n".join("## Every solver of every library: " + _peers(part) for part in found)


def _peers(part: dict[str, Any]) -> str:
    versions = ", ".join(
        f"{by} is not installed here" if found is None else ", ".join(map(" ".join, found.items()))
        for by, found in part["versions"].items()
    )
    runs = part["runs"]
    lines = [
        f"{part['data']}\n\nLogistic regression, n = {part['n']:,}, d = {part['d']:,}, "
        f"{part['points']} test points. Every H includes the weight decay. The residual is "
        "recomputed in float64 with the Hessian, even if the solver inverts another matrix. It is "
        f"1 for x = 0, and only rounding below {ROUNDING:.0e}. Each row of another library names "
        "our fastest solver with a residual at most as large. `/ ours` divides the library's "
        f"seconds by that solver's. A process is stopped after {part['patience']:g} s, including "
        f"its start and repetitions. {versions}.\n",
        "| solver, dtype: test points solved | inverts | seconds | residual, largest "
        "| our fastest at this residual | / ours |",
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
