"""The layout of HTML pages: one file without external resources, light and dark, for phones and desktops."""

import html
from collections.abc import Sequence

from nemo_eppo.observability.charts import Chart
from nemo_eppo.observability.chat import turns

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #fff; --ink: #1d2127; --soft: #626a75; --line: #e3e0d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e8e9ea; --soft: #9aa3ae; --line: #30363e;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 80px; }
h1 {
  margin: 0; font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em;
  text-wrap: balance; overflow-wrap: anywhere;
}
h2 { font-size: 1.35rem; line-height: 1.25; letter-spacing: -.01em; margin: 60px 0 4px; }
h3 { font-size: 1rem; margin: 0; }
.card + h3, p + h3 { margin: 20px 0 6px; }
p { margin: 8px 0; max-width: 70ch; overflow-wrap: anywhere; }
.soft, figcaption p, .facts, .prompt, small { color: var(--soft); }
.lead { font-size: 1.15rem; margin: 20px 0 28px; }
.grid {
  display: grid; gap: 20px; margin-top: 20px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr));
}
figure, .card {
  margin: 0; min-width: 0; padding: 18px 20px;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
}
figure { display: flex; flex-direction: column; }
figcaption { flex: 1; }
figcaption p { font-size: .86rem; line-height: 1.45; margin: 2px 0 0; }
/* plotly writes its colours into the elements; these follow the page's, light or dark */
.js-plotly-plot text:not(.hoverlayer *) { fill: var(--soft) !important; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; font-size: .86rem; color: var(--soft); text-align: right; padding: 4px 12px 8px; }
td { text-align: right; padding: 11px 12px; border-top: 1px solid var(--line); white-space: nowrap; }
td:first-child { text-align: left; padding-left: 0; white-space: normal; }
td small { display: block; line-height: 1.3; }
td.value { font-size: 1.3rem; font-weight: 600; letter-spacing: -.01em; }
th:first-child { text-align: left; padding-left: 0; }
table.settings td { padding-top: 6px; padding-bottom: 6px; }
table.settings td:last-child { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.settings tr:first-child td { border-top: 0; }
.role { display: block; margin-top: .6em; font-size: .82rem; font-weight: 600; text-transform: capitalize; }
.role:first-child { margin-top: 0; }
.sample { margin-top: 20px; }
.pair {
  display: grid; gap: 16px 28px; margin-top: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr));
}
.pair > div { border-left: 3px solid; padding-left: 14px; min-width: 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22em; overflow-y: auto; }
.prompt, .facts { font-size: .9rem; }
.facts { font-size: .82rem; font-variant-numeric: tabular-nums; margin: 0 0 6px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font-size: .84rem; line-height: 1.5; }
@media (max-width: 600px) {
  main { padding: 28px 14px 56px; }
  figure, .card { padding: 14px; }
  h2 { margin-top: 44px; }
  th, td { padding-left: 5px; padding-right: 5px; }
  td.value { font-size: 1.05rem; }
}
"""


def page(title: str, body: Sequence[str]) -> str:
    """Return a complete HTML document with plotly's script in it; `body` is HTML."""
    from plotly.offline import get_plotlyjs

    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n"
        "</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, text: str, charts: Sequence[Chart]) -> str:
    """Return a heading, a sentence (both HTML), and charts in one or two columns; nothing at all if there are none."""
    if not charts:
        return ""
    figures = "\n".join(map(_figure, charts))
    return f'<h2>{title}</h2>\n<p class="soft">{text}</p>\n<div class="grid">\n{figures}\n</div>'


def titled(title: str, content: str) -> str:
    """Return a heading and `content` (HTML) below it; nothing if that is empty."""
    return f"<h2>{title}</h2>\n{content}" if content else ""


def _figure(chart: Chart) -> str:
    drawn = chart.figure().to_html(
        full_html=False,
        include_plotlyjs=False,  # once a page, not once a chart
        config={"displayModeBar": False, "responsive": True},  # the bar's buttons would cover the chart's upper right
        # on touch screens, dragging scrolls the page instead of zooming into the chart
        post_script="if (matchMedia('(pointer: coarse)').matches) Plotly.relayout('{plot_id}', {dragmode: false});",
    )
    caption = f"<figcaption><h3>{html.escape(chart.title)}</h3><p>{html.escape(chart.text)}</p></figcaption>"
    return f"<figure>{caption}{drawn}</figure>"


def sample_card(prompt: str, responses: Sequence[tuple[str, str, str]]) -> str:
    """Return a prompt and responses to it, side by side, as HTML.

    Args:
        responses: colour, a line of facts and text of each, as plain text; chats are shown in turns.
    """
    sides = (
        f'<div style="border-color:{color}"><p class="facts">{html.escape(facts)}</p>'
        f'<div class="text">{_chat(text)}</div></div>'
        for color, facts, text in responses
    )
    shown = f'<div class="text prompt">{_chat(prompt)}</div>'
    return f'<div class="card sample">{shown}<div class="pair">{"".join(sides)}</div></div>'


def _chat(text: str) -> str:
    """Return the turns of a chat as HTML, each under its role."""
    return "".join(
        (f'<span class="role">{html.escape(turn.role)}</span>' if turn.role else "") + html.escape(turn.text)
        for turn in turns(text)
    )
