"""Scatter plots as SVG, drawn without a chart library.

A page may have at most 5 MB and must open without a network. Plotly has 3.5 MB, and Vega with its
dependencies has 0.8 MB. A page needs only one type of chart, a scatter plot with the line y = x. An
SVG of this chart has a few kilobytes, can be printed, and uses the colours of the page. A keyboard
user can select each point, and a screen reader can read its label.
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
    """One point of a scatter plot.

    Attributes:
      x, y: the coordinates of the point.
      label: description of the point, for screen readers and for the panel beside the chart.
      shows: the id of the page element that the panel shows if a reader selects the point.
      series: the number of the point's series, from 0. It sets the colour and the shape.
    """

    x: float
    y: float
    label: str
    shows: str
    series: int = 0


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> dict:
    """Return a dict with the pixel coordinates and texts that the page's template draws.

    If the longer of the ranges of x and y is at most ten times as long as the other, both axes get
    the same range. The line y = x is then the diagonal of the chart.

    Args:
      points: the points. Their x and y must be finite.
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
    """Return round numbers between low and high, as tick marks of an axis."""
    rough = (high - low) / _TICKS
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= rough)
    first = math.ceil(low / step)
    return [round(k * step, 12) for k in range(first, math.floor(high / step) + 1)]
