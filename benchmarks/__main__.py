"""`python -m benchmarks`: run the benchmarks, compare them with the targets, write the results.

PARTS lists the benchmarks. The results are a JSON file and a page with tables.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import influence_console as console
from benchmarks import (
    all_scores,
    cnn,
    lissa,
    machine,
    networks,
    peers,
    problem,
    products,
    refits,
    scores,
    solves,
    table,
)
from benchmarks.clock import watched
from benchmarks.cnn import Network
from benchmarks.networks import Perceptron
from benchmarks.problem import Problem
from benchmarks.solves import OURS, PYDVL, Setting
from benchmarks.table import PARTS
from benchmarks.targets import judged
from experiments.harness.record import replacing, to_json

DATA, STAND_IN = "mnist", "digits"
RESULTS, ELSEWHERE = Path("results/benchmarks"), Path("out/benchmarks")
RECORD, TABLE, CHECKPOINTS = "benchmarks.json", "README.md", "checkpoints"


@dataclass(frozen=True)
class Sizes:
    """The size of each measurement."""

    num_vectors: int = 50
    """Hessian products in one block, and test points scored together"""
    rounds: int = 7
    """rounds of every time except the solves'"""
    square: int = 4000
    """size of the matrices whose product gives the machine's rate"""
    num_tests: int = 10_000
    """test points whose scores on all rows are written to a file"""
    num_refits: int = 500
    """exact leave-one-out refits"""
    settings: tuple[Setting, ...] = (
        Setting(OURS, "cg", "float64", 1, 1),
        Setting(PYDVL, "one by one", "float64", 1, 1),
        Setting(OURS, "cg", "float64", 100, 100),
        Setting(OURS, "cg", "float32", 100, 100),
        Setting(OURS, "cg after EK-FAC", "float64", 100, 100),
        Setting(OURS, "direct", "float64", 100, 100),
        Setting(PYDVL, "block", "float64", 100, 100),
        Setting(PYDVL, "block", "float32", 100, 100),
        Setting(PYDVL, "one by one", "float64", 100, 100),
    )
    """ways to solve. pyDVL's default is one by one; `block` is its option solve_simultaneously,
    which its Nystroem preconditioner does not accelerate here. In float32 neither library reaches
    1e-5 for all points, with any tolerance"""
    lissa: tuple[int, int, int] = (8, 5000, 10)
    """the paper's test point, depth and repeats"""
    network: Network = Network()
    """the paper's network, trained for 20,000 steps instead of 500,000"""
    perceptron: Perceptron = Perceptron()
    """a network of 1.8 million weights"""
    peers: tuple[tuple[str, float], ...] = (("digits", 45), ("mnist", 45))
    """problems on which every solver of every peer runs, and the seconds allowed for a process"""
    peers_points: int = 10
    """test points of these problems"""


SMOKE = Sizes(
    num_vectors=5,
    rounds=2,
    square=200,
    num_tests=200,
    num_refits=20,
    settings=(
        Setting(OURS, "cg", "float64", 10, 10),
        Setting(PYDVL, "block", "float64", 10, 10),
    ),
    lissa=(8, 200, 2),
    network=Network(
        num_rows=100, point=0, filters=2, strides=(1, 2), schedule=((60, 1e-2),), damping=0.3
    ),
    perceptron=Perceptron(widths=(20, 20), num_rows=300, num_tests=10, rounds=1, audited=400),
    peers=(),
)
# The sizes for the stand-in, which has fewer and smaller images.
ON_STAND_IN = replace(Sizes(), network=SMOKE.network, perceptron=SMOKE.perceptron)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the words after `python -m benchmarks`; sys.argv's if omitted.
    Returns: the exit status: 0 if every target is met, 1 if a target is missed or not measured. On
      stand-in data no target is judged, and the status is 0. A wrong command line ends the program
      with status 2. If the results cannot be written, the status is 74.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Times within one part's run, as ratios, with the residual beside each.",
        allow_abbrev=False,
    )
    console.in_one_line(parser)
    add = parser.add_argument
    add(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(PARTS)}; default all. Some take their place among the results that are "
        "there, of the same machine and data",
    )
    add("--smoke", action="store_true", help="a few seconds, on the digits")
    add("--data-dir", type=Path, metavar="DIR", help="where to look for MNIST first")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"default {RESULTS}, or {ELSEWHERE} for what is not MNIST",
    )
    add(
        "--wait",
        type=float,
        default=3,
        metavar="MINUTES",
        help="how long to wait for a quiet machine, at most; default 3",
    )
    options = parser.parse_args(arguments)
    if options.data_dir is not None and not options.data_dir.is_dir():
        parser.error(f"--data-dir must be a folder, there is none at {options.data_dir}.")
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(unknown)}.")
    parts = tuple(part for part in PARTS if part in options.parts) or PARTS
    name = _data_name(options.smoke, options.data_dir)
    sizes = SMOKE if options.smoke else Sizes() if name == DATA else ON_STAND_IN
    out = options.out or (RESULTS if name == DATA else ELSEWHERE)
    p = _loaded(name, options.data_dir)
    about = _about(p)
    there = {} if parts == PARTS else _there(out / RECORD)
    differs = [key for key in about if there and _comparable(there[key]) != _comparable(about[key])]
    if differs:
        parser.error(
            f"PART can be added only to results of the same machine and data, {out / RECORD} has "
            f"another {' and '.join(differs)}; name no part, to run all, or give another --out."
        )
    wait = 0 if options.smoke else options.wait
    result = run(p, options.data_dir, sizes, wait, parts=parts, checkpoints=out / CHECKPOINTS)
    result = merged(there, result)
    out.mkdir(parents=True, exist_ok=True)
    for file, text in ((RECORD, to_json(result)), (TABLE, table.page(result))):
        with replacing(out / file) as partial:
            partial.write_text(text, encoding="utf-8")
    print(table.targets(result))
    print(f"\nwritten to {out}/{RECORD} and {out}/{TABLE}")
    return 1 if any(target["holds"] is False for target in result["targets"]) else 0


def run(
    p: Problem,
    data_dir: Path | None,
    sizes: Sizes,
    wait: float,
    *,
    parts: Sequence[str] = PARTS,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Run some or all parts. Return the contents of the JSON file without the targets.

    Args:
      p: the problem.
      data_dir: the folder to search first for the data of other problems.
      sizes: the size of each measurement.
      wait: the longest time to wait for a quiet machine, minutes.
      parts: some of PARTS.
      checkpoints: a folder for the checkpoints of the network, or None to store none.
    """
    about, before = _about(p), machine.wait_until_quiet(wait)
    tasks = {
        "products": lambda: products.run(
            p, num_vectors=sizes.num_vectors, rounds=sizes.rounds, square=sizes.square
        ),
        "scores": lambda: scores.run(p, _any_s_test(p, sizes.num_vectors), rounds=sizes.rounds),
        "all-scores": lambda: all_scores.run(p, num_tests=sizes.num_tests, square=sizes.square),
        "refits": lambda: refits.run(p, num_refits=sizes.num_refits),
        "solves": lambda: solves.run(p, sizes.settings),
        "lissa": lambda: lissa.run(
            p, point=sizes.lissa[0], depth=sizes.lissa[1], repeats=sizes.lissa[2]
        ),
        "cnn": lambda: cnn.run(p, sizes.network, checkpoints=checkpoints),
        "networks": lambda: networks.run(p, sizes.perceptron),
        "peers": lambda: _peers(p, data_dir, sizes),
    }
    result: dict[str, Any] = dict(about)
    for part in parts:
        print(f"{part} ...", flush=True)
        with watched() as seen:
            result[part] = tasks[part]()
        run_of = {"commit": about["machine"]["commit"], "quiet": before["quiet"]}
        result[part] |= {"watched": seen, "run": run_of}
    # The page must be the same if a later run reads these results from the JSON file. We therefore
    # convert them to JSON and back.
    return json.loads(to_json(result))


def merged(there: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """Merge new parts into earlier results, and compare the merged results with the targets.

    Args:
      there: earlier results, or an empty dict.
      result: the result of `run`.
    Returns: the contents of the JSON file.
    """
    whole = there | result
    return whole | {"targets": judged(whole)}


def _loaded(name: str, data_dir: Path | None) -> Problem:
    print(f"fitting the logistic regression on {name} ...", flush=True)
    return problem.load(name, data_dir)


def _about(p: Problem) -> dict[str, Any]:
    """Collect the facts about the machine and the data."""
    return {
        "machine": machine.facts(),
        "data": {"name": p.name, "stand_in": p.stand_in, "sha256": p.sha256},
        "shape": dict(zip(("n", "f", "c"), p.shape, strict=True)),
    }


def _there(record: Path) -> dict[str, Any]:
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def _comparable(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts without the commit, which may differ between the parts."""
    return json.loads(to_json({key: value for key, value in facts.items() if key != "commit"}))


def _peers(p: Problem, data_dir: Path | None, sizes: Sizes) -> dict[str, Any]:
    """Run the solvers of all libraries on the given problem and on the stand-in."""
    found = []
    for name, patience in sizes.peers:
        if name in (p.name, STAND_IN):
            print(f" {name}", flush=True)
            at_hand = p if name == p.name else problem.load(name, data_dir)
            found.append(peers.run(at_hand, points=sizes.peers_points, patience=patience))
    return {"problems": found}


def _any_s_test(p: Problem, num_points: int) -> np.ndarray:
    """Return test gradients in place of s_test. The values do not change the time of the scores."""
    test = p.test["float64"].take(slice(0, num_points))
    return p.closed_form("float64").gradients(test.x, test.y).T


def _data_name(smoke: bool, data_dir: Path | None) -> str:
    import data

    if smoke:
        return STAND_IN
    if data.find(DATA, data_dir) is None:
        print(f"{DATA} is not found: running on {STAND_IN}, where no target is judged")
        return STAND_IN
    return DATA


if __name__ == "__main__":
    console.run(main)
