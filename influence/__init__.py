"""Influence functions for any Keras model: which training rows made it say this."""

from influence.convergence import ConvergenceWarning, DivergenceError
from influence.examples import Examples
from influence.models.hinge import SmoothHinge
from influence.models.logistic import BinaryLogisticRegression, MulticlassLogisticRegression
from influence.net import GenericNeuralNet
from influence.operators import GaussNewton, Hessian
from influence.retraining import Refits, leave_one_out
from influence.scores import Influence, Scores
from influence.solvers import CG, Direct, LiSSA, Solution, prepare, solve

__all__ = [
    "CG",
    "BinaryLogisticRegression",
    "ConvergenceWarning",
    "Direct",
    "DivergenceError",
    "Examples",
    "GaussNewton",
    "GenericNeuralNet",
    "Hessian",
    "Influence",
    "LiSSA",
    "MulticlassLogisticRegression",
    "Refits",
    "Scores",
    "SmoothHinge",
    "Solution",
    "leave_one_out",
    "prepare",
    "solve",
]
