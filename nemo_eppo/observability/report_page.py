"""The look of the HTML report: one page without scripts or requests, light and dark, wide and narrow."""

import html
from collections.abc import Sequence

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #fff; --ink: #1d2127; --soft: #626a75; --line: #e3e0d8;
  --proxy: #2f6fde; --gold: #b07d12; --after: #d9482b; --before: #7b8694; --kl: #7a55d3; --length: #1f8f67;
  --p0: #2f6fde; --p1: #d9482b; --p2: #1f8f67; --p3: #b07d12; --p4: #7a55d3;
  --p5: #1797a6; --p6: #c2478f; --p7: #75902b; --p8: #8d6a4f; --p9: #4b5f86; --other: #c3c7cc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e8e9ea; --soft: #9aa3ae; --line: #30363e;
    --proxy: #6ea1ff; --gold: #e0b04a; --after: #ff7a5c; --before: #98a4b3; --kl: #ab8ff5; --length: #4fc796;
    --p0: #6ea1ff; --p1: #ff7a5c; --p2: #4fc796; --p3: #e0b04a; --p4: #ab8ff5;
    --p5: #4cc4d2; --p6: #ee82bd; --p7: #a9c55c; --p8: #c39d80; --p9: #8aa0cc; --other: #545c66;
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
p { margin: 8px 0; max-width: 70ch; }
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
.legend {
  display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0; padding: 0; list-style: none; font-size: .84rem;
}
.legend i {
  display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; vertical-align: -1px;
}
svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 11.5px; }
text { fill: var(--soft); font-variant-numeric: tabular-nums; }
.end { text-anchor: end; }
.middle { text-anchor: middle; }
line.rule { stroke: var(--line); }
line.zero { stroke: var(--soft); stroke-opacity: .6; }
path.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
path.faint { fill: none; stroke-width: 1; stroke-opacity: .38; }
path.layer { stroke: var(--card); stroke-width: .6; }
path.bars { fill-opacity: .28; stroke-width: 1.6; }
line.average { stroke-width: 1.6; stroke-dasharray: 5 4; }
circle.point { stroke: var(--card); stroke-width: .8; }
circle.mean { stroke: var(--ink); stroke-width: 1.8; }
.hover rect { fill: transparent; }
.hover path { stroke: var(--soft); opacity: 0; }
.hover:hover path { opacity: .8; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 500; font-size: .86rem; color: var(--soft); text-align: right; padding: 4px 12px 8px; }
td { text-align: right; padding: 11px 12px; border-top: 1px solid var(--line); white-space: nowrap; }
td:first-child { text-align: left; padding-left: 0; white-space: normal; }
td small { display: block; line-height: 1.3; }
td.value { font-size: 1.3rem; font-weight: 600; letter-spacing: -.01em; }
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
  svg { font-size: 14px; }
  h2 { margin-top: 44px; }
  th, td { padding-left: 5px; padding-right: 5px; }
  td.value { font-size: 1.05rem; }
}
"""


def page(title: str, body: Sequence[str]) -> str:
    """A complete document; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, text: str, content: Sequence[str]) -> str:
    """A heading, a sentence, and figures in one or two columns; nothing at all if there are no figures."""
    if not content:
        return ""
    return f'<h2>{title}</h2>\n<p class="soft">{text}</p>\n<div class="grid">\n' + "\n".join(content) + "\n</div>"


def figure(title: str, text: str, chart: str, legend: Sequence[tuple[str, str]] = ()) -> str:
    """A chart with its caption. `legend` pairs labels with colour names."""
    keys = "".join(f'<li><i style="background:var(--{color})"></i>{html.escape(label)}</li>' for label, color in legend)
    caption = f'<h3>{title}</h3><p>{text}</p><ul class="legend">{keys}</ul>'
    return f"<figure><figcaption>{caption}</figcaption>{chart}</figure>"
