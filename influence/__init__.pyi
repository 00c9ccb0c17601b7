"""The public names of the library, and where they are. `__init__.py` imports them on first use."""

from .attack.poison import PoisonOptions, poison
from .attack.targets import BEST_RULE, PAPER_RULE, Rule
from .common.convergence import ConvergenceWarning, DivergenceError
from .curvature.operators import GaussNewton, Hessian
from .examples.examples import Examples
from .examples.given import class_weights
from .examples.stream import Stream
from .models.cnn import AllCNN
from .models.hinge import SmoothHinge
from .models.logistic import BinaryLogisticRegression, MulticlassLogisticRegression
from .models.top_layer import TopLayer
from .net import measurements
from .net.history import History
from .net.net import GenericNeuralNet
from .net.recorder import Recorder
from .preflight.check import check
from .scores.datainf import datainf
from .scores.influence import Influence, Scores
from .scores.out_of_sample import LeaveOneOutOutputs, leave_one_out_outputs
from .scores.tracin import tracin
from .solvers import (
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
from .solvers.spectrum import spectrum, suggest_damping
from .tool.audit import Audit, audit
from .tool.correct import Correction, correct
from .tool.explain import Explanation, explain
from .tool.subject import QuestionOptions
from .tool.verify import Verification, verify
from .tool.verify_groups import GroupVerification, verify_groups
from .truth.continued import ContinuedOptions, continued_training
from .truth.leave_out import RefitOptions, Refits, leave_group_out, leave_one_out
from .truth.proximal import ProximalOptions, proximal_response
from .truth.runs import RunOptions

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
