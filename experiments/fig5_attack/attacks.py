"""The attacks of Figure 5 on one test image, and on a group of test images together."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.fig5_attack.heads import FLIPPED, LEVEL, Head
from influence import Examples, Influence
from influence.attack.poison import Poisoning, gradient_norms, mean_s_test
from influence.attack.targets import Rule
from influence.models.top_layer import scaled

RULES = ("paper", "best")
# The scores that a defender may use to search for poisoned training images.
SIGNS = ("self_influence", "loss", "distance")
# The notebook of the authors' 2017 code projects features on this many principal components.
_COMPONENTS = 700


def ranked(head: Head, test: Examples, count: int) -> tuple[NDArray[np.int64], NDArray]:
    """Rank training images as the paper does, by the L1 norm of a derivative.

    A training image has an influence on the mean test loss. The paper ranks by the derivative of
    this influence with respect to the image's pixels. We compute this derivative for `count` images
    only: those whose derivative with respect to the features has the largest Euclidean norm.

    Args:
      head: the head under attack.
      test: the test images.
      count: number of training images to rank.

    Returns: the row numbers (count,) and their L1 norms (count,), the largest norm first.
    """
    s = mean_s_test(head.net, head.train, test)
    cotangents = np.linalg.norm(head.net.input_gradient(head.train.x, head.train.y, s), axis=1)
    rows = np.argsort(-cotangents, kind="stable")[:count]
    norms = gradient_norms(head.net, head.train, test, rows, inputs=scaled(head.images[rows]))
    order = np.argsort(-norms, kind="stable")
    return rows[order], norms[order]


def single(
    head: Head, point: int, *, counts: tuple[int, ...], candidates: int, paper: Rule, best: Rule
) -> dict[str, Any]:
    """Attack one test image by both rules, with more and more poisons until it is flipped.

    A poison is a changed training image. A test image is flipped if the refitted head misclassifies
    it. The paper's rule makes several attempts, and each begins with clean images. The first
    attempt poisons the training image of rank 1, the second the image of rank 2. The next attempts
    poison the first counts[1], counts[2], ... images together.

    Args:
      head: the head under attack.
      point: the row of the test image.
      counts: numbers of poisons, increasing from one.
      candidates: the number of training images whose derivative with respect to the pixels is
        computed.
      paper: the rule of the authors' code.
      best: our own rule.

    Returns: a dict of arrays. Entry i of `paper_flipped` and of `best_flipped` is True if counts[i]
      poisons or fewer flipped the image. A cold refit (see `Poisoning`) decides this. `standing`
      (counts[-1], len(SIGNS), 2) is the result of the function `standing` for the best rule, padded
      with NaN.
    """
    test = head.test.take([point])
    rows, norms = ranked(head, test, candidates)
    found: list[Poisoning] = []
    for chosen in (rows[:1], rows[1:2], *(rows[:count] for count in counts[1:])):
        found.append(head.attacked(test, chosen, rule=paper))
        if found[-1].flipped.all():
            break
    strong = head.attacked(test, rows, rule=best, counts=counts, gradient_norms=norms)
    where = np.full((counts[-1], len(SIGNS), 2), np.nan)
    where[: len(strong.rows)] = standing(head, strong)
    every = (*found, strong)
    return {
        "paper_flipped": _flipped(found[-1], counts),
        "best_flipped": _flipped(strong, counts),
        "paper_change": found[-1].change_if_poisoned[0],
        "best_change": strong.change_if_poisoned[0],
        "clean_loss": strong.test_losses[0, 0],
        "gradient_norm": max(one.gradient_norm for one in every),
        "same_bytes": all(_same(one) for one in every),
        # True if the last warm refit and the cold refit of every attack agree on the flip.
        "confirmed": all(
            bool((one.test_losses[-1] > FLIPPED).all() == one.flipped.all()) for one in every
        ),
        "standing": where,
    }


def _flipped(found: Poisoning, counts: tuple[int, ...]) -> NDArray[np.bool_]:
    return (
        np.array(counts) >= len(found.rows) if found.flipped.all() else np.zeros(len(counts), bool)
    )


def _same(found: Poisoning) -> bool:
    return found.same_bytes is not None and bool(found.same_bytes.all())


def standing(head: Head, found: Poisoning) -> NDArray:
    """Compute how many training images a defender checks before each poison.

    The defender checks the training images in decreasing order of a score: self-influence, loss, or
    distance from the mean features of the class.

    Returns: (k, len(SIGNS), 2) shares of the training images that are checked before a poison. The
      axes are the k poisons, the scores of SIGNS, and the data before and after the attack.
    """
    net, clean = head.net, head.net.theta
    means = np.stack([head.train.x[head.train.y == c].mean(axis=0) for c in (0, 1)])
    shares = np.empty((len(found.rows), len(SIGNS), 2))
    states = ((head.train, clean), (head.poisoned(found), found.theta))
    try:
        for j, (train, theta) in enumerate(states):
            net.theta = theta
            scores = (
                Influence(net, train, approximation="first_order").self_influence(),
                net.losses(train.x, train.y),
                np.linalg.norm(train.x - means[train.y], axis=1),
            )
            for i, score in enumerate(scores):
                rank = np.argsort(np.argsort(-score, kind="stable"), kind="stable")
                shares[:, i, j] = rank[found.rows] / len(score)
    finally:
        net.theta = clean
    return shares


def group(
    head: Head,
    points: NDArray,
    *,
    counts: tuple[int, ...],
    candidates: int,
    one: Rule,
    many: Rule,
) -> dict[str, Any]:
    """Attack a group of test images of one class, by two separate attacks.

    The first attack has one poison: the training image of the other class with the largest loss.
    The second attack adds poisons until half of the test images are flipped.

    Args:
      head: the head under attack.
      points: rows of the test images.
      counts: numbers of poisons of the second attack, increasing.
      candidates: the number of training images among which the second attack chooses its poisons.
      one: the rule of the first attack. A flip does not end this attack.
      many: the rule of the second attack.

    Returns: a dict of arrays and numbers. Names with `one_` are results of the first attack, names
      with `many_` of the second. `one_input` is the poisoned image of the first attack. The dict
      also contains the results of `geometry` for the first attack.
    """
    test, train = head.test.take(points), head.train
    losses = head.net.losses(train.x, train.y)
    alone = lone(head, points, one)
    (row,) = alone.rows
    rows, norms = ranked(head, test, candidates)
    half = -(-len(points) // 2)
    most = head.attacked(test, rows, rule=many, counts=counts, flips=half, gradient_norms=norms)
    flipped = alone.test_losses[0] + alone.change_if_poisoned > FLIPPED
    return {
        "one_row": row,
        "one_input": alone.inputs[0],
        "one_rank_in_loss": np.sum(losses > losses[row]),
        "one_flipped": np.sum(flipped),
        "one_losses": alone.test_losses.mean(axis=1),
        "one_train_accuracy": head.accuracy(head.poisoned(alone), alone.theta),
        "one_standing": standing(head, alone)[0],
        "many_poisons": most.num_poisons,
        "many_losses": most.test_losses.mean(axis=1),
        "many_flipped": np.sum(most.test_losses > FLIPPED, axis=1),
        "many_flipped_cold": np.sum(most.flipped),
        "size": len(points),
        "refits_gradient_norm": max(alone.gradient_norm, most.gradient_norm),
        "all_same_bytes": _same(alone) and _same(most),
        "all_confirmed": bool(
            np.sum(most.test_losses[-1] > FLIPPED) == np.sum(most.flipped)
            and np.array_equal(alone.test_losses[-1] > FLIPPED, flipped)
        ),
    } | geometry(head, alone)


def lone(head: Head, points: NDArray, rule: Rule) -> Poisoning:
    """Attack test images of one class with a single poison: the first attack of `group`."""
    train, test = head.train, head.test.take(points)
    others = np.flatnonzero(train.y != test.y[0])
    row = others[np.argmax(head.net.losses(train.x, train.y)[others])]
    return head.attacked(test, np.array([row]), rule=rule, flip_at=np.inf)


def geometry(head: Head, found: Poisoning) -> dict[str, Any]:
    """Measure how far the attack moved its first poison, in pixels and in features.

    The notebook of the authors' code measures the same distances.
    """
    row, train = found.rows[0], head.train
    moved = (found.inputs[0] - scaled(head.images[row])).astype(np.float64)
    before, after = train.x[row], found.features[0]
    own = train.x[train.y == train.y[row]]
    to_own, to_other = own.mean(axis=0), train.x[train.y != train.y[row]].mean(axis=0)
    basis = np.linalg.svd(train.x - train.x.mean(axis=0), full_matrices=False)[2][:_COMPONENTS]
    shift = after - before
    # With at most `_COMPONENTS` features, the components span the whole feature space. The shift
    # outside their span would be only rounding error, so both norms are then NaN.
    inside = basis @ shift if train.x.shape[1] > _COMPONENTS else np.full(1, np.nan)
    return {
        "levels_moved": np.abs(moved).max() / LEVEL,
        "pixels_moved": np.linalg.norm(moved),
        "features_moved": np.linalg.norm(shift),
        "mean_to_own": np.linalg.norm(own - to_own, axis=1).mean(),
        "to_own_before": np.linalg.norm(before - to_own),
        "to_own_after": np.linalg.norm(after - to_own),
        "to_other_before": np.linalg.norm(before - to_other),
        "to_other_after": np.linalg.norm(after - to_other),
        "moved_in_components": np.linalg.norm(inside),
        "moved_outside_components": np.sqrt(np.maximum(shift @ shift - inside @ inside, 0.0)),
    }


def of_group(found: dict[str, NDArray], network: str) -> dict[str, float]:
    """Return the metrics of a group attack on one head. `found` is the result of `group`."""
    half = np.flatnonzero(found["many_flipped"] == found["many_flipped"].max())[0]
    scalars = {key: float(value) for key, value in found.items() if not np.ndim(value)}
    return {f"group_{key}_{network}": value for key, value in scalars.items()} | {
        f"group_one_loss_before_{network}": found["one_losses"][0],
        f"group_one_loss_after_{network}": found["one_losses"][-1],
        f"group_most_flipped_{network}": found["many_flipped"][half],
        f"group_poisons_for_most_{network}": found["many_poisons"][half],
    }


def over_all(
    counts: tuple[int, ...],
    networks: list[str],
    every: list[dict[str, NDArray]],
    groups: list[dict[str, NDArray]],
) -> dict[str, float]:
    """Compute the metrics that combine the attacks on all heads.

    Args:
      counts: the argument `counts` of `single`.
      networks: the name of each head's network.
      every: the results of `single` for each head, stacked over the test images.
      groups: the result of `group` for each head.
    """
    flipped = {rule: np.concatenate([one[f"{rule}_flipped"] for one in every]) for rule in RULES}
    ranks = np.concatenate([one["standing"].reshape(-1, len(SIGNS), 2) for one in every])
    ranks = ranks[~np.isnan(ranks[:, 0, 0])]
    confirmed = [one["confirmed"] for one in every] + [one["all_confirmed"] for one in groups]
    same = [one["same_bytes"] for one in every] + [one["all_same_bytes"] for one in groups]
    norms = [one["gradient_norm"] for one in every] + [
        one["refits_gradient_norm"] for one in groups
    ]
    metrics = {
        "group_half_flipped": min(2 * one["many_flipped_cold"] >= one["size"] for one in groups),
        "confirmed_by_cold_refit": np.mean(np.hstack(confirmed)),
        "byte_equal": np.mean(np.hstack(same)),
        "worst_gradient_norm": np.max(np.hstack(norms)),
    }
    if 2 in counts:
        two = [
            [one[f"{rule}_flipped"][:, counts.index(2)].sum() for rule in RULES] for one in every
        ]
        for name, (paper, best) in zip(("", *networks), (np.sum(two, axis=0), *two), strict=True):
            end = f"_{name}" if name else ""  # "" means all heads together
            metrics[f"times_as_many_by_best_rule_with_2{end}"] = best / max(paper, 1)
    if 10 in counts:
        shares = flipped["paper"].mean(axis=0)
        metrics["gain_from_1_to_10_by_papers_rule"] = shares[counts.index(10)] - shares[0]
    for i, sign in enumerate(SIGNS):
        for j, when in enumerate(("before", "after")):
            metrics[f"median_poison_at_by_{sign}_{when}"] = np.median(ranks[:, i, j])
    return metrics
