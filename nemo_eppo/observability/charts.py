"""Small SVG charts for the HTML report: no scripts, no files, colours from the page's CSS, values on hover.

Every function returns one `<svg>` as a string. A series' colour is the name of a CSS variable of the page, `--<color>`.
"""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 460.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 14.0, 26.0, 36.0  # room for tick labels and axis titles
MINUS = "\N{MINUS SIGN}"
_MOST_POINTS = 240  # more than the eye or the file needs: neighbours are averaged


@dataclass(frozen=True)
class Series:
    """Values of one line, layer or cloud of points; `x` and `y` have one length. `notes` are shown on hover."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    notes: Sequence[str] = ()


def line_chart(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Lines over steps. Long noisy ones are drawn faint, under their running mean (see `smoothing_window`)."""
    frame = _Frame([v for s in series for v in s.x], [v for s in series for v in s.y], x_label, y_label)
    parts = []
    for one in series:
        window = smoothing_window(len(one.x))
        x, y = _thin(one.x, one.y)
        if window > 1:
            parts.append(_path(frame, x, y, one.color, "faint"))
            x, y = _thin(one.x, _running_mean(one.y, window))
        parts.append(_path(frame, x, y, one.color, "line"))
        if len(x) < 25:
            parts += [_dot(frame, a, b, one.color, "dot", "") for a, b in zip(x, y, strict=True)]
    return frame.svg(parts + _hover_columns(frame, [(s, *_thin(s.x, s.y)) for s in series], x_label))


def stacked_chart(layers: Sequence[Series], x_label: str, y_label: str) -> str:
    """Layers on top of each other over shared steps; all layers have the same `x`, and no negative values."""
    thinned = [(layer, *_thin(layer.x, layer.y)) for layer in layers]
    x = thinned[0][1]
    half = (x[1] - x[0]) / 2 if len(x) > 1 else 0.5
    totals = [sum(values) for values in zip(*(y for _, _, y in thinned), strict=True)]
    frame = _Frame([x[0] - half, x[-1] + half], [0.0, *totals], x_label, y_label)
    edges = [frame.x(x[0] - half), *(frame.x((a + b) / 2) for a, b in itertools.pairwise(x)), frame.x(x[-1] + half)]
    parts, floor = [], [0.0] * len(x)
    for layer, _, y in thinned:
        roof = [low + value for low, value in zip(floor, y, strict=True)]
        up = _steps(edges, [frame.y(v) for v in roof])
        down = _steps(edges[::-1], [frame.y(v) for v in floor[::-1]])
        parts.append(f'<path class="layer" style="fill:var(--{layer.color})" d="M{up}L{down}Z"/>')
        floor = roof
    return frame.svg(parts + _hover_columns(frame, thinned, x_label))


def scatter_chart(groups: Sequence[Series], x_label: str, y_label: str, joined: bool = False) -> str:
    """Clouds of points, or with `joined` points in the order of time, which get more solid towards the end."""
    frame = _Frame([v for g in groups for v in g.x], [v for g in groups for v in g.y], x_label, y_label)
    parts = []
    for group in groups:
        if joined:
            parts.append(_path(frame, group.x, group.y, group.color, "faint"))
        for i, (a, b) in enumerate(zip(group.x, group.y, strict=True)):
            opacity = 0.25 + 0.75 * (i + 1) / len(group.x) if joined else 0.55
            note = group.notes[i] if group.notes else f"{x_label} {_short(a)}, {y_label} {_short(b)}"
            parts.append(_dot(frame, a, b, group.color, "point", note, opacity))
        if not joined:
            mean_x, mean_y = _mean(group.x), _mean(group.y)
            note = f"mean of {group.label}: {x_label} {_short(mean_x)}, {y_label} {_short(mean_y)}"
            parts.append(_dot(frame, mean_x, mean_y, group.color, "mean", note))
    return frame.svg(parts)


def histogram_chart(groups: Sequence[Series], x_label: str) -> str:
    """Shares of each group's `y` values per bin, with dashed lines at the means."""
    values = [v for g in groups for v in g.y]
    bins = max(8, min(30, math.isqrt(len(values))))
    low, high = min(values), max(values)
    width = (high - low) / bins or 1.0
    shares = []
    for group in groups:
        counts = [0] * bins
        for value in group.y:
            counts[min(int((value - low) / width), bins - 1)] += 1
        shares.append([100.0 * count / len(group.y) for count in counts])
    frame = _Frame([low, low + bins * width], [0.0, *(s for share in shares for s in share)], x_label, "% of responses")
    edges = [frame.x(low + i * width) for i in range(bins + 1)]
    parts = []
    for group, share in zip(groups, shares, strict=True):
        outline = f"{_px(edges[0])},{_px(frame.y(0))}L{_steps(edges, [frame.y(v) for v in share])}"
        outline += f"L{_px(edges[-1])},{_px(frame.y(0))}Z"
        parts.append(
            f'<path class="bars" style="fill:var(--{group.color});stroke:var(--{group.color})" d="M{outline}">'
            f"<title>{html.escape(group.label)}: {len(group.y)} responses</title></path>"
        )
    for group in groups:
        mean = _mean(group.y)
        parts.append(
            f'<line class="average" style="stroke:var(--{group.color})" x1="{_px(frame.x(mean))}" '
            f'x2="{_px(frame.x(mean))}" y1="{_px(_TOP)}" y2="{_px(_HEIGHT - _BOTTOM)}">'
            f"<title>mean of {html.escape(group.label)}: {_short(mean)}</title></line>"
        )
    return frame.svg(parts)


def smoothing_window(points: int) -> int:
    """Points in the running mean of a curve: one in twenty, odd; 1 (none) for short curves."""
    return points // 20 | 1 if points >= 40 else 1


class _Frame:
    """Axes, and the map from data to pixels. A `y` that starts at exactly 0 stands on the axis."""

    def __init__(self, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> None:
        self.x_label, self.y_label = x_label, y_label
        self._x_low, self._x_high = _range(x)
        low, high = _range(y)
        margin = (high - low) / 20
        self._y_low, self._y_high = low - (margin if low else 0.0), high + margin
        self._x_ticks = _ticks(self._x_low, self._x_high, 6, whole=all(value == int(value) for value in x))
        self._y_ticks = _ticks(self._y_low, self._y_high, 5)

    def x(self, value: float) -> float:
        return _LEFT + (value - self._x_low) / (self._x_high - self._x_low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - self._y_low) / (self._y_high - self._y_low) * (_HEIGHT - _TOP - _BOTTOM)

    def svg(self, parts: Iterable[str]) -> str:
        left, right, bottom = _px(_LEFT), _px(_WIDTH - _RIGHT), _HEIGHT - _BOTTOM
        grid = []
        for tick, name in self._y_ticks.items():
            y = _px(self.y(tick))
            kind = "zero" if tick == 0 else "rule"
            grid.append(f'<line class="{kind}" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
            grid.append(f'<text class="end" x="{_px(_LEFT - 7)}" y="{y}" dy=".32em">{name}</text>')
        grid += [
            f'<text class="middle" x="{_px(self.x(tick))}" y="{_px(bottom + 16)}">{name}</text>'
            for tick, name in self._x_ticks.items()
        ]
        grid.append(f'<text x="0" y="11">{html.escape(self.y_label)}</text>')
        grid.append(f'<text class="end" x="{right}" y="{_px(_HEIGHT - 4)}">{html.escape(self.x_label)}</text>')
        label = html.escape(f"{self.y_label} against {self.x_label}", quote=True)
        size = f"{_WIDTH:g} {_HEIGHT:g}"
        return f'<svg viewBox="0 0 {size}" role="img" aria-label="{label}">{"".join(grid)}{"".join(parts)}</svg>'


def _hover_columns(
    frame: _Frame, series: Sequence[tuple[Series, Sequence[float], Sequence[float]]], x_label: str
) -> list[str]:
    # one invisible column per step that shows a hair line and the values of all series there
    table: dict[float, list[str]] = {}
    for one, x, y in series:
        for a, b in zip(x, y, strict=True):
            table.setdefault(a, []).append(f"{one.label}: {_short(b)}")
    xs = sorted(table)
    centres = [frame.x(x) for x in xs]
    edges = [_LEFT, *((a + b) / 2 for a, b in itertools.pairwise(centres)), _WIDTH - _RIGHT]
    height = _px(_HEIGHT - _TOP - _BOTTOM)
    return [
        f'<g class="hover"><rect x="{_px(left)}" y="{_px(_TOP)}" width="{_px(right - left)}" height="{height}"/>'
        f'<path d="M{_px(centre)},{_px(_TOP)}v{height}"/>'
        f"<title>{html.escape(chr(10).join([f'{x_label} {_short(x)}', *table[x]]))}</title></g>"
        for x, centre, (left, right) in zip(xs, centres, itertools.pairwise(edges), strict=True)
    ]


def _path(frame: _Frame, x: Sequence[float], y: Sequence[float], color: str, kind: str) -> str:
    points = "L".join(f"{_px(frame.x(a))},{_px(frame.y(b))}" for a, b in zip(x, y, strict=True))
    return f'<path class="{kind}" style="stroke:var(--{color})" d="M{points}"/>'


def _dot(frame: _Frame, x: float, y: float, color: str, kind: str, note: str, opacity: float = 1.0) -> str:
    radius = {"dot": 2.2, "point": 3.2, "mean": 6.5}[kind]
    title = f"<title>{html.escape(note)}</title>" if note else ""
    return (
        f'<circle class="{kind}" style="fill:var(--{color})" cx="{_px(frame.x(x))}" cy="{_px(frame.y(y))}" '
        f'r="{radius}" fill-opacity="{opacity:.2f}">{title}</circle>'
    )


def _steps(edges: Sequence[float], heights: Sequence[float]) -> str:
    spans = zip(itertools.pairwise(edges), heights, strict=True)
    return "L".join(f"{_px(a)},{_px(h)}L{_px(b)},{_px(h)}" for (a, b), h in spans)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    group = math.ceil(len(x) / _MOST_POINTS) or 1

    def means(values: Sequence[float]) -> list[float]:
        return [_mean(values[i : i + group]) for i in range(0, len(values), group)]

    return means(x), means(y)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    half = window // 2
    return [_mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:  # a constant still needs an axis
        return low - (abs(low) / 10 or 0.5), high + (abs(high) / 10 or 0.5)
    return low, high


def _ticks(low: float, high: float, about: int, whole: bool = False) -> dict[float, str]:
    """Round numbers within [low, high], written with the same number of decimals."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    decimals = next(d for d in range(20) if math.isclose(round(step, d), step, rel_tol=1e-6))
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return {tick: f"{tick:,.{decimals}f}".replace("-", MINUS) for tick in ticks}


def _short(value: float) -> str:
    return format(float(f"{value:.4g}"), ",g").replace("-", MINUS)


_px: Callable[[float], str] = "{:.4g}".format  # a tenth of a pixel
