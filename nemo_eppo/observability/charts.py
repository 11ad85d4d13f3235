"""The charts of pages, by plotly in one style, with values under the pointer; and the same in pictures, by matplotlib.

`report_page.section` puts charts on a page, `pictures.write_picture` into a PNG file. Either library is imported with
the first chart that needs it.
"""

import html
import math
import statistics
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLORS = (  # readable on white and on black; neighbours differ in lightness too
    "#3f7fe8", "#d9603f", "#2b9a74", "#c08a1e", "#8d6be0", "#1a9aa9", "#cc5a9b", "#7f9a35", "#a37a58", "#6f86b5",
)  # fmt: skip
GRAY = "#8a94a0"
_GRID = "rgba(130,138,150,.28)"
_MOST_POINTS = 1_000  # of one line; more would only make the file larger, so neighbours are averaged
_LONGEST_LABEL = 34  # characters, which fit on a phone
_SINGLE_POINTS = 25  # a line of fewer points shows each of them


@dataclass(frozen=True)
class Series:
    """The values of one line, layer or cloud of points."""

    label: str
    color: str
    """A CSS colour, for instance one of COLORS."""
    x: Sequence[float]
    y: Sequence[float]
    """As long as `x`."""
    error: Sequence[float] | tuple[Sequence[float], Sequence[float]] = ()
    """Half the height of a band around the line at every point, or how far it reaches below and above the points, as
    matplotlib's yerr; empty: no band."""
    notes: Sequence[str] = ()
    """Plain text for every point, shown under the pointer before the values; used by `Scatter`."""


@dataclass(frozen=True)
class Chart(ABC):
    """A chart, described once: on a page it is a figure of plotly, in a picture it is drawn by matplotlib."""

    title: str
    text: str
    """Plain caption, on a page."""
    series: Sequence[Series]
    x_label: str
    y_label: str = ""

    @abstractmethod
    def figure(self) -> "Figure":
        """Return it for a page, see `report_page.section`."""

    @abstractmethod
    def draw(self, axes: Any) -> None:
        """Draw it into axes of matplotlib, see `pictures.write_picture`."""


class Lines(Chart):
    """Lines over steps, each with the band that its `error` makes around it.

    On a page, long noisy ones are drawn faint, under their running mean (see `smoothing_window`).
    """

    def figure(self) -> "Figure":
        traces: list[dict[str, Any]] = []
        for one in self.series:
            x, y, window = np.asarray(one.x), np.asarray(one.y), smoothing_window(len(one.x))
            style: dict[str, Any] = {"type": "scatter", "name": one.label, "legendgroup": one.label}
            quiet = style | {"hoverinfo": "skip", "mode": "lines"}
            if len(one.error):
                below, above = np.broadcast_to(one.error, (2, len(x)))
                edge = {"showlegend": False, "line": {"width": 0}, "fillcolor": _transparent(one.color, 0.2)}
                traces.append(quiet | edge | {"x": _thin(x), "y": _thin(y - below)})
                traces.append(quiet | edge | {"x": _thin(x), "y": _thin(y + above), "fill": "tonexty"})
            line = {"color": one.color, "width": 2}
            if window > 1:
                line = {"color": _transparent(one.color, 0.35), "width": 1}
            style |= {"mode": "lines+markers" if len(x) < _SINGLE_POINTS else "lines", "showlegend": window == 1}
            traces.append(style | {"x": _thin(x), "y": _thin(y), "line": line})
            if window > 1:
                mean = _thin(running_mean(y, window))
                traces.append(quiet | {"x": _thin(x), "y": mean, "line": {"color": one.color, "width": 2.2}})
        return _figure(traces, self.x_label, self.y_label, hovermode="x unified")

    def draw(self, axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for one in self.series:
            y, marker = np.asarray(one.y, dtype=float), "o" if len(one.y) < _SINGLE_POINTS else None
            axes.plot(one.x, y, color=one.color, label=one.label, marker=marker, markersize=4)
            if len(one.error):
                below, above = np.broadcast_to(one.error, (2, len(y)))
                axes.fill_between(one.x, y - below, y + above, color=one.color, alpha=0.2, linewidth=0)
        if all(float(value).is_integer() for one in self.series for value in one.x):  # steps, layers
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))


class Stack(Chart):
    """Layers on top of each other over shared steps; all have the same `x`, and no negative values."""

    def figure(self) -> "Figure":
        marks = "lines" if len(self.series[0].x) > 1 else "markers"
        traces = [
            {
                "type": "scatter", "name": layer.label, "mode": marks, "stackgroup": "all",
                "x": _thin(np.asarray(layer.x)), "y": _thin(np.asarray(layer.y)),
                "line": {"width": 0, "shape": "hvh", "color": layer.color}, "fillcolor": layer.color,
            }
            for layer in self.series
        ]  # fmt: skip
        return _figure(traces, self.x_label, self.y_label, hovermode="x unified")

    def draw(self, axes: Any) -> None:
        labels, colors = [layer.label for layer in self.series], [layer.color for layer in self.series]
        heights = [layer.y for layer in self.series]
        axes.stackplot(self.series[0].x, heights, labels=labels, colors=colors, step="mid")


@dataclass(frozen=True)
class Scatter(Chart):
    """Clouds of points with rings at their means."""

    joined: bool = False
    """The points of a group are in the order of time: a line connects them, they get more solid towards the end, and
    there are no rings."""

    def figure(self) -> "Figure":
        traces: list[dict[str, Any]] = []
        for group in self.series:
            values = f"{self.x_label} %{{x:.4~g}}, {self.y_label} %{{y:.4~g}}<extra></extra>"
            mode, line = "lines+markers" if self.joined else "markers", {"color": _transparent(group.color, 0.3)}
            trace = {
                "type": "scatter", "name": group.label, "x": group.x, "y": group.y, "legendgroup": group.label,
                "text": [_note(note) for note in group.notes], "hovertemplate": "%{text}" + values,
                "mode": mode, "line": line,
            }  # fmt: skip
            traces.append(trace | {"marker": {"color": group.color, "size": 7, "opacity": self._opacity(group)}})
            if not self.joined:
                ring = {"color": group.color, "size": 15, "symbol": "circle-open", "line": {"width": 4}}
                mean: dict[str, Any] = {"x": [statistics.fmean(group.x)], "y": [statistics.fmean(group.y)]}
                about = {"text": [_note(f"mean of {group.label}")], "showlegend": False, "marker": ring}
                traces.append(trace | mean | about)
        return _figure(traces, self.x_label, self.y_label, hovermode="closest")

    def draw(self, axes: Any) -> None:
        for group in self.series:
            style = {"color": group.color, "label": group.label, "s": 22, "linewidths": 0}
            axes.scatter(group.x, group.y, alpha=self._opacity(group), **style)
            if self.joined:
                axes.plot(group.x, group.y, color=group.color, alpha=0.3)
            else:
                mean = statistics.fmean(group.x), statistics.fmean(group.y)
                axes.scatter(*mean, s=160, facecolors="none", edgecolors=group.color, linewidths=3.5)

    def _opacity(self, group: Series) -> Any:
        return np.linspace(0.2, 1.0, len(group.x)) if self.joined else 0.5


@dataclass(frozen=True)
class Histogram(Chart):
    """Which share of each group's `y` values falls into which bin, with dashed lines at the means."""

    y_label: str = "% of responses"

    def figure(self) -> "Figure":
        total = sum(len(group.y) for group in self.series)
        traces = [
            {
                "type": "histogram", "name": group.label, "x": group.y, "bingroup": "all", "histnorm": "percent",
                "nbinsx": _bins(total), "marker": {"color": group.color}, "opacity": 0.55,
            }
            for group in self.series
        ]  # fmt: skip
        chart = _figure(traces, self.x_label, self.y_label, hovermode="x", barmode="overlay")
        for group in self.series:
            chart.add_vline(statistics.fmean(group.y), line={"color": group.color, "dash": "dash", "width": 2})
        return chart

    def draw(self, axes: Any) -> None:
        every = np.concatenate([np.asarray(group.y, dtype=float) for group in self.series])
        bins = np.histogram_bin_edges(every, _bins(len(every)))
        for group in self.series:
            share = np.full(len(group.y), 100 / len(group.y))
            axes.hist(group.y, bins, weights=share, color=group.color, alpha=0.55, label=group.label)
            axes.axvline(statistics.fmean(group.y), color=group.color, linestyle="--")


@dataclass(frozen=True)
class Bars(Chart):
    """One bar for each of the `names`, from above, divided into parts: `y` has a part's length in every bar."""

    names: Sequence[str] = ()

    def figure(self) -> "Figure":
        lines = [textwrap.wrap(name, 18) for name in self.names]  # for a phone
        places = ["<br>".join(html.escape(line, quote=False) for line in of_name) for of_name in lines]
        traces = [
            {
                "type": "bar", "orientation": "h", "name": part.label, "x": part.y, "y": places,
                "marker": {"color": part.color}, "hovertemplate": "%{x:.4~g}",
            }
            for part in self.series
        ]  # fmt: skip
        height = 80 + 20 * len(self.series) + sum(20 + 15 * len(of_name) for of_name in lines)
        style = {"height": height, "barmode": "stack", "hovermode": "y unified"}
        chart = _figure(traces, self.x_label, self.y_label, short=6, **style)
        return chart.update_yaxes(autorange="reversed", type="category", showgrid=False)

    def draw(self, axes: Any) -> None:
        left = np.zeros(len(self.names))
        for part in self.series:
            axes.barh(list(self.names), part.y, left=left, color=part.color, label=part.label)
            left += np.asarray(part.y)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)


def _bins(values: int) -> int:
    """Return into how many bins a histogram of this many values, all groups together, is divided."""
    return max(15, min(30, math.isqrt(values)))


def smoothing_window(points: int) -> int:
    """Return how many points the running mean of a curve takes: one in twenty, odd; 1 (none) for short curves."""
    return points // 20 | 1 if points >= 40 else 1


def running_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Return the means, as many as there are values, over windows of an odd number of them, cut at both ends."""
    ones = np.ones(window)
    result: np.ndarray = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    return result


def _figure(traces: Sequence[dict[str, Any]], x_label: str, y_label: str, short: int = 16, **layout: Any) -> "Figure":
    # labels of up to `short` characters stand in two columns, on a phone too; a legend that flows may never settle
    from plotly.graph_objects import Figure

    # a legend breaks no words, and what tells runs apart is the end of their names
    traces = [
        trace | {"name": name if len(name := trace["name"]) <= _LONGEST_LABEL else f"…{name[1 - _LONGEST_LABEL :]}"}
        for trace in traces
    ]
    labels = dict.fromkeys(trace["name"] for trace in traces)
    columns = 2 if max(map(len, labels)) <= short else 1
    axis = {"gridcolor": _GRID, "zerolinecolor": GRAY, "zerolinewidth": 1, "automargin": True, "hoverformat": ".4~g"}
    legend = {
        "orientation": "h", "entrywidthmode": "fraction", "entrywidth": 1 / columns, "y": 1.02, "yanchor": "bottom",
        "traceorder": "normal", "tracegroupgap": 0,
    }  # fmt: skip
    return Figure(
        traces,
        {
            "template": "none", "height": 285 + 20 * math.ceil(len(labels) / columns),
            "margin": {"l": 8, "r": 8, "t": 8, "b": 8}, "font": {"size": 12, "family": "inherit", "color": GRAY},
            "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis | {"title": {"text": x_label}, "showgrid": False, "zeroline": False},
            "yaxis": axis | {"title": {"text": y_label}},
            "showlegend": len(labels) > 1,  # the title says what a single line is
            "legend": legend,
            "hoverlabel": {"bgcolor": "#20252c", "font": {"color": "#f2f2f2"}, "namelength": -1},
            **layout,
        },
    )  # fmt: skip


def _thin(values: np.ndarray) -> np.ndarray:
    starts = np.arange(0, len(values), math.ceil(len(values) / _MOST_POINTS))
    sums = np.add.reduceat(values.astype(float), starts)
    return (sums / np.diff(starts, append=len(values))).astype(np.float32)  # seven digits, and half the file


def _note(text: str) -> str:
    # plotly reads some HTML tags in texts; a response must not be read as one
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, 40)) + "<br>"


def _transparent(color: str, opacity: float) -> str:
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return f"rgba({red},{green},{blue},{opacity})"
