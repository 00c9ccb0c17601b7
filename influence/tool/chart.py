"""Scatter charts as SVG, made here and not by a chart library.

A page may take 5 MB and must open without a network. Plotly alone takes 3.5 MB, and Vega with its
parts 0.8 MB. A page needs one kind of chart, a scatter with the line y = x. As SVG it takes some
kilobytes, prints, follows the page's colours, and each point can be reached by the keyboard and
read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 480, 84, 56, 16, 16
_TICKS = 5


@dataclass(frozen=True)
class Point:
    """One point of a scatter.

    Attributes:
      x, y: where it is.
      label: what it is, in words, for a screen reader and the panel beside the chart.
      shows: the id of the part of the page that the panel shows for this point.
      series: the number of its colour and shape, from 0.
    """

    x: float
    y: float
    label: str
    shows: str
    series: int = 0


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> dict:
    """Return the numbers that the page's template draws.

    Both axes have one scale if their ranges are within a factor of ten, so that y = x is the
    diagonal.

    Args:
      points: the points, with finite x and y.
      x_title: the title of the horizontal axis.
      y_title: the title of the vertical axis.
    """
    xs, ys = (np.array([getattr(p, axis) for p in points], float) for axis in ("x", "y"))
    x_range, y_range = _range(xs), _range(ys)
    widths = x_range[1] - x_range[0], y_range[1] - y_range[0]
    if max(widths) <= 10 * min(widths):
        x_range = y_range = min(x_range[0], y_range[0]), max(x_range[1], y_range[1])

    def across(x: float) -> float:
        share = (x - x_range[0]) / (x_range[1] - x_range[0])
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 2)

    def down(y: float) -> float:
        share = (y - y_range[0]) / (y_range[1] - y_range[0])
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP), 2)

    low, high = max(x_range[0], y_range[0]), min(x_range[1], y_range[1])
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "frame": (_LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, _HEIGHT - _BOTTOM - _TOP),
        "diagonal": (across(low), down(low), across(high), down(high)) if low < high else None,
        "points": [
            {
                "cx": across(p.x),
                "cy": down(p.y),
                "label": p.label,
                "shows": p.shows,
                "series": p.series % 6,
            }
            for p in points
        ],
        "x_ticks": [(across(t), f"{t:.6g}") for t in _ticks(*x_range)],
        "y_ticks": [(down(t), f"{t:.6g}") for t in _ticks(*y_range)],
        "x_title": x_title,
        "y_title": y_title,
    }


def _range(values: np.ndarray) -> tuple[float, float]:
    low, high = float(min(values.min(), 0)), float(max(values.max(), 0))
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers within a range."""
    rough = (high - low) / _TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]
