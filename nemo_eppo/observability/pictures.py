"""PNG pictures of what the HTML charts show, by matplotlib in one light style: panels of `Series`, side by side."""

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from nemo_eppo.files import replacing
from nemo_eppo.observability.charts import Series, histogram_bins

Panel = Callable[[Any], None]
"""Draws into matplotlib axes; `histogram`, `lines`, `scatter` and `bars` make one."""

_INK, _SOFT, _GRID = "#1d2127", "#626a75", "#dfe2e6"
_STYLE = {
    "font.size": 11, "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 10, "text.color": _INK, "axes.titlecolor": _INK, "axes.labelcolor": _SOFT, "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT, "ytick.color": _SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _GRID, "axes.axisbelow": True, "lines.linewidth": 2,
    "legend.fontsize": 10, "legend.framealpha": 0.85, "legend.edgecolor": "none",
    "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip
_PANEL, _DPI = (5.6, 4.0), 100  # inches, dots an inch: text is readable without zooming in


def write_picture(path: Path, panels: Sequence[Panel], columns: int = 2) -> None:
    """Draw `panels`, from the left and then downwards, into a PNG file."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with matplotlib.rc_context(_STYLE), replacing(path) as temporary:
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), dpi=_DPI, layout=layout)
        for number, draw in enumerate(panels, start=1):
            draw(figure.add_subplot(rows, columns, number))
        figure.savefig(temporary, format="png", metadata={"Software": None})


def histogram(groups: Sequence[Series], x_label: str, title: str) -> Panel:
    """Show which share of each group's `y` values falls into which bin, with dashed lines at the means."""

    def draw(axes: Any) -> None:
        every = np.concatenate([np.asarray(group.y, dtype=float) for group in groups])
        bins = np.histogram_bin_edges(every, histogram_bins(len(every)))
        for group in groups:
            share = np.full(len(group.y), 100 / len(group.y))
            axes.hist(group.y, bins, weights=share, color=group.color, alpha=0.55, label=group.label)
            axes.axvline(statistics.fmean(group.y), color=group.color, linestyle="--")
        _label(axes, title, x_label, "% of responses", len(groups))

    return draw


def lines(series: Sequence[Series], x_label: str, y_label: str, title: str) -> Panel:
    """Show lines, each with the band that its `error` makes around it."""

    def draw(axes: Any) -> None:
        for one in series:
            y = np.asarray(one.y, dtype=float)
            axes.plot(one.x, y, color=one.color, label=one.label, marker="o" if len(y) < 25 else None, markersize=4)
            if len(one.error):
                below, above = np.broadcast_to(one.error, (2, len(y)))
                axes.fill_between(one.x, y - below, y + above, color=one.color, alpha=0.2, linewidth=0)
        if all(float(value).is_integer() for one in series for value in one.x):  # steps, layers
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axes, title, x_label, y_label, len(series))

    return draw


def scatter(groups: Sequence[Series], x_label: str, y_label: str, title: str) -> Panel:
    """Show clouds of points with rings at their means."""

    def draw(axes: Any) -> None:
        for group in groups:
            axes.scatter(group.x, group.y, color=group.color, label=group.label, s=22, alpha=0.5, linewidths=0)
            mean = statistics.fmean(group.x), statistics.fmean(group.y)
            axes.scatter(*mean, s=160, facecolors="none", edgecolors=group.color, linewidths=3.5)
        _label(axes, title, x_label, y_label, len(groups))

    return draw


def bars(names: Sequence[str], parts: Sequence[Series], x_label: str, title: str) -> Panel:
    """Show one bar for each name, from above, divided into parts: `y` has a part's length in every bar."""

    def draw(axes: Any) -> None:
        left = np.zeros(len(names))
        for part in parts:
            axes.barh(list(names), part.y, left=left, color=part.color, label=part.label)
            left += np.asarray(part.y)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        _label(axes, title, x_label, "", len(parts))

    return draw


def _label(axes: Any, title: str, x_label: str, y_label: str, legend: int) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if legend > 2:  # inside, it would cover what is drawn
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1.03))
    elif legend > 1:
        axes.legend()
