"""Charts, drawn by plotly on pages (pointing at a chart shows its values) and by matplotlib in pictures.

`report_page.section` puts charts on a page, `pictures.write_picture` into a PNG file. Either library is imported when
the first chart needs it.
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
_MAX_POINTS = 1_000  # of a line on a page; neighbours of a longer one are averaged, to keep the file small
_LONGEST_LABEL = 34  # characters, which fit on a phone
_MARKED_POINTS = 25  # a line of fewer points has a marker at each


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
    """The band around the line, as matplotlib's yerr: half its height at every point, or its extents below and above
    every point; empty: no band."""
    notes: Sequence[str] = ()
    """Plain text for every point, shown under the pointer before the values; used by `Scatter`."""


@dataclass(frozen=True)
class Chart(ABC):
    """A chart that plotly can show on a page and matplotlib can draw in a picture."""

    title: str
    text: str
    """Plain caption, on a page."""
    series: Sequence[Series]
    x_label: str
    y_label: str = ""

    @abstractmethod
    def figure(self) -> "Figure":
        """Return the chart for a page, see `report_page.section`."""

    @abstractmethod
    def draw(self, axes: Any) -> None:
        """Draw the chart on matplotlib axes, see `pictures.write_picture`."""


class Lines(Chart):
    """Lines over steps, each with the band of its `error`.

    On a page, long lines are drawn faint, under their running mean (see `smoothing_window`).
    """

    def figure(self) -> "Figure":
        traces: list[dict[str, Any]] = []
        for series in self.series:
            x, y, window = np.asarray(series.x), np.asarray(series.y), smoothing_window(len(series.x))
            style: dict[str, Any] = {"type": "scatter", "name": series.label, "legendgroup": series.label}
            without_hover = style | {"hoverinfo": "skip", "mode": "lines"}
            if len(series.error):
                below, above = np.broadcast_to(series.error, (2, len(x)))
                edge = {"showlegend": False, "line": {"width": 0}, "fillcolor": _transparent(series.color, 0.2)}
                traces.append(without_hover | edge | {"x": _thin(x), "y": _thin(y - below)})
                traces.append(without_hover | edge | {"x": _thin(x), "y": _thin(y + above), "fill": "tonexty"})
            line = {"color": series.color, "width": 2}
            if window > 1:
                line = {"color": _transparent(series.color, 0.35), "width": 1}
            style |= {"mode": "lines+markers" if len(x) < _MARKED_POINTS else "lines", "showlegend": window == 1}
            traces.append(style | {"x": _thin(x), "y": _thin(y), "line": line})
            if window > 1:
                mean = _thin(running_mean(y, window))
                traces.append(without_hover | {"x": _thin(x), "y": mean, "line": {"color": series.color, "width": 2.2}})
        return _figure(traces, self.x_label, self.y_label, hovermode="x unified")

    def draw(self, axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for series in self.series:
            y, marker = np.asarray(series.y, dtype=float), "o" if len(series.y) < _MARKED_POINTS else None
            axes.plot(series.x, y, color=series.color, label=series.label, marker=marker, markersize=4)
            if len(series.error):
                below, above = np.broadcast_to(series.error, (2, len(y)))
                axes.fill_between(series.x, y - below, y + above, color=series.color, alpha=0.2, linewidth=0)
        if all(float(value).is_integer() for series in self.series for value in series.x):  # steps, layers
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
    """The points of a group are ordered in time: a line connects them, later points are less transparent, and there are
    no rings."""

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
                mean |= {"text": [_note(f"mean of {group.label}")], "showlegend": False, "marker": ring}
                traces.append(trace | mean)
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
    """The share of each group's `y` values in every bin, with dashed lines at the means."""

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
        values = np.concatenate([np.asarray(group.y, dtype=float) for group in self.series])
        edges = np.histogram_bin_edges(values, _bins(len(values)))
        for group in self.series:
            percent = np.full(len(group.y), 100 / len(group.y))
            axes.hist(group.y, edges, weights=percent, color=group.color, alpha=0.55, label=group.label)
            axes.axvline(statistics.fmean(group.y), color=group.color, linestyle="--")


@dataclass(frozen=True)
class Bars(Chart):
    """One bar for each of `names`, from the top, stacked from parts: a part's `y` is its length in each bar."""

    names: Sequence[str] = ()

    def figure(self) -> "Figure":
        wrapped = [textwrap.wrap(name, 18) for name in self.names]  # for a phone
        labels = ["<br>".join(html.escape(line, quote=False) for line in lines) for lines in wrapped]
        traces = [
            {
                "type": "bar", "orientation": "h", "name": part.label, "x": part.y, "y": labels,
                "marker": {"color": part.color}, "hovertemplate": "%{x:.4~g}",
            }
            for part in self.series
        ]  # fmt: skip
        height = 80 + 20 * len(self.series) + sum(20 + 15 * len(lines) for lines in wrapped)
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
    """Return the number of bins of a histogram of this many values, all groups together."""
    return max(15, min(30, math.isqrt(values)))


def smoothing_window(points: int) -> int:
    """Return the window of a curve's running mean: a twentieth of its points, odd; 1 (none) for short curves."""
    return points // 20 | 1 if points >= 40 else 1


def running_mean(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Return one mean for each value, over a window (of odd size) around it that is cut at both ends."""
    ones = np.ones(window)
    result: np.ndarray = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    return result


def _figure(traces: Sequence[dict[str, Any]], x_label: str, y_label: str, short: int = 16, **layout: Any) -> "Figure":
    """Make a figure in the common style; if labels have `short` characters at most, the legend has two columns."""
    from plotly.graph_objects import Figure

    # plotly does not wrap labels in a legend, and runs usually differ in the end of their names
    traces = [
        trace | {"name": name if len(name := trace["name"]) <= _LONGEST_LABEL else f"…{name[1 - _LONGEST_LABEL :]}"}
        for trace in traces
    ]
    labels = dict.fromkeys(trace["name"] for trace in traces)
    columns = 2 if max(map(len, labels)) <= short else 1
    axis = {"gridcolor": _GRID, "zerolinecolor": GRAY, "zerolinewidth": 1, "automargin": True, "hoverformat": ".4~g"}
    legend = {
        # fixed columns: plotly may redraw a horizontal legend of free widths for ever
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
            "showlegend": len(labels) > 1,  # a single line is explained by the title
            "legend": legend,
            "hoverlabel": {"bgcolor": "#20252c", "font": {"color": "#f2f2f2"}, "namelength": -1},
            **layout,
        },
    )  # fmt: skip


def _thin(values: np.ndarray) -> np.ndarray:
    """Average neighbours so that `_MAX_POINTS` remain at most."""
    starts = np.arange(0, len(values), math.ceil(len(values) / _MAX_POINTS))
    sums = np.add.reduceat(values.astype(float), starts)
    return (sums / np.diff(starts, append=len(values))).astype(np.float32)  # seven digits, and half the file


def _note(text: str) -> str:
    # plotly reads some HTML tags in texts; a response must not be read as one
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, 40)) + "<br>"


def _transparent(color: str, opacity: float) -> str:
    red, green, blue = bytes.fromhex(color.removeprefix("#"))
    return f"rgba({red},{green},{blue},{opacity})"
