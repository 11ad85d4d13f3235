"""Tables of the reports, as HTML and for terminals: a run's settings, the alarms of its monitor, any plain table."""

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemo_eppo.config import read_yaml, value_at
from nemo_eppo.observability.metrics import Curves

START = "# start: "
"""Begins the line of config.yaml that holds, in JSON, the run's method, versions and start time."""
VERSIONS = ("nemo_eppo", "torch", "megatron-core")
"""Packages whose versions that line holds."""


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Read the settings in a run's config.yaml, and the object in its START line (empty in files without it).

    Raises:
        ConfigError: it is not YAML.
    """
    text = path.read_text(encoding="utf-8")
    started = next((line.removeprefix(START) for line in text.splitlines() if line.startswith(START)), "{}")
    return read_yaml(path) or {}, json.loads(started)


def settings_table(config: Mapping[str, Any], start: Mapping[str, str]) -> str:
    """Return the main settings of an actor's run as HTML, without rows for settings that it does not have."""
    rewards = [_source(reward) for reward in value_at(config, "rewards") or []]
    rows = {
        "Method": start.get("method"),
        "Advantage estimator": value_at(config, "ppo.advantages.estimator"),
        "Weight &eta; of the energy penalty": value_at(config, "shaping.energy_penalty.eta"),
        "KL coefficient": value_at(config, "shaping.kl.coefficient"),
        "Learning rate of the policy": value_at(config, "optimizer.lr"),
        "Learning rate of the critic": value_at(config, "critic.colocated.optimizer.lr"),
        "Policy and reference": value_at(config, "model.restore_from_path"),
        "Critic": _source(value_at(config, "critic")),
        "Rewards": ", ".join(filter(None, rewards)),
        "Held-out reward": _source(value_at(config, "held_out_reward")),
        "Gold reward": value_at(config, "gold_reward"),
        "Training prompts": value_at(config, "data.train"),
        "Validation prompts": value_at(config, "data.validation"),
        "Seed": value_at(config, "seed"),
        "Started": start.get("time"),
        "Versions": ", ".join(f"{name} {start[name]}" for name in VERSIONS if name in start),
    }
    cells = [(label, html.escape(str(value))) for label, value in rows.items() if value not in (None, "")]
    return table([], cells, "settings") if cells else ""


def alarms_table(curves: Curves, config: Mapping[str, Any]) -> str:
    """Return the alarms of the hacking monitor as HTML, by step; nothing if no indicator was measured.

    Args:
        curves: the run's metrics by name, each with its steps and values.
        config: the run's settings, for thresholds and actions.
    """
    watched = [name.split("/")[1] for name in curves if name.startswith("monitor/") and name.endswith("/alarm")]
    if not watched:
        return ""
    rows = []
    user_defined = {indicator["name"]: indicator for indicator in value_at(config, "monitor.indicators") or ()}
    for name in watched:
        values = dict(zip(*curves[f"monitor/{name}"], strict=True))
        settings = user_defined.get(name) or value_at(config, f"monitor.{name}") or {}
        limits = [html.escape(str(settings.get(key, ""))) for key in ("threshold", "action")]
        steps = [step for step, alarm in zip(*curves[f"monitor/{name}/alarm"], strict=True) if alarm]
        rows += [(step, html.escape(name), f"{values[step]:.3g}", *limits) for step in steps]
    if not rows:
        return f'<p class="soft">No alarm; watched: {html.escape(", ".join(watched))}.</p>'
    head = ["PPO step", "Indicator", "Value", "Threshold", "Action"]
    return table(head, [tuple(map(str, row)) for row in sorted(rows)], "alarms")


def plain_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML; the first row is its head, the cells are plain text."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    return table(head, body, "plain")


def text_table(title: str, rows: Sequence[Sequence[str]], width: int = 120) -> str:
    """Return a table as text for a terminal of `width` columns; the first row is its head."""
    (first, *others), *body = rows
    shown = Table(title=title, title_justify="left")
    shown.add_column(first)
    for column in others:
        shown.add_column(column, justify="right")
    for row in body:
        shown.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=width).print(shown)
    return text.getvalue()


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """Return a table of CSS class `name` in a card; cells are HTML, and an empty `head` makes no head row."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="card scroll"><table class="{name}">{f"<tr>{top}</tr>" if top else ""}{lines}</table></div>'


def _source(source: Mapping[str, Any] | None) -> str | None:
    """Return the origin of a critic or a reward: a function, a model's path, or a server's address."""
    paths = ("function", "colocated.restore_from_path", "server.url")
    return next(filter(None, (value_at(source, path) for path in paths)), None)
