"""Influence functions for Keras models: the effect of each training row on a test loss."""

import influence_console as console

if console.begin(__name__):
    console.import_tensorflow()

from influence.attack.poison import PoisonOptions, poison
from influence.attack.targets import BEST_RULE, PAPER_RULE, Rule
from influence.common.convergence import ConvergenceWarning, DivergenceError
from influence.curvature.operators import GaussNewton, Hessian
from influence.examples.examples import Examples
from influence.examples.given import class_weights
from influence.examples.stream import Stream
from influence.models.cnn import AllCNN
from influence.models.hinge import SmoothHinge
from influence.models.logistic import BinaryLogisticRegression, MulticlassLogisticRegression
from influence.models.top_layer import TopLayer
from influence.net import measurements
from influence.net.history import History
from influence.net.net import GenericNeuralNet
from influence.net.recorder import Recorder
from influence.preflight.check import check
from influence.scores.datainf import datainf
from influence.scores.influence import Influence, Scores
from influence.scores.out_of_sample import LeaveOneOutOutputs, leave_one_out_outputs
from influence.scores.tracin import tracin
from influence.solvers import (
    CG,
    EKFAC,
    Direct,
    Lanczos,
    LiSSA,
    Nystrom,
    Prepared,
    Solution,
    prepare,
    solve,
)
from influence.solvers.spectrum import spectrum, suggest_damping
from influence.tool.audit import Audit, audit
from influence.tool.correct import Correction, correct
from influence.tool.explain import Explanation, explain
from influence.tool.subject import QuestionOptions
from influence.tool.verify import Verification, verify
from influence.tool.verify_groups import GroupVerification, verify_groups
from influence.truth.continued import ContinuedOptions, continued_training
from influence.truth.leave_out import RefitOptions, Refits, leave_group_out, leave_one_out
from influence.truth.proximal import ProximalOptions, proximal_response
from influence.truth.runs import RunOptions

__all__ = ["Examples", "Stream", "class_weights", "GenericNeuralNet", "measurements", "check"]
__all__ += ["ConvergenceWarning", "DivergenceError", "History", "Recorder"]
__all__ += ["AllCNN", "BinaryLogisticRegression", "MulticlassLogisticRegression", "SmoothHinge"]
__all__ += ["TopLayer", "GaussNewton", "Hessian", "spectrum", "suggest_damping"]
__all__ += ["CG", "Direct", "EKFAC", "Lanczos", "LiSSA", "Nystrom"]
__all__ += ["Prepared", "Solution", "prepare", "solve"]
__all__ += ["Influence", "Scores", "datainf", "tracin"]
__all__ += ["LeaveOneOutOutputs", "leave_one_out_outputs"]
__all__ += ["Refits", "RefitOptions", "RunOptions", "leave_group_out", "leave_one_out"]
__all__ += ["ContinuedOptions", "ProximalOptions", "continued_training", "proximal_response"]
__all__ += ["Audit", "Correction", "Explanation", "QuestionOptions", "Verification"]
__all__ += ["GroupVerification", "audit", "correct", "explain", "verify", "verify_groups"]
__all__ += ["BEST_RULE", "PAPER_RULE", "PoisonOptions", "Rule", "poison"]
