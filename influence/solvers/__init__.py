"""Solvers of (H + damping I) x = b, one algorithm per file."""

from influence.solvers.base import Prepared, Solution, Solver, prepare, solve
from influence.solvers.cg import CG
from influence.solvers.direct import Direct
from influence.solvers.ekfac import EKFAC
from influence.solvers.lanczos import Lanczos
from influence.solvers.lissa import LiSSA
from influence.solvers.nystrom import Nystrom

__all__ = ["CG", "Direct", "EKFAC", "Lanczos", "LiSSA", "Nystrom"]
__all__ += ["Prepared", "Solution", "Solver", "prepare", "solve"]
