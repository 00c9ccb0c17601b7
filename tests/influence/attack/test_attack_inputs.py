"""What an attack does to the inputs of a network, and to images made of bytes."""

import numpy as np
import pytest

from influence import Examples
from influence.attack.poison import PAPER_RULE, Rule, poison
from tests.influence.attack import attacked
from tests.influence.attack.attacked import RADIUS, replaced


def test_a_network():
    net, train, test = attacked.network()
    test = test.take([0])
    options = {"fit": attacked.tight, "flip_at": np.inf, "rule": Rule(tries=0, max_steps=1)}
    found = poison(net, train, test, [2, 9], 0.1, counts=[1], **options)
    before = net.losses(test.x, test.y)
    attacked.tight(net, replaced(train, found.rows, found.inputs))
    np.testing.assert_allclose(
        found.change_if_poisoned, net.losses(test.x, test.y) - before, rtol=1e-6
    )
    assert found.change_if_poisoned[0] > 0


@pytest.mark.parametrize(("levels", "same"), [(0.49, True), (0.6, False), (3.0, False)])
def test_bytes(levels, same):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 5))
    pixels[:, 0], pixels[:, 1] = 0, 255  # bounds cut these cells
    train = Examples((pixels / 127.5 - 1).astype(np.float32), (pixels[:, 2] > 127).astype(int))
    net = attacked.BinaryLogisticRegression(5, weight_decay=0.1)
    net.fit(train)
    found = poison(
        net, train, train.take([0]), [4, 6], levels / 127.5, bounds=(-1, 1),
        flip_at=np.inf, rule=PAPER_RULE,
    )  # fmt: skip
    assert found.inputs.dtype == np.float32
    assert found.same_bytes is not None and found.same_bytes.tolist() == [same, same]
    again = np.rint(255 * (found.inputs.astype(float) + 1) / 2)
    assert (again == pixels[found.rows]).all() == same
    assert found.inputs.min() >= -1 and found.inputs.max() <= 1
    assert np.abs(127.5 * (found.inputs + 1) - pixels[found.rows]).max() == pytest.approx(
        levels, rel=1e-4
    )


def test_without_bounds_nothing_is_certified():
    net, train, test, _ = attacked.logistic()
    assert poison(net, train, test, [1], RADIUS, rule=Rule(max_steps=1, tries=0)).same_bytes is None
