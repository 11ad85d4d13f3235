"""The HTML report, its charts, the table and summary.json."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from example_run import HOSTILE, write_example_run

from nemo_eppo.observability.charts import Series, histogram_chart, line_chart, smoothing_window, stacked_chart
from nemo_eppo.observability.recorder import RolloutRecorder, read_rows
from nemo_eppo.observability.report import report_from_run, summary_table, validation_means, write_summary

_VOID = {"meta", "link", "br", "rect", "line", "circle", "path"}


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
        "Over the course of training",
        "Proxy against gold",
        "Energy loss of single responses",
        "Where the reward comes from, where the time goes",
        "Responses before and after",
        "Largest rise in energy loss",
        "Settings",
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
    assert not {"script", "link", "img", "iframe", "object"} & page.texts.keys()
    assert not [value for name, value in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    text = (run_dir / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    assert len(text) < 600_000
    assert "prefers-color-scheme: dark" in text


def test_what_models_say_is_shown_not_executed(page: _Page, run_dir: Path) -> None:
    shown = "".join(page.texts["main"])
    assert shown.count(HOSTILE) >= 3  # a prompt, a response before, the same response after
    for name in ("step_000000", "step_000060"):
        for row in read_rows(run_dir / "validation" / f"{name}.jsonl")[:6]:
            assert row["prompt"] in shown
            assert row["response"] in shown


def test_the_comparison_shows_means_and_paired_standard_errors(page: _Page, run_dir: Path) -> None:
    old, new = (read_rows(run_dir / "validation" / f"step_0000{step}.jsonl") for step in ("00", "60"))
    changes = [b["gold_reward"] - a["gold_reward"] for a, b in zip(old, new, strict=True)]
    mean = sum(changes) / len(changes)
    error = math.sqrt(sum((c - mean) ** 2 for c in changes) / (len(changes) - 1) / len(changes))
    row = next(text for text in page.texts["tr"] if text.startswith("Gold reward"))
    assert row.endswith(f"{mean:+.3f}± {error:.2g}".replace("-", "\N{MINUS SIGN}"))


def test_the_verdict_names_over_optimisation(page: _Page) -> None:
    assert page.texts["p"][1].startswith("Proxy reward rose while gold reward fell, the mark of over-optimisation.")


def test_charts_show_values_on_hover(page: _Page, run_dir: Path) -> None:
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[7])
    expected = f"PPO step 7\npolicy: {row['energy/policy']:.4g}\nreference (SFT): {row['energy/reference']:.4g}"
    assert expected.replace("-", "\N{MINUS SIGN}") in page.texts["title"]


def test_the_reward_ledger_shows_every_term_and_adds_up(page: _Page, run_dir: Path) -> None:
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[7])
    terms = ["proxy", "energy_penalty", "missing_eos", "divergence", "bonus", "kl", "final"]
    expected = "\n".join(["PPO step 7", *(f"{term}: {row[f'reward/{term}']:.4g}" for term in terms)])
    assert expected.replace("-", "\N{MINUS SIGN}") in page.texts["title"]


def test_without_a_gold_scorer_there_is_no_gold(tmp_path: Path) -> None:
    write_example_run(tmp_path, steps=3, prompts=4, gold=False)
    report_from_run(tmp_path, tmp_path / "report.html")
    page = _Page((tmp_path / "report.html").read_text())
    assert "Gold reward" not in page.texts["h3"]
    assert "Proxy against gold" not in page.texts["h2"]
    assert "no gold scorer tells what that is worth" in page.texts["p"][1]


def test_answers_to_different_prompts_are_not_compared(tmp_path: Path) -> None:
    write_example_run(tmp_path, steps=1, prompts=3)
    path = tmp_path / "validation" / "step_000001.jsonl"
    rows = read_rows(path)
    rows[1]["prompt"] = "another"
    RolloutRecorder(tmp_path / "validation").record(1, rows)
    with pytest.raises(ValueError, match="share 2 prompts"):
        report_from_run(tmp_path, tmp_path / "report.html")


def test_a_run_that_was_validated_once_has_nothing_to_compare(tmp_path: Path) -> None:
    RolloutRecorder(tmp_path / "validation").record(0, [])
    with pytest.raises(ValueError, match="validation has 1 steps"):
        report_from_run(tmp_path, tmp_path / "report.html")


def test_summary_holds_both_means_and_what_the_run_took(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"proxy_reward": 1.0, "gold_reward": None, "energy_loss": -0.5, "response_length": 3},
        {"proxy_reward": 2.0, "gold_reward": None, "energy_loss": -0.7, "response_length": 6},
    ]
    means = validation_means(rows)
    assert means == {"proxy_reward": 1.5, "gold_reward": None, "energy_loss": -0.6, "response_length": 4.5}
    after = {**means, "proxy_reward": 2.25}
    write_summary(tmp_path / "summary.json", means, after, steps=9, tensor_model_parallel_size=2, seconds=12.5)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "before": means,
        "after": after,
        "steps": 9,
        "tensor_model_parallel_size": 2,
        "seconds": 12.5,
    }
    lines = {
        line.split("│")[1].strip(): line.split("│")[2:5] for line in summary_table(means, after).splitlines()[4:-1]
    }
    assert [cell.strip() for cell in lines["Proxy reward"]] == ["1.500", "2.250", "+0.750"]
    assert [cell.strip() for cell in lines["Gold reward"]] == ["n/a", "n/a", "n/a"]


def test_a_measure_that_some_rows_lack_is_an_error() -> None:
    rows: list[dict[str, Any]] = [{"proxy_reward": 1.0}, {"proxy_reward": None}]
    with pytest.raises(ValueError, match="proxy_reward is missing in 1 of 2"):
        validation_means(rows)


def _points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", path)]


def _paths(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    return [_points(d) for d in re.findall(rf'<path class="{kind}"[^>]* d="([^"]*)"', svg)]


def test_a_line_is_drawn_to_the_scale_of_its_ticks() -> None:
    svg = line_chart([Series("a", "proxy", [0, 5, 10], [-1.0, 3.0, 1.0])], "PPO step", "reward")
    ticks = {
        float(value.replace("\N{MINUS SIGN}", "-")): float(y)
        for y, value in re.findall(r'<text class="end" x="[\d.]+" y="([\d.]+)" dy=".32em">([^<]*)<', svg)
    }
    per_unit = (ticks[0.0] - ticks[2.0]) / 2
    (line,) = _paths(svg, "line")
    assert [(ticks[0.0] - y) / per_unit for _, y in line] == pytest.approx([-1.0, 3.0, 1.0], abs=0.01)
    assert line[1][0] - line[0][0] == pytest.approx(line[2][0] - line[1][0], abs=0.2)


def test_a_long_noisy_line_is_shown_with_its_running_mean() -> None:
    values = [float(i % 2) for i in range(200)]
    svg = line_chart([Series("a", "proxy", range(200), values)], "PPO step", "reward")
    (raw,), (smooth,) = _paths(svg, "faint"), _paths(svg, "line")
    height = max(y for _, y in raw) - min(y for _, y in raw)
    inner = [y for _, y in smooth[10:-10]]
    assert max(inner) - min(inner) < height / smoothing_window(200) * 1.1
    assert smoothing_window(39) == 1


def test_ten_thousand_steps_stay_a_small_file() -> None:
    steps = range(10_000)
    svg = line_chart([Series("a", "proxy", steps, [math.sin(s / 900) for s in steps])], "PPO step", "reward")
    assert len(svg) < 80_000


def test_layers_stand_on_each_other() -> None:
    layers = [Series("a", "p0", [1, 2], [1.0, 2.0]), Series("b", "p1", [1, 2], [3.0, 1.0])]
    lower, upper = _paths(stacked_chart(layers, "PPO step", "seconds"), "layer")
    ground = max(y for _, y in lower)
    unit = ground - lower[0][1]  # the first layer is 1 s high at step 1
    assert [(ground - y) / unit for _, y in lower] == pytest.approx([1, 1, 2, 2, 0, 0, 0, 0], abs=0.02)
    assert [(ground - y) / unit for _, y in upper] == pytest.approx([4, 4, 3, 3, 2, 2, 1, 1], abs=0.02)


def test_a_histogram_shows_shares_of_groups_of_different_size() -> None:
    groups = [Series("few", "before", [], [0.0, 1.0]), Series("many", "after", [], [0.0, 0.1] * 50 + [1.0] * 100)]
    svg = histogram_chart(groups, "energy loss")
    few, many = _paths(svg, "bars")
    ground = few[0][1]
    assert ground - few[1][1] == pytest.approx(ground - few[-2][1])  # one half at each end
    assert many[-2][1] == few[-2][1]  # and so has the large group at its upper end
    assert [round(float(x), 1) for x in re.findall(r'<line class="average"[^>]* x1="([\d.]+)"', svg)] == pytest.approx(
        [(few[0][0] + few[-1][0]) / 2, few[0][0] + 0.525 * (few[-1][0] - few[0][0])], abs=0.2
    )


@pytest.mark.parametrize("values", [[0.0, 0.0], [-3.0, -3.0], [1e-9, 2e-9], [1e9, 3e9]])
def test_any_scale_can_be_drawn(values: list[float]) -> None:
    series = Series("a", "proxy", [1, 2], values)
    for svg in (line_chart([series], "PPO step", "reward"), histogram_chart([series], "energy loss")):
        assert "nan" not in svg
        assert len(re.findall(r'dy=".32em"', svg)) >= 2
