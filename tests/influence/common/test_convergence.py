import warnings

import numpy as np
import pytest

import influence
from influence import CG, ConvergenceWarning, DivergenceError, Examples, Influence
from influence.common.convergence import warn_unconverged
from tests.influence.problems import ridge


def test_kinds():
    assert issubclass(ConvergenceWarning, UserWarning)
    assert issubclass(DivergenceError, ArithmeticError)
    assert influence.ConvergenceWarning is ConvergenceWarning


def test_outside_the_library_the_warning_names_its_own_caller():
    with pytest.warns(ConvergenceWarning, match="^residual 1e-3$") as caught:
        warn_unconverged("residual 1e-3")
    assert caught[0].filename == __file__


def test_from_deep_inside_the_warning_names_the_line_that_called_the_library():
    p = ridge(20)
    impatient = Influence(p.net, p.train, solver=CG(rtol=1e-12, max_iterations=1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        impatient.scores(p.test.take([0]))
        impatient.self_influence([0])
    lines = [w.lineno for w in caught if w.category is ConvergenceWarning]
    assert {w.filename for w in caught} == {__file__}
    assert len(lines) == 2 and lines[1] == lines[0] + 1  # each warning names the line of its call


def test_a_user_may_turn_it_into_an_error():
    p = ridge(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        with pytest.raises(ConvergenceWarning, match="L-BFGS stopped at a gradient norm of"):
            p.net.theta = np.zeros(5)
            p.net.fit(Examples(p.train.x, p.train.y), max_iterations=1)
