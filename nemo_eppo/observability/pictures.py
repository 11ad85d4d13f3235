"""PNG pictures of charts, by matplotlib in one light style: panels side by side."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from nemo_eppo.files import replacing
from nemo_eppo.observability.charts import Chart

_INK, _SOFT, _GRID = "#1d2127", "#626a75", "#dfe2e6"
_STYLE = {
    "font.size": 11, "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.titlepad": 10, "text.color": _INK, "axes.titlecolor": _INK, "axes.labelcolor": _SOFT, "axes.edgecolor": _SOFT,
    "xtick.color": _SOFT, "ytick.color": _SOFT, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _GRID, "axes.axisbelow": True, "lines.linewidth": 2,
    "legend.fontsize": 10, "legend.framealpha": 0.85, "legend.edgecolor": "none",
    "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip
_PANEL, _DPI = (5.6, 4.0), 100  # inches, dots per inch: text is readable without zooming in


def write_picture(path: Path, charts: Sequence[Chart], columns: int = 2) -> None:
    """Draw `charts` into a PNG file, row by row."""
    columns = min(columns, len(charts))
    rows = math.ceil(len(charts) / columns)
    with matplotlib.rc_context(_STYLE), replacing(path) as temporary:
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), dpi=_DPI, layout=layout)
        for number, chart in enumerate(charts, start=1):
            axes = figure.add_subplot(rows, columns, number)
            chart.draw(axes)
            axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
            if len(chart.series) > 2:  # inside the axes, it would cover the curves
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1.03))
            elif len(chart.series) > 1:
                axes.legend()
        figure.savefig(temporary, format="png", metadata={"Software": None})
