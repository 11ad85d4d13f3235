"""`nemo-eppo report` of one run and of several: what the pages say, and how they look in a real browser."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import assert_fits, look, needs_chromium
from example_run import HOSTILE, write_example_run

from nemo_eppo.cli import main
from nemo_eppo.observability.metrics import read_metrics
from nemo_eppo.observability.recorder import read_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs of a sweep, the last without a gold reward and shorter than the others."""
    root = tmp_path_factory.mktemp("sweep")
    found = []
    for eta, steps in (("0.0", 60), ("2.0", 60), ("20.0", 30)):
        run = root / f"shaping.energy_penalty.eta={eta}" / "actor"
        write_example_run(run, steps, prompts=12, gold=eta != "20.0")
        settings = run / "config.yaml"
        settings.write_text(settings.read_text().replace("eta: 2.0", f"eta: {eta}"))
        found.append(run)
    return found


@pytest.fixture(scope="module")
def pages(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("pages")
    assert main(["report", str(runs[1]), "--output", str(out / "one")]) == 0
    assert main(["report", *map(str, runs), "--output", str(out / "all")]) == 0
    return {"one": out / "one" / "report.html", "all": out / "all" / "comparison.html"}


@needs_chromium
@pytest.mark.parametrize("which", ["one", "all"])
def test_a_page_fits_a_phone_and_a_desktop(which: str, pages: dict[str, Path]) -> None:
    assert_fits(pages[which])


@needs_chromium
def test_the_browser_notices_what_a_page_must_not_have(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width, initial-scale=1"><main>'
        '<p style="width:500px">wide</p><p style="width:50px;overflow:hidden;white-space:nowrap">this is cut off</p>'
        '<p style="width:50px;overflow-x:auto;white-space:nowrap">this one can be scrolled to its end</p></main>'
        "<script>console.error('oops'); missing()</script>"
    )
    seen = look(page, 390)
    assert seen["page"] > 390
    assert seen["wide"] == ["P wide"]
    assert seen["cut"] == ["P this is cut off"]
    assert len(seen["console"]) == 2


def test_several_runs_are_compared_in_every_respect(pages: dict[str, Path], runs: list[Path]) -> None:
    text = pages["all"].read_text()
    titles = re.findall(r"<h3>([^<]*)</h3><p>", text)
    assert titles == [
        "Proxy reward",
        "Gold reward",
        "Energy loss",
        "KL divergence",
        "Response length",
        "Truncated responses",
        *(
            f"Ledger: {term}"
            for term in ("proxy", "energy_penalty", "missing_eos", "divergence", "gold_bonus", "kl", "final")
        ),
        "Seconds per phase",
    ]
    names = [run.parent.name for run in runs]
    gold = _traces(text, "Gold reward")
    assert [trace["name"] for trace in gold if trace.get("hoverinfo") != "skip"] == names[:2]
    penalty = read_metrics(runs[2] / "metrics.jsonl")["reward/energy_penalty"][1]
    (shown,) = (t for t in _traces(text, "Ledger: energy_penalty") if t["name"] == names[2])
    assert shown["legendgroup"] == names[2]
    assert len(penalty) == 30
    bars = {trace["name"]: trace["x"] for trace in _traces(text, "Seconds per phase")}
    for number, run in enumerate(runs):
        curves = read_metrics(run / "metrics.jsonl")
        steps = len(curves["seconds/step"][1])
        assert bars["generate"][number] == pytest.approx(sum(curves["seconds/generate"][1]) / steps)
        total = sum(curves["seconds/step"][1]) + sum(curves["seconds/after_step"][1])
        assert sum(bar[number] for bar in bars.values()) == pytest.approx(total / steps)
    settings = text.split("Settings that differ")[1].split("</table>")[0]
    assert re.findall(r"<td>([^<]*)", settings) == ["shaping.energy_penalty.eta", "0.0", "2.0", "20.0"]
    alarms = text.split("Alarms of the hacking monitor")[1]
    assert [f"<h3>{name}</h3>" in alarms for name in names] == [True] * 3
    assert alarms.count("<td>energy</td>") == 4  # two in each of the longer runs
    assert "No alarm; watched: energy, length." in alarms


def test_the_phases_add_up_to_a_step_and_what_follows_it(pages: dict[str, Path], runs: list[Path]) -> None:
    traces = _traces(pages["one"].read_text(), "Seconds per phase")
    layers = {t["name"]: np.frombuffer(base64.b64decode(t["y"]["bdata"]), t["y"]["dtype"]) for t in traces}
    curves = read_metrics(runs[1] / "metrics.jsonl")
    for number in (8, 9):  # the steps 9 and 10, of which the second validates
        total = curves["seconds/step"][1][number] + curves["seconds/after_step"][1][number]
        assert sum(layer[number] for layer in layers.values()) == pytest.approx(total)
    shares = [int(name.split()[-1].removesuffix("%")) for name in layers]
    assert sum(shares) == pytest.approx(100, abs=len(shares) / 2)


def _traces(text: str, title: str) -> list[dict[str, Any]]:
    chart = text.split(f"<h3>{title}</h3><p>")[1]
    call = re.search(r'Plotly\.newPlot\(\s*"[^"]*",\s*', chart)
    assert call
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(chart, call.end())[0]
    return found


def test_answers_to_the_same_prompts_stand_side_by_side(pages: dict[str, Path], runs: list[Path]) -> None:
    text = pages["all"].read_text().split("Responses at the last validation")[1]
    cards = text.split('<div class="card sample">')[1:]
    assert len(cards) == 6
    for number, card in enumerate(cards):
        assert f"Question {number}: how do I cut an onion?" in card
        for run, step in zip(runs, (60, 60, 30), strict=True):
            row = read_rows(run / "validation" / f"step_0000{step}.jsonl")[number]
            assert f"{run.parent.name}: proxy {row['proxy_reward']:.2f}" in card
            assert row["response"].removesuffix(HOSTILE) in card
    assert "<script>alert" not in pages["all"].read_text()


def test_picture_and_numbers_stand_beside_the_page(pages: dict[str, Path], runs: list[Path]) -> None:
    for page, stem, count in ((pages["one"], "report", 1), (pages["all"], "comparison", 3)):
        assert (page.parent / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
        found = json.loads((page.parent / f"{stem}.json").read_text())["runs"]
        assert len(found) == count
    assert found[runs[2].parent.name]["steps"] == 30
    assert found[runs[2].parent.name]["settings"] == {"shaping.energy_penalty.eta": 20.0}
    assert "reward/gold" not in found[runs[2].parent.name]["final"]


def test_a_run_s_page_goes_into_its_directory_and_names_can_be_chosen(tmp_path: Path) -> None:
    write_example_run(tmp_path / "a", steps=3, prompts=2)
    write_example_run(tmp_path / "b", steps=3, prompts=2)
    assert main(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").is_file()
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--names", "x", "y", "--output", str(out)]) == 0
    assert list(json.loads((out / "comparison.json").read_text())["runs"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "{empty}", "--output", "{empty}"], "{empty} is no run directory of a job: it has no metrics.jsonl"),
        (["{run}", "{once}"], "--output: expected a directory for the comparison of several runs"),
        (["{run}", "{run}", "--output", "{empty}"], "{run} is given more than once"),
        (["{run}", "{once}", "--names", "a", "a", "--output", "{empty}"], "--names: a occurs more than once"),
        (["{once}"], "validation has 1 steps; a report compares the first with the last"),
        (["{torn}"], "config.yaml:1: "),
    ],
)
def test_what_is_no_run_is_named(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: tmp_path / name for name in ("run", "once", "torn", "empty")}
    for name in ("run", "once", "torn"):
        write_example_run(names[name], steps=2, prompts=2)
    (names["once"] / "validation" / "step_000000.jsonl").unlink()
    (names["torn"] / "config.yaml").write_text("a: [\n")
    names["empty"].mkdir()
    assert main(["report", *(text.format(**names) for text in arguments)]) == 2
    assert said.format(**names) in capsys.readouterr().err
    assert not list(names["empty"].iterdir())
