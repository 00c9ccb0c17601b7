"""Tests that every public function refuses array arguments that are not real numbers."""

import keras
import numpy as np
import pytest
import scipy.sparse

from experiments.shared import compare
from influence import (
    CG,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    PoisonOptions,
    ProximalOptions,
    RefitOptions,
    TopLayer,
    continued_training,
    datainf,
    leave_group_out,
    leave_one_out,
    measurements,
    poison,
    prepare,
    proximal_response,
    solve,
    spectrum,
    suggest_damping,
    tracin,
)
from influence.attack.poison import gradient_norms
from influence.minimisers import block_lbfgs, box_qp, lbfgs
from influence.models.top_layer import scaled
from tests.influence.problems import logistic, through_keras

# The problem has 12 rows of 5 features and one output: theta has 5 entries.
P = logistic("sigmoid", num_rows=12)
NETS = {"closed form": P.net, "Keras": through_keras(P).net}
TRAIN, TEST = P.train, P.test
X, Y = TRAIN.x, TRAIN.y
INFLUENCE = Influence(P.net, TRAIN, solver=CG())
HEAD = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(5, 3)])
EYE, ONES, ROWS = np.eye(5), np.ones(5), np.arange(3)

WRONG = {
    "masked": lambda a: np.ma.masked_array(a, np.arange(a.size).reshape(a.shape) == 0),
    "complex": lambda a: a.astype(complex) * 1j,
    "object": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 0, None, a.astype(object)),
    "string": lambda a: a.astype(str),
    "datetime": lambda a: a.astype(np.int64).astype("datetime64[D]"),
}


def _theta(net, theta):
    net.theta = theta


# Each entry is a pair: a valid value, and a dictionary. Its keys are "argument of function". Its
# values are functions that pass their only parameter as this argument.
BY_VALUE = (
    (
        X,
        {
            "x of Examples": lambda a: Examples(a, Y),
            "x of Design.times": lambda a: P.net.design.times(a, ONES),
        },
    ),
    (
        Y,
        {
            "y of Examples": lambda a: Examples(X, a),
            "y of margin": lambda a: measurements.margin(a, np.ones((12, 1))),
        },
    ),
    (
        ROWS,
        {
            "rows of take": TRAIN.take,
            "rows of without": TRAIN.without,
            "rows of batches": lambda a: list(TRAIN.batches(2, a)),
            "rows of scores": lambda a: INFLUENCE.scores(TEST, a),
            "rows of group": lambda a: INFLUENCE.group(TEST, a),
            "rows of relative": lambda a: INFLUENCE.relative(TEST, a),
            "rows of write_scores": lambda a: INFLUENCE.write_scores("never.h5", TEST, a),
            "rows of perturbation": lambda a: INFLUENCE.perturbation(TEST, a),
            "rows of self_influence": INFLUENCE.self_influence,
            "rows of parameters": INFLUENCE.parameters,
            "rows of tracin": lambda a: tracin(
                P.net, TRAIN, TEST, a, thetas=[ONES], learning_rates=[1.0]
            ),
            "rows of datainf": lambda a: datainf(P.net, TRAIN, TEST, a, damping=1.0),
            "rows of leave_one_out": lambda a: leave_one_out(P.net, TRAIN, TEST, a),
            "groups[0] of leave_group_out": lambda a: leave_group_out(P.net, TRAIN, TEST, [a]),
            "groups['a'] of leave_group_out": lambda a: leave_group_out(
                P.net, TRAIN, TEST, {"a": a}
            ),
            "rows of continued_training": lambda a: continued_training(
                P.net, TRAIN, TEST, a, steps=1, rate=0.1
            ),
            "rows of proximal_response": lambda a: proximal_response(
                P.net, TRAIN, TEST, a, damping=1.0
            ),
            "rows of poison": lambda a: poison(P.net, TRAIN, TEST, a, 1.0),
            "rows of gradient_norms": lambda a: gradient_norms(P.net, TRAIN, TEST, a),
            "rows of leverages": lambda a: P.net.leverages(TRAIN, a),
            "rows of one_step_leave_one_out": lambda a: P.net.one_step_leave_one_out(TRAIN, a),
            "among of with_others": lambda a: compare.with_others(0, a, 1, 0),
        },
    ),
    (
        EYE,
        {
            "A of solve": lambda a: solve(a, ONES, CG()),
            "A of prepare": lambda a: prepare(a, CG()),
            "A of spectrum": spectrum,
            "A of suggest_damping": suggest_damping,
            "B of Prepared": prepare(EYE, CG()),
            "gradients of score_error_bound": solve(EYE, ONES, CG()).score_error_bound,
            "preconditioner of CG": lambda a: CG(preconditioner=a),
            "V of GaussNewton.matmat": GaussNewton(P.net, TRAIN).matmat,
            "thetas of tracin": lambda a: tracin(P.net, TRAIN, TEST, thetas=a, learning_rates=ONES),
            "V of Design.along": lambda a: P.net.design.along(X, np.ones((12, 1)), a),
            "G of boxed_minimum": lambda a: box_qp.boxed_minimum(a, ONES, ONES),
        },
    ),
    (
        ONES,
        {
            "B of solve": lambda a: solve(EYE, a, CG()),
            "V of Hessian @": lambda a: Hessian(P.net, TRAIN) @ a,
            "V of Hessian.matvec": Hessian(P.net, TRAIN).matvec,
            "learning_rates of tracin": lambda a: tracin(
                P.net, TRAIN, TEST, thetas=EYE, learning_rates=a
            ),
            "damping of datainf": lambda a: datainf(P.net, TRAIN, TEST, damping=a),
            "start of RefitOptions": lambda a: RefitOptions(start=a),
            "mean of TopLayer": lambda a: TopLayer(HEAD, mean=a),
            "scale of TopLayer": lambda a: TopLayer(HEAD, scale=a),
            "thetas of Design.times": lambda a: P.net.design.times(X, a),
            "b of boxed_minimum": lambda a: box_qp.boxed_minimum(EYE, a, ONES),
            "start of boxed_minimum": lambda a: box_qp.boxed_minimum(EYE, ONES, a),
            "theta of lbfgs": lambda a: lbfgs.minimise(lambda t: (t @ t, 2 * t), a, 1.0, 1),
            "predicted of agreement": lambda a: compare.agreement(a, ONES),
            "actual of agreement": lambda a: compare.agreement(ONES, a),
            "scores of largest": lambda a: compare.largest(a, 1),
            "values of largest_bars": lambda a: compare.largest_bars(None, ONES, a),
            "actual of predicted_against_actual": lambda a: compare.predicted_against_actual(
                None, a, ONES
            ),
            "predicted of predicted_against_actual": lambda a: compare.predicted_against_actual(
                None, ONES, a
            ),
        },
    ),
    (
        np.ones((1, 5, 2)),
        {"V of sampled": lambda a: Hessian(P.net, TRAIN).sampled(np.zeros((1, 1), int), a)},
    ),
    (
        np.ones(3),
        {
            "tolerance of proximal_response": lambda a: proximal_response(
                P.net, TRAIN, TEST, ROWS, ProximalOptions(tolerance=a), damping=1.0
            ),
            "rough_tolerance of proximal_response": lambda a: proximal_response(
                P.net, TRAIN, TEST, ROWS, ProximalOptions(rough_tolerance=a), damping=1.0
            ),
        },
    ),
    (
        X[ROWS],
        {
            "inputs of poison": lambda a: poison(
                P.net, TRAIN, TEST, ROWS, 1.0, options=PoisonOptions(inputs=a)
            ),
            "inputs of gradient_norms": lambda a: gradient_norms(
                P.net, TRAIN, TEST, ROWS, inputs=a
            ),
        },
    ),
    (np.ones((1, 2, 2, 3)), {"images of scaled": scaled}),
    (np.eye(12), {"gram of leverages": lambda a: P.net.leverages(TRAIN, gram=a)}),
    (
        np.ones((12, 1, 1)),
        {"E of Design.transposed_times": lambda a: P.net.design.transposed_times(X, a)},
    ),
    (
        np.ones((12, 1)),
        {
            "E of Design.along": lambda a: P.net.design.along(X, a, EYE),
            "weights of Design.weighted_gram": lambda a: P.net.design.weighted_gram(X, a),
            "output of margin": lambda a: measurements.margin(Y, a),
            "output of logit": lambda a: measurements.logit(1)(Y, a),
        },
    ),
)
CASES = {case: (right, call) for right, calls in BY_VALUE for case, call in calls.items()}
for name, right in (("thetas", EYE), ("first", EYE), ("tolerance", ONES), ("longest", ONES)):
    CASES[f"{name} of block_lbfgs"] = (
        right,
        lambda a, name=name: block_lbfgs.minimise(
            lambda T, _: T,
            lambda G, _: G,
            max_passes=1,
            **({"thetas": EYE, "first": EYE, "tolerance": ONES, "longest": ONES} | {name: a}),
        ),
    )
for kind, net in NETS.items():
    CASES |= {
        f"theta of a net, {kind}": (ONES, lambda a, net=net: _theta(net, a)),
        f"theta of at, {kind}": (ONES, net.at),
        f"x of losses, {kind}": (X, lambda a, net=net: net.losses(a, Y)),
        f"y of losses, {kind}": (Y, lambda a, net=net: net.losses(X, a)),
        f"x of outputs, {kind}": (X, net.outputs),
        f"V of penalty_hvp, {kind}": (EYE, net.penalty_hvp),
        f"thetas of risk_gradient, {kind}": (EYE, lambda a, net=net: net.risk_gradient(TRAIN, a)),
        f"V of each_batch, {kind}": (
            np.ones((1, 5, 2)),
            lambda a, net=net: net.each_batch("hvp", X[None], Y[None], a),
        ),
    }
    for method, argument in (
        ("losses", "thetas"),
        ("gradient", "thetas"),
        ("bregman_gradient", "thetas"),
        ("hvp", "V"),
        ("gauss_newton_product", "V"),
        ("directional", "V"),
        ("curvatures", "v"),
        ("curvature_gradient", "v"),
        ("input_gradient", "v"),
    ):
        CASES[f"{argument} of {method}, {kind}"] = (
            ONES if argument == "v" else EYE,
            lambda a, net=net, method=method: getattr(net, method)(X, Y, a),
        )


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("case", CASES)
def test_what_is_not_an_array_of_numbers_is_refused_by_name(case, kind):
    if (case, kind) == ("x of Examples", "string"):
        pytest.skip("Examples hold strings for lookup layers")
    right, call = CASES[case]
    name = case.split(" of ")[0]
    with pytest.raises(TypeError) as raised:
        call(WRONG[kind](np.asarray(right)))
    message = str(raised.value)
    # LinearModel checks `thetas`, `V` and `v` by the same code. For each of them, its message may
    # begin with "V" or "v".
    names = (name, "V", "v") if name in ("thetas", "V", "v") else (name,)
    assert message.startswith(tuple(f"{n} must be " for n in names)) and "\n" not in message
    got = {"masked": "masked", "object": "dtype object", "string": "dtype <U"}.get(kind, kind)
    assert got in message


def test_the_numbers_of_a_sparse_matrix_are_looked_at():
    wrong = scipy.sparse.csr_matrix(EYE * 1j)
    for name, call in (
        ("A", lambda: solve(wrong, ONES, CG())),
        ("preconditioner", lambda: CG(preconditioner=wrong)),
        ("x", lambda: P.net.design.times(wrong, ONES)),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be an array of numbers, got dtype c"):
            call()
