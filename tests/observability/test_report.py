"""The HTML report, its charts, the table and summary.json."""

import base64
import html
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_run import HOSTILE, write_example_run
from plotly.offline import get_plotlyjs

from nemo_eppo.observability.charts import (
    COLORS,
    GRAY,
    Chart,
    Histogram,
    Lines,
    Scatter,
    Series,
    Stack,
    smoothing_window,
)
from nemo_eppo.observability.chat import turns
from nemo_eppo.observability.recorder import read_rows, record
from nemo_eppo.observability.report import report_from_run, summary_table, validation_means
from nemo_eppo.observability.report_tables import alarms_table


class _Page(HTMLParser):
    """Checks that elements nest, and collects texts by element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.texts.setdefault(tag, []).append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.texts.setdefault(tag, [])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def _charts(page: str) -> dict[str, list[dict[str, Any]]]:
    """The traces of every chart by its title, as the page hands them to plotly's script."""
    found = {}
    for title, rest in re.findall(r"<h3>([^<]*)</h3>(.*?)</figure>", page, re.DOTALL):
        call = re.search(r'Plotly\.newPlot\(\s*"[^"]*",\s*', rest)
        assert call
        traces, _ = json.JSONDecoder().raw_decode(rest, call.end())
        for trace in traces:
            for axis in ("x", "y"):
                if isinstance(trace.get(axis), dict):  # how plotly writes a numpy array
                    trace[axis] = np.frombuffer(base64.b64decode(trace[axis]["bdata"]), trace[axis]["dtype"]).tolist()
        found[title] = traces
    return found


def _read(traces: list[dict[str, Any]], step: int) -> dict[str, float]:
    """What pointing at a step shows."""
    lines = [trace for trace in traces if trace.get("hoverinfo") != "skip"]
    return {line["name"]: line["y"][line["x"].index(step)] for line in lines if step in line["x"]}


@pytest.fixture(scope="module")
def charts(page: _Page, run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    return _charts((run_dir / "report.html").read_text())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "ppo <actor>"
    write_example_run(directory)
    return directory


@pytest.fixture(scope="module")
def page(run_dir: Path) -> _Page:
    report_from_run(run_dir, run_dir / "report.html")
    return _Page((run_dir / "report.html").read_text())


def test_the_report_has_every_section(page: _Page) -> None:
    assert page.texts["h1"] == ["PPO run ppo <actor>"]
    assert page.texts["h2"] == [
        "Settings",
        "Alarms of the hacking monitor",
        "Over the course of training",
        "Proxy against gold",
        "Energy loss of single responses",
        "Where the reward comes from, where the time goes",
        "Responses before and after",
        "Largest rise in energy loss",
        "All settings",
    ]
    assert page.texts["h3"] == [
        "Proxy reward",
        "Gold reward",
        "Energy loss",
        "KL divergence",
        "Response length",
        "Truncated responses",
        "The path of training",
        "Single responses",
        "Before and after training",
        "After training: exploited and other responses",
        "Reward ledger",
        "Seconds per phase",
    ]


def test_the_report_is_one_file_that_asks_for_nothing(page: _Page, run_dir: Path) -> None:
    assert not {"link", "img", "iframe", "object"} & page.texts.keys()
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    text = (run_dir / "report.html").read_text()
    own, *others = text.split(get_plotlyjs())
    assert len(others) == 1  # the script is there once
    own += others[0]
    for words in ("@import", "url("):
        assert words not in own
    shown = set(re.findall(r"http[^<\s,]*", own))  # as text: no attribute takes anything from elsewhere, see above
    assert shown == {"http://127.0.0.1:5555", "http://127.0.0.1:5556"}
    assert len(own) < 600_000
    assert "prefers-color-scheme: dark" in own


def test_what_models_say_is_shown_not_executed(page: _Page, run_dir: Path) -> None:
    shown = "".join(page.texts["main"])
    assert shown.count(HOSTILE) >= 3  # a prompt, a response before, the same response after
    for name in ("step_000000", "step_000060"):
        for row in read_rows(run_dir / "validation" / f"{name}.jsonl")[:6]:
            assert row["prompt"].removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0] in shown
            assert row["response"] in shown


def test_what_models_say_is_no_markup_in_a_chart(
    page: _Page, run_dir: Path, charts: dict[str, list[dict[str, Any]]]
) -> None:
    assert "<script>alert" not in (run_dir / "report.html").read_text()  # would be executed
    note = charts["Single responses"][0]["text"][0]  # plotly makes <br> a new line, and would make <b> bold letters
    assert "<" not in note.replace("<br>", "")
    (row, *_) = read_rows(run_dir / "validation" / "step_000000.jsonl")
    assert (
        html.unescape(note).replace("<br>", " ").split()
        == row["prompt"].split("\n")[1].removesuffix("<|im_end|>").strip()[:80].split()
    )


def test_the_comparison_shows_means_and_paired_standard_errors(page: _Page, run_dir: Path) -> None:
    old, new = (read_rows(run_dir / "validation" / f"step_0000{step}.jsonl") for step in ("00", "60"))
    changes = [b["gold_reward"] - a["gold_reward"] for a, b in zip(old, new, strict=True)]
    mean = sum(changes) / len(changes)
    error = math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes))
    row = next(text for text in page.texts["tr"] if text.startswith("Gold reward"))
    assert row.endswith(f"{mean:+.3f}± {error:.2g}".replace("-", "\N{MINUS SIGN}"))


def test_the_settings_that_tell_runs_apart_are_rows_and_what_a_run_has_not_is_none(page: _Page) -> None:
    rows = [text for text in page.texts["tr"] if text]
    for row in (
        "Methodeppo",
        "Advantage estimatorgae",
        "Weight η of the energy penalty2.0",
        "Learning rate of the policy5e-07",
        "Policy and referencemodels/sft",
        "Critichttp://127.0.0.1:5555",
        f"Rewardshttp://127.0.0.1:5556, own:reward{HOSTILE}",
        "Training promptsdata/prompts.train.jsonl",
        "Started2026-11-29 07:12 UTC",
        "Versionsnemo_eppo 0.1.0, torch 2.9.0",
    ):
        assert row in rows
    for absent in ("Validation prompts", "Learning rate of the critic", "Held-out reward", "Gold reward own"):
        assert not [row for row in rows if row.startswith(absent)]


def test_alarms_have_step_indicator_value_threshold_and_action(page: _Page) -> None:
    (head,) = (index for index, row in enumerate(page.texts["tr"]) if row.startswith("PPO step"))
    assert page.texts["tr"][head + 1 : head + 3] == ["41energy6.155.0log", "57energy8.555.0log"]


def test_no_alarm_is_said_and_no_monitor_is_not() -> None:
    quiet = {"monitor/length": ([1], [0.1]), "monitor/length/alarm": ([1], [0.0])}
    assert alarms_table(quiet, {}) == '<p class="soft">No alarm; watched: length.</p>'
    assert alarms_table({"reward/final": ([1], [0.0])}, {}) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain <s>text</s> of <|x|> mine", [("", "plain <s>text</s> of <|x|> mine")]),
        (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n",
            [("system", "Be kind."), ("user", "Hi\nthere")],
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            [("user", "Hi")],
        ),
        (
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes<end_of_turn>\n",
            [("user", "Hi"), ("model", "Yes")],
        ),
        ("<|user|>\nHi<|end|>\n<|assistant|>\n", [("user", "Hi")]),
        (
            "<s>[INST] Hi [/INST] Yes</s>[INST] Why?[/INST]",
            [("user", " Hi "), ("assistant", " Yes"), ("user", " Why?")],
        ),
        ("Yes, it is.</s>", [("", "Yes, it is.")]),
        ("<turn|user>Hi", [("", "<turn|user>Hi")]),  # an unknown marker stays
        ("", []),
    ],
)
def test_markers_of_chats_become_turns(text: str, expected: list[tuple[str, str]]) -> None:
    assert turns(text) == expected


def test_the_page_shows_roles_without_markers(page: _Page) -> None:
    assert {"user"} == set(page.texts["span"])
    assert "<|im_" not in "".join(page.texts["main"])


def test_the_verdict_names_over_optimisation(page: _Page) -> None:
    assert page.texts["p"][1].startswith("Proxy reward rose while gold reward fell, the mark of over-optimisation.")


def test_charts_show_values_on_hover(charts: dict[str, list[dict[str, Any]]], run_dir: Path) -> None:
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[7])
    expected = {"policy": row["energy/policy"], "reference (SFT)": row["energy/reference"]}
    assert _read(charts["Energy loss"], step=7) == pytest.approx(expected, rel=1e-6)


def test_the_reward_ledger_shows_every_term_and_adds_up(charts: dict[str, list[dict[str, Any]]], run_dir: Path) -> None:
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[7])
    terms = ["proxy", "energy_penalty", "missing_eos", "divergence", "gold_bonus", "kl", "final"]
    shown = _read(charts["Reward ledger"], step=7)
    assert shown == pytest.approx({term: row[f"reward/{term}"] for term in terms}, rel=1e-6)
    final = shown.pop("final")
    assert sum(shown.values()) == pytest.approx(final, abs=1e-5)


def test_a_band_shows_the_standard_error_of_the_validation_mean(
    charts: dict[str, list[dict[str, Any]]], run_dir: Path
) -> None:
    values = np.array([row["gold_reward"] for row in read_rows(run_dir / "validation" / "step_000060.jsonl")])
    low, high, mean = (trace for trace in charts["Gold reward"] if trace["name"] == "validation")
    assert high["fill"] == "tonexty"  # the area between the two edges
    assert mean["y"][-1] == pytest.approx(values.mean(), rel=1e-6)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert [low["y"][-1], high["y"][-1]] == pytest.approx([values.mean() - error, values.mean() + error], rel=1e-5)


def test_plotly_is_imported_for_a_report_only() -> None:
    code = "import sys, nemo_eppo.observability.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_a_gold_reward_the_report_has_none(tmp_path: Path) -> None:
    write_example_run(tmp_path, steps=3, prompts=4, gold=False)
    report_from_run(tmp_path, tmp_path / "report.html")
    page = _Page((tmp_path / "report.html").read_text())
    assert "Gold reward" not in page.texts["h3"]
    assert "Proxy against gold" not in page.texts["h2"]
    assert "there is no gold reward to compare it with" in page.texts["p"][1]
    assert [row.split(" reward")[0] for row in page.texts["tr"] if " rewardWhat " in row] == ["Proxy"]


def test_a_held_out_reward_has_a_panel_with_its_validation(tmp_path: Path) -> None:
    write_example_run(tmp_path, steps=3, prompts=4)
    for file, name in ((tmp_path / "metrics.jsonl", "reward/held_out"), *(
        (file, "held_out_reward") for file in (tmp_path / "validation").iterdir()
    )):  # fmt: skip
        file.write_text("".join(json.dumps(row | {name: 0.5}) + "\n" for row in read_rows(file)))
    report_from_run(tmp_path, tmp_path / "report.html")
    traces = _charts((tmp_path / "report.html").read_text())["Held-out reward"]
    assert _read(traces, step=3) == {"rollouts": 0.5, "validation": 0.5}


def test_answers_to_different_prompts_are_not_compared(tmp_path: Path) -> None:
    write_example_run(tmp_path, steps=1, prompts=3)
    path = tmp_path / "validation" / "step_000001.jsonl"
    rows = read_rows(path)
    rows[1]["prompt"] = "another"
    record(tmp_path / "validation", 1, rows)
    with pytest.raises(ValueError, match="share 2 prompts"):
        report_from_run(tmp_path, tmp_path / "report.html")


def test_a_run_that_was_validated_once_has_nothing_to_compare(tmp_path: Path) -> None:
    record(tmp_path / "validation", 0, [])
    with pytest.raises(ValueError, match="validation has 1 steps"):
        report_from_run(tmp_path, tmp_path / "report.html")


def test_the_summary_shows_both_means_and_their_change() -> None:
    rows: list[dict[str, Any]] = [
        {"proxy_reward": 1.0, "gold_reward": None, "energy_loss": -0.5, "response_length": 3},
        {"proxy_reward": 2.0, "gold_reward": None, "energy_loss": -0.7, "response_length": 6},
    ]
    means = validation_means(rows)
    assert means == {"proxy_reward": 1.5, "gold_reward": None, "energy_loss": -0.6, "response_length": 4.5}
    after = {**means, "proxy_reward": 2.25}
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:5] for line in summary_table(means, after).splitlines()[4:-1]
    }
    assert [cell.strip() for cell in lines["Proxy reward"]] == ["1.500", "2.250", "+0.750"]
    assert "Gold reward" not in lines


def test_a_measure_that_some_rows_lack_is_an_error() -> None:
    rows: list[dict[str, Any]] = [{"proxy_reward": 1.0}, {"proxy_reward": None}]
    with pytest.raises(ValueError, match="proxy_reward is missing in 1 of 2"):
        validation_means(rows)


def test_a_long_noisy_line_is_shown_with_its_running_mean() -> None:
    values = np.random.default_rng(0).normal(size=200).tolist()
    raw, smooth = Lines("", "", [Series("a", GRAY, range(200), values)], "PPO step", "reward").figure().data
    assert raw.y == pytest.approx(values, rel=1e-6)
    half = smoothing_window(200) // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(200)]
    assert smooth.y == pytest.approx(expected, rel=1e-5)
    assert (raw.hoverinfo, smooth.hoverinfo) == (None, "skip")  # pointing at the chart shows what was measured
    assert smoothing_window(39) == 1


def test_a_short_line_shows_its_points() -> None:
    (line,) = Lines("", "", [Series("a", GRAY, [0, 5, 10], [-1.0, 3.0, 1.0])], "PPO step", "reward").figure().data
    assert (list(line.x), list(line.y), line.mode) == ([0, 5, 10], [-1.0, 3.0, 1.0], "lines+markers")


def test_a_band_reaches_as_far_below_and_above_as_it_says() -> None:
    for error, low, high in (([1.0, 2.0], [2.0, 2.0], [4.0, 6.0]), (([1.0, 2.0], [0.0, 5.0]), [2.0, 2.0], [3.0, 9.0])):
        lower, upper, _ = (
            Lines("", "", [Series("a", GRAY, [0, 1], [3.0, 4.0], error)], "PPO step", "reward").figure().data
        )
        assert (list(lower.y), list(upper.y)) == (low, high)


def test_a_very_long_run_stays_a_small_file() -> None:
    steps = range(200_000)  # a running mean that adds up its window for every point would take minutes
    chart = Lines(
        "", "", [Series("a", GRAY, steps, [math.sin(s / 9000) for s in steps])], "PPO step", "reward"
    ).figure()
    assert len(chart.to_json()) < 80_000
    assert chart.data[0].y == pytest.approx(np.sin(chart.data[0].x / 9000), abs=1e-3)


def test_layers_stand_on_each_other() -> None:
    layers = [Series("a", GRAY, [1, 2], [1.0, 2.0]), Series("b", COLORS[0], [1, 2], [3.0, 1.0])]
    lower, upper = Stack("", "", layers, "PPO step", "seconds").figure().data
    assert lower.stackgroup == upper.stackgroup  # plotly adds up the layers of one group
    assert [list(lower.y), list(upper.y)] == [[1.0, 2.0], [3.0, 1.0]]


def test_a_cloud_has_a_ring_at_its_mean_and_a_path_has_none() -> None:
    group = Series("a", GRAY, [0.0, 1.0, 5.0], [3.0, 3.0, 0.0])
    cloud, ring = Scatter("", "", [group], "proxy", "gold").figure().data
    assert (list(cloud.x), list(ring.x), list(ring.y)) == ([0.0, 1.0, 5.0], [2.0], [2.0])
    (path,) = Scatter("", "", [group], "proxy", "gold", joined=True).figure().data
    assert path.mode == "lines+markers"
    assert list(path.marker.opacity) == sorted(path.marker.opacity)


def test_a_histogram_shows_shares_of_groups_of_different_size() -> None:
    groups = [Series("few", GRAY, [], [0.0, 1.0]), Series("many", COLORS[0], [], [0.0, 0.1] * 50 + [1.0] * 100)]
    chart = Histogram("", "", groups, "energy loss").figure()
    assert [list(trace.x) for trace in chart.data] == [group.y for group in groups]
    assert {(trace.histnorm, trace.bingroup) for trace in chart.data} == {("percent", "all")}  # shares, in equal bins
    assert [line.x0 for line in chart.layout.shapes] == pytest.approx([0.5, 0.525])  # the means


@pytest.mark.parametrize("values", [[0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [1e9, 3e9], [2.0]])
def test_any_scale_can_be_drawn(values: list[float]) -> None:
    series = [Series("a", GRAY, list(range(len(values))), values)]
    charts: tuple[Chart, ...] = (
        Lines("", "", series, "PPO step", "reward"),
        Stack("", "", series, "PPO step", "seconds"),
        Scatter("", "", series, "proxy", "gold"),
        Histogram("", "", series, "energy loss"),
    )
    for figure in (chart.figure() for chart in charts):
        assert "NaN" not in figure.to_json()
        assert figure.data
