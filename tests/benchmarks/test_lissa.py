import numpy as np
import pytest

from benchmarks import lissa, table
from influence import Hessian, LiSSA, solve


def test_the_papers_setting_is_run_to_its_end(digits):
    part = lissa.run(digits, point=8, depth=300, repeats=3)
    net, train = digits.closed_form("float64"), digits.train["float64"]
    test = digits.test["float64"].take([8])
    b = net.gradients(test.x, test.y)[0]
    H = Hessian(net, train)
    expected = solve(H, b, LiSSA(25.0, 300, 3, 1, change=0.0, rtol=None))
    assert part["residual"] == pytest.approx(expected.residual[0], rel=1e-12)
    G = net.gradients(train.x, train.y) + net.penalty_gradient()
    exact = G @ np.linalg.solve(H.dense(), b)
    assert part["pearson"] == pytest.approx(np.corrcoef(G @ expected.x, exact)[0, 1], abs=1e-9)
    assert part["seconds"] > 0
    text = table._lissa({"lissa": part})
    assert text.startswith("Scale 25, depth 300, 3 repeats, batches of 1 row, test point 8: ")
