"""Loss of a whole model as Keras compiles it: several outputs, loss weights and added losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from influence.examples.labels import labels
from influence.net.heads import Ending
from influence.net.losses import PerExampleLoss, per_example

# Entry of `SeveralLosses.paths` for the output of a model that returns one tensor.
_ONLY = None


def model_loss(loss: Any, model: keras.Model, end: Ending) -> PerExampleLoss:
    """Return the per-example loss of a model: the given `loss`, or the compiled loss if it is None.

    A row's loss is sum_o weight_o loss_o over the model's outputs o, plus the losses that the model
    adds for this row by `add_loss`. The weights are the `loss_weights` of `compile`.

    Args:
      loss: a Keras loss, its name, or a callable (y, output) -> (n,). For a model with several
        outputs, a list or dict of these. None means the compiled loss with its loss weights.
      model: the model.
      end: facts about the model's outputs, from `heads.ending`.

    Raises: the errors of `per_example`. ValueError for losses or weights that do not fit the
      model's outputs, or for a compiled model that overrides `compute_loss`.
    """
    weights = None
    as_compiled = loss is None
    if as_compiled:
        if type(model).compute_loss is not keras.Model.compute_loss:
            raise ValueError(
                "loss must be given for a model that overrides compute_loss, got None; pass a "
                "callable loss=(y, output) -> (n,) that gives each row's share."
            )
        weights = getattr(getattr(model, "_compile_loss", None), "_user_loss_weights", None)
    if end.names is None:
        found = per_example(loss, model, ends_in=end.heads[0]).scaled(_one_weight(weights))
        found = replace(found, compiled=as_compiled)
        if end.masks and (end.adds_losses or not found.by_position):
            what = "add_loss" if end.adds_losses else repr(found.name)
            raise ValueError(
                f"model must not mask its output, got a mask from {model.name!r} with {what}: "
                "Keras divides such a loss by the number of valid positions. The library can do so "
                "for a Keras loss or a compiled function, with one number for each position and "
                "reduction='sum_over_batch_size'; use such a loss, or end in a layer that consumes "
                "the mask, such as pooling."
            )
        if end.adds_losses:
            return SeveralLosses.of([found], (_ONLY,), True)
        return replace(found, masked=end.masks)
    if end.masks:
        raise ValueError(
            f"model must not mask its outputs if there are several, got a mask from {model.name!r} "
            f"with the outputs {list(end.names)}: Keras divides the loss of each output by its own "
            "number of valid positions; end in layers that consume the mask, such as pooling."
        )
    if as_compiled:
        loss = getattr(model, "loss", None)
        if loss is None:
            return per_example(None, model)  # raises ValueError, because the loss is missing
    chosen = _by_output(loss, weights, end)
    parts = []
    for name, ends_in in zip(end.names, end.heads, strict=True):
        if name in chosen:
            one, weight = chosen[name]
            part = per_example(one, model, ends_in=ends_in, as_compiled=as_compiled)
            parts.append(replace(part.scaled(weight, name), compiled=as_compiled))
    paths = [p for name, p in zip(end.names, end.paths, strict=True) if name in chosen]
    return SeveralLosses.of(parts, tuple(paths), end.adds_losses, end.names)


@dataclass(frozen=True)
class SeveralLosses(PerExampleLoss):
    """Sum of the losses of several outputs and of the losses that a model adds by `add_loss`.

    The argument z of the loss is a matrix with one row per example. A row of z contains the entries
    of the first output, then those of the second output, and so on. In place of an output, z
    contains its logits if the output's loss takes logits. If the model calls `add_loss`, the last
    column of z holds the added losses. The sum is linear in this column. The column therefore
    contributes nothing to the Gauss-Newton matrix.

    Attributes:
      parts: the loss of each output that has one.
      paths: for each part, the key of its output in the list or dict that the model returns. The
        key is None if the model returns one tensor.
      adds: True if z has a column of added losses.
      names: the names of all outputs of the model, also of those without a loss.
    """

    parts: tuple[PerExampleLoss, ...] = ()
    paths: tuple[Any, ...] = ()
    adds: bool = False
    names: tuple[str, ...] = ()
    # `seen` stores here the shape of one row of each output. The key is the number of columns of z.
    _shapes: dict[int, list[tuple]] = field(default_factory=dict, compare=False, repr=False)

    takes_one_output: ClassVar[bool] = False

    @classmethod
    def of(
        cls, parts: list[PerExampleLoss], paths: tuple, adds: bool, names: tuple[str, ...] = ()
    ) -> SeveralLosses:
        """Return the sum of the losses `parts`. The other arguments become its attributes."""
        name = parts[0].name
        if len(parts) > 1:
            name = ", ".join(f"{part.output}: {part.name}" for part in parts)
        found = cls(
            name,
            _unset,
            from_logits=all(part.from_logits for part in parts),
            parts=tuple(replace(part, by_position=False) for part in parts),
            paths=paths,
            adds=adds,
            names=names,
            compiled=parts[0].compiled,
        )
        object.__setattr__(found, "function", found._sum)
        return found

    @property
    def convex(self) -> bool:
        """True if each output's loss is known to be a convex function of the output."""
        return all(part.convex for part in self.parts)

    def seen(self, raw: Any, added: Any = None) -> Any:
        """Return z, made from the model's outputs `raw` and the added losses `added` (n,)."""
        found = [
            part.seen(output) for part, output in zip(self.parts, self._outputs(raw), strict=True)
        ]
        shapes = [tuple(z.shape[1:]) for z in found]
        sizes = [int(np.prod(shape)) for shape in shapes]  # raises TypeError for an unknown size
        columns = [
            tf.reshape(tf.cast(z, found[0].dtype), [-1, size])
            for z, size in zip(found, sizes, strict=True)
        ]
        if self.adds:
            columns.append(tf.cast(added, found[0].dtype)[:, None])
        self._shapes[sum(sizes) + self.adds] = shapes
        return columns[0] if len(columns) == 1 else tf.concat(columns, 1)

    def split(self, z: Any) -> list[Any]:
        """Return the parts of z as a list: each output in its own shape, then the added losses.

        Without added losses in z, the list has only the outputs.
        """
        shapes = self._shapes[z.shape[1]]
        sizes = [int(np.prod(shape)) for shape in shapes] + [1] * self.adds
        parts = tf.split(z, sizes, axis=1) if len(sizes) > 1 else [z]
        shaped = [
            tf.reshape(part, [-1, *shape])
            for part, shape in zip(parts[: len(shapes)], shapes, strict=True)
        ]
        return shaped + [part[:, 0] for part in parts[len(shapes) :]]

    def shapes(self, raw: Any) -> list[tuple]:
        """Return the shapes of the outputs that have a loss."""
        return [tuple(output.shape) for output in self._outputs(raw)]

    def heads(self, z: Any, raw: Any) -> list[tuple[str, Any, Any]]:
        """Return (activation, logits, output) for each output that ends in an activation."""
        found = zip(self.parts, self.split(z), self._outputs(raw), strict=False)
        return [(part.head, own, output) for part, own, output in found if part.head is not None]

    def _outputs(self, raw: Any) -> list[Any]:
        return [raw if path is _ONLY else raw[path] for path in self.paths]

    def curved(self, y: Any, z: Any) -> Callable[[Any], Any]:
        """Return the map u -> H u, as PerExampleLoss does.

        H is block diagonal, with one block for each output. The block of added losses is zero.
        """
        maps = [part.curved(y, own) for part, own in zip(self.parts, self.split(z), strict=False)]

        def product(u: Any) -> Any:
            parts = self.split(tf.reshape(u, [-1, z.shape[1]]))  # `split` needs a static shape
            found = [of(own) for of, own in zip(maps, parts, strict=False)]
            found += [tf.zeros_like(own) for own in parts[len(maps) :]]
            columns = [tf.reshape(h, [tf.shape(h)[0], -1]) for h in found]
            return tf.reshape(tf.concat(columns, 1), tf.shape(u))

        return product

    def check_labels(self, y: np.ndarray, output_shape: Any, name: str) -> None:
        """Refuse labels that are not valid for an output's loss.

        `output_shape` lists the shapes of the outputs that have a loss.
        """
        self._check_named(y)
        for part, shape in zip(self.parts, output_shape, strict=True):
            part.check_labels(y, shape, name)

    def check_logits(self, what: str = "a Gauss-Newton matrix") -> None:
        """Refuse a cross-entropy of probabilities on any output, because `what` needs logits."""
        for part in self.parts:
            part.check_logits(what)

    def _check_named(self, y: Any) -> None:
        given = labels(y)
        if len(self.parts) > 1 and not isinstance(given, Mapping):
            raise ValueError(
                f"y must have a dict of labels by the model's outputs {list(self.names)}, got one "
                "array."
            )
        named = isinstance(given, Mapping) and self.names
        wrong = [name for name in given if name not in self.names] if named else []
        if wrong:
            raise ValueError(
                f"y must have labels for the model's outputs {list(self.names)}, got {wrong[0]!r}."
            )

    def _sum(self, y: Any, z: Any) -> Any:
        self._check_named(y)
        parts = self.split(z)
        total = self.parts[0].function(y, parts[0])
        for part, own in zip(self.parts[1:], parts[1:], strict=False):
            values = part.function(y, own)
            total += tf.cast(values, total.dtype)
        return total + tf.cast(parts[-1], total.dtype) if self.adds else total


def _unset(y: Any, z: Any) -> Any:
    raise NotImplementedError


def _one_weight(weights: Any) -> float:
    """Return the loss weight of a model with one output."""
    flat = [1.0] if weights is None else keras.tree.flatten(weights)
    if len(flat) != 1:
        raise ValueError(f"loss_weights must be one number for one output, got {weights!r}.")
    return float(flat[0])


def _by_output(loss: Any, weights: Any, end: Ending) -> dict[str, tuple[Any, float]]:
    """Return a dict from the name of each output that has a loss to (loss, loss weight).

    Losses and weights are assigned to the outputs as `compile` assigns them.

    Raises: ValueError if the losses or the weights do not fit the outputs.
    """
    names = list(end.names or ())
    if isinstance(loss, Mapping):
        wrong = [name for name in loss if name not in names]
        if wrong:
            raise ValueError(
                f"loss must be a dict by the model's outputs {names}, got the key {wrong[0]!r}."
            )
        losses = dict(loss)
    elif isinstance(loss, list | tuple):
        if len(loss) != len(names):
            raise ValueError(
                f"loss must have an entry for each of the model's outputs {names}, got {len(loss)}."
            )
        losses = dict(zip(names, loss, strict=True))
    else:
        losses = dict.fromkeys(names, loss)
    if weights is None:
        given = dict.fromkeys(losses, 1.0)
    elif isinstance(weights, Mapping):
        given = dict(weights)
    elif isinstance(weights, list | tuple) and len(weights) == len(losses):
        # Keras assigns a list of weights to a dict of losses in the order of the sorted keys.
        keys = sorted(losses) if isinstance(loss, Mapping) else list(losses)
        given = dict(zip(keys, weights, strict=True))
    else:
        given = {}
    if set(given) != set(losses) or (weights is not None and not keras.tree.is_nested(loss)):
        raise ValueError(
            f"loss_weights must fit the losses of the outputs {sorted(losses)}, got {weights!r}; "
            "compile with a list or dict of losses, and with weights of the same form."
        )
    chosen = {name: (one, float(given[name])) for name, one in losses.items() if one is not None}
    if not chosen:
        raise ValueError(f"loss must be given for at least one of the outputs {names}, got none.")
    return chosen
