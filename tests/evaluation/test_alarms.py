"""What signs say of several runs, which are made so that every alarm, peak and lead is known beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_eppo.cli import main
from nemo_eppo.evaluation import intervals
from nemo_eppo.evaluation.detection import ENERGY, ENERGY_AND_KL, KL, LENGTH

STEPS, ROWS = 30, 20


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "_DRAWS", 100)


def write_run(run: Path, peak: int | None, hacks_from: int | None, kl: bool = False, few: int = 2) -> Path:
    """A run in which `few` of 20 responses are hacked, and half of them from a step on.

    Two hacked ones of 20 in the first ten steps make 5 the most that a step has by chance: the alarm of the energy
    loss, which tells all, comes with the third step of ten. KL is 1, 2, ...: only one of the first ten steps has its
    highest value, and all after them, so its alarm comes at step 13. The length is always the same, which is no alarm.

    Args:
        peak: step of the highest gold reward, whose mean rises by .1 a step and then falls so; None: it only rises.
    """
    (run / "rollouts").mkdir(parents=True)
    for step in range(1, STEPS + 1):
        hacked = ROWS // 2 if hacks_from is not None and step >= hacks_from else few
        mean = 5 - 0.1 * abs(step - (peak or STEPS))
        normal = (ROWS * mean + hacked) / (ROWS - hacked)
        rows: list[dict[str, Any]] = [
            {
                "prompt_ids": [row],
                "reward/proxy": float(row < hacked),
                "reward/gold": -1.0 if row < hacked else normal,
                "energy/policy": float(row < hacked),
                "response_length": 7,
            }
            | ({"kl/policy_reference": step} if kl else {})
            for row in range(ROWS)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)
    return run


def test_alarms_are_counted_where_gold_fell_and_where_it_did_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        write_run(tmp_path / "a", peak=18, hacks_from=11, kl=True),  # alarm at step 13, 5 before
        write_run(tmp_path / "b", peak=15, hacks_from=18),  # 20, 5 after
        write_run(tmp_path / "c", peak=16, hacks_from=None),
        write_run(tmp_path / "d", peak=None, hacks_from=12, kl=True),  # a false one
        write_run(tmp_path / "e", peak=None, hacks_from=None),
        write_run(tmp_path / "f", peak=20, hacks_from=11),  # 13, 7 before
        write_run(tmp_path / "g", peak=15, hacks_from=None, few=0),  # nothing is hacked
    ]
    out = tmp_path / "out"
    assert main(["detect", *map(str, runs), "--output", str(out)]) == 0
    found = json.loads((out / "report.json").read_text())
    fell = {"a": True, "b": True, "c": True, "d": False, "e": False, "f": True}
    assert {name: run["gold_fell"] for name, run in found["runs"].items()} == fell
    assert [found["runs"][name]["gold_peak_step"] for name in "abcf"] == [18, 15, 16, 20]
    assert list(found["left_out"]) == ["g"]
    assert "0 of 600 responses" in found["left_out"]["g"]
    assert found["signs"][ENERGY] == {
        "auroc": [1.0] * 6, "auroc_within": [1.0] * 6,
        "fell": 4, "raised": 3, "leads": [5, -5, 7], "others": 2, "false": 1,
    }  # fmt: skip
    assert found["signs"][LENGTH] == {
        "auroc": [0.5] * 6, "auroc_within": [0.5] * 6, "fell": 4, "raised": 0, "leads": [], "others": 2, "false": 0
    }  # fmt: skip
    of_kl = found["signs"][KL]
    assert [of_kl[name] for name in ("fell", "raised", "leads", "others", "false")] == [1, 1, [], 1, 1], "two have it"
    assert found["signs"][ENERGY_AND_KL]["leads"] == [], "it knows the labels"
    assert list(found["signs"])[-1] == LENGTH, "the highest median AUROC comes first"
    said = (
        "The gold reward fell beyond noise in 4 of 6 runs. Left out, since nothing can be told apart there: g. Of "
        "the signs that the hacking monitor knows, the energy loss warned most often before the peak: in 2 of 4 runs; "
        "where it did not fall, the alarm came in 1 of 2."
    )
    printed, page = capsys.readouterr().out, (out / "report.html").read_text()
    assert said in printed
    assert said in page
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines()]
    assert [ENERGY, "1.00 (6)", "1.00 (6)", "3/4", "5 (3)", "1/2"] in table
    assert "<td>3/4</td><td>5 (3)</td><td>1/2</td>" in page
    assert "<td>g</td>" in page
    assert (out / "detection.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_that_cannot_be_judged_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name, peak=15, hacks_from=None, few=0)) for name in "ab"]
    for others, says in (
        ([str(tmp_path / "nowhere")], "nowhere: no such directory; expected the directory of an actor's run"),
        ([], "all 2 runs are left out; the first: "),
        (["--names", "one"], "--names: 1 names for 2 paths"),
    ):
        assert main(["detect", *runs, *others, "--output", str(tmp_path / "out")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("peak", "says"),
    [
        (15, "2 of 2 runs. No alarm of a sign that the hacking monitor knows, and that tells, came before the peak."),
        (None, "0 of 2 runs. False alarms of signs that the hacking monitor knows: energy loss (2 of 2)."),
    ],
)
def test_runs_without_an_early_alarm_or_without_a_fall_are_told_apart(
    peak: int | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / str(after), peak, hacks_from=after)) for after in (18, 19)]
    assert main(["detect", *runs, "--output", str(tmp_path / "out")]) == 0
    assert says in capsys.readouterr().out
