"""Solvers of (H + damping I) x = b, one algorithm a file."""

from influence.solvers.base import Prepared, Solution, Solver, prepare, solve
from influence.solvers.cg import CG
from influence.solvers.direct import Direct
from influence.solvers.lissa import LiSSA

__all__ = ["CG", "Direct", "LiSSA", "Prepared", "Solution", "Solver", "prepare", "solve"]
