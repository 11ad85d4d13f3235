"""`nemo-eppo judge` against an endpoint that misbehaves, through interruptions, and by a gold reward."""

import json
import multiprocessing
import os
import pty
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from judge_server import KEY, JudgeServer, judge_server
from scipy.stats import binomtest
from small_data import read_rows

from nemo_eppo.cli import main
from nemo_eppo.evaluation.intervals import estimate_share
from nemo_eppo.tools.noun_task import quality, sample_prompt, sample_sft_response

FAULTS = ("429", "500", "cut", "no JSON", "half", "wrong JSON", "wrong verdict", "no choices", "no content")
PROMPTS = [f"prompt {number}" for number in range(8)]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def write(path: Path, responses: list[str], prompts: list[str] = PROMPTS, **fields: Any) -> Path:
    rows = [{"prompt": prompt, "response": text, **fields} for prompt, text in zip(prompts, responses, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    return write(tmp_path / "sft.jsonl", ["three words each"] * 8)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Longer than the baseline 4 times, as long 1 time, shorter 2 times, and equal to it once."""
    longer, shorter = "this one has five words", "short"
    return write(tmp_path / "step_20.jsonl", [longer] * 4 + ["as long as"] + [shorter] * 2 + ["three words each"])


def arguments(server: JudgeServer, output: Path, *files: Path, baseline: Path) -> list[str]:
    texts = ["judge", *map(str, files), "--baseline", str(baseline), "--output", str(output), "--model", "m"]
    return [*texts, "--base-url", server.url]


def summary(output: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "summary.json").read_text())["checkpoints"][name]
    return found


def test_every_fault_is_outlived_and_both_orders_are_asked_once(answers: Path, baseline: Path, tmp_path: Path) -> None:
    output = tmp_path / "judged"
    with judge_server(faults=FAULTS) as server:
        assert main([*arguments(server, output, answers, baseline=baseline), "--yes"]) == 0
        wanted = {
            (prompt, *texts)
            for prompt, row in zip(PROMPTS, read_rows(answers), strict=True)
            for texts in ((row["response"], "three words each"), ("three words each", row["response"]))
            if row["response"] != "three words each"
        }
        assert set(server.answered) == wanted
        assert set(server.answered.values()) == {1}
        assert len(server.requests) == 2 * len(wanted), "each question failed once"
        waits = _waits(server)
        assert min(waits) > 0.35  # the library waits 0.5 s, less a quarter at random
        assert sum(wait >= 0.7 for wait in waits) >= 2  # as the 429 said
        body = server.requests[0]
        assert body["response_format"]["json_schema"]["schema"]["required"] == ["reason", "verdict"]
        assert (body["model"], body["temperature"], body["max_completion_tokens"]) == ("m", 0.0, 1024)
    rows = read_rows(output / "verdicts.jsonl")
    assert [row["verdict"] for row in rows] == ["win"] * 4 + ["tie"] + ["lose"] * 2 + ["tie"]
    assert rows[0]["shown_first"] == rows[0]["shown_second"] == "win"
    assert rows[0]["reasons"] == ["23 against 16", "16 against 23"]
    assert rows[7]["equal"] is True
    found = summary(output, "step_20")
    assert (found["pairs"], found["prompts"], found["equal"], found["flips"]) == (8, 8, 1, 0.0)
    assert found["first_preferred"] == 0.5
    shares = {name: found[name]["value"] for name in ("win", "tie", "lose", "score")}
    assert shares == {"win": 4 / 8, "tie": 2 / 8, "lose": 2 / 8, "score": 5 / 8}
    interval = binomtest(4, 8).proportion_ci(method="wilson")
    assert (found["win"]["low"], found["win"]["high"]) == pytest.approx((interval.low, interval.high))
    # what failed with an answer was paid for too, where it has a usage: "no JSON", "no choices" and errors have none
    told = json.loads((output / "summary.json").read_text())["judge"]
    billed = sum(fault in ("half", "wrong JSON", "wrong verdict", "no content") for fault in (FAULTS * 2)[:14])
    assert (told["tokens_in"], told["tokens_out"]) == (100 * (14 + billed), 10 * (14 + billed))
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "win. shown first: win (23 against 16)" in (output / "report.html").read_text()


def _waits(server: JudgeServer) -> list[float]:
    """Seconds between a question's failure and its repetition."""
    first: dict[Any, float] = {}
    return [at - first[question] for question, at in server.arrivals if first.setdefault(question, at) != at]


def test_a_judge_that_follows_the_order_decides_nothing_and_is_shown(
    answers: Path, baseline: Path, tmp_path: Path
) -> None:
    with judge_server(rule=lambda first, second: "first", delay=0.02) as server:
        command = [*arguments(server, tmp_path / "out", answers, baseline=baseline), "--yes", "--concurrency", "3"]
        assert main(command) == 0
        assert server.most_waiting == 3
    found = summary(tmp_path / "out", "step_20")
    assert (found["flips"], found["first_preferred"]) == (1.0, 1.0)
    assert (found["win"]["value"], found["tie"]["value"], found["lose"]["value"]) == (0.0, 1.0, 0.0)


def test_more_checkpoints_ask_only_what_is_new(answers: Path, baseline: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    worse = write(tmp_path / "step_10.jsonl", [*["short"] * 3, *(row["response"] for row in read_rows(answers)[3:])])
    with judge_server() as server:
        assert main([*arguments(server, output, answers, baseline=baseline), "--yes"]) == 0
        before = len(server.requests)
        assert main([*arguments(server, output, answers, worse, baseline=baseline), "--yes"]) == 0
        assert len(server.requests) - before == 2 * 3
        assert main(arguments(server, output, answers, worse, baseline=baseline)) == 0  # nothing to pay or confirm
        assert len(server.requests) - before == 2 * 3
    assert summary(output, "step_20")["score"]["value"] == 5 / 8
    assert summary(output, "step_10")["score"]["value"] == 2 / 8
    page = (output / "report.html").read_text()
    assert "Over the checkpoints" in page


def test_what_was_answered_before_a_kill_is_not_asked_again(
    answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    kept = output / "answers.jsonl"
    with judge_server(delay=0.2) as server:
        command = arguments(server, output, answers, baseline=baseline)
        context = multiprocessing.get_context("fork")
        process = context.Process(target=main, args=([*command, "--yes", "--concurrency", "2"],))
        process.start()
        while not kept.exists() or len(read_rows(kept)) < 4:
            assert process.is_alive()
            time.sleep(0.02)
        process.kill()
        process.join()
        with kept.open("a") as file:
            file.write('{"key": "torn')
        known = len(read_rows_but_torn(kept))
        time.sleep(0.3)
        before = len(server.requests)
        terminal, other = pty.openpty()  # somebody who is asked
        os.write(terminal, b"y\n")
        with open(other) as keyboard:
            monkeypatch.setattr(sys, "stdin", keyboard)
            assert main(command) == 0
        os.close(terminal)
        said = capsys.readouterr()
        assert f"{14 - known} questions to m: about " in said.out
        assert len(server.requests) - before == 14 - known
        assert KEY not in said.out + said.err
    assert summary(output, "step_20")["score"]["value"] == 5 / 8
    assert len({row["key"] for row in read_rows(kept)}) == len(read_rows(kept)) == 14


def read_rows_but_torn(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1]


def test_nothing_is_asked_before_the_cost_is_confirmed(
    answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server() as server:
        command = arguments(server, tmp_path / "out", answers, baseline=baseline)
        assert main([*command, "--price-in", "2000", "--price-out", "10000"]) == 2
        said = capsys.readouterr()
        assert server.requests == []
        assert "--yes" in said.err
        # 14 questions of about 250 tokens, 80 tokens an answer, 1,024 at most
        cost = 14 * 80 / 100, 14 * 1024 / 100
        told = said.out.split("cost about ")[1].replace(",", "").split()
        tokens_in = int(said.out.split("about ")[1].split()[0].replace(",", ""))
        assert 14 * 100 < tokens_in < 14 * 400
        assert float(told[0]) == pytest.approx(tokens_in * 0.002 + cost[0], abs=0.01)
        assert float(told[2]) == pytest.approx(tokens_in * 0.002 + cost[1], abs=0.01)
        assert not (tmp_path / "out" / "answers.jsonl").exists()
        assert main([*command, "--yes"]) == 0  # what the refusal left is no obstacle


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "oops"),
        ("cut", "peer closed connection without sending complete message body"),
        ("half", "no verdict in 2 answers; the last: answer = "),
        (
            "no content",
            "answer = '': Invalid JSON: EOF while parsing a value at line 1 column 0 (finish_reason: length)",
        ),
        ("half", "(finish_reason: length); --max-tokens allows longer answers"),
        ("wrong verdict", "verdict = 'maybe': Input should be 'first', 'second' or 'tie'"),
        ("no choices", "choices = []"),
        ("no JSON", "<html>gateway</html>"),
    ],
)
def test_a_question_that_fails_for_good_is_one_message_and_keeps_the_rest(
    fault: str, said: str, answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with judge_server() as server:
        server.broken = fault
        command = [*arguments(server, output, answers, baseline=baseline), "--yes", "--retries", "1"]
        assert main([*command, "--concurrency", "1"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "2 answers are kept" in error
        assert error.count("nemo-eppo: error") == 1
        assert not (output / "summary.json").exists()
        assert len(server.requests) == 4  # two answered, one asked twice


def test_an_endpoint_without_schemas_may_fence_its_json(
    answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server() as server:
        server.broken = "no schemas"
        command = [*arguments(server, tmp_path / "out", answers, baseline=baseline), "--yes", "--retries", "0"]
        assert main(command) == 2
        assert "must be 'text' or 'json_object'" in (error := capsys.readouterr().err)
        assert "; if that is for the JSON schema: --response-format json_object or none" in error
        assert main([*command, "--response-format", "json_object"]) == 0
        assert server.requests[-1]["response_format"] == {"type": "json_object"}
        command[command.index(str(tmp_path / "out"))] = str(tmp_path / "again")
        assert main([*command, "--response-format", "none"]) == 0
        assert "response_format" not in server.requests[-1]
    assert summary(tmp_path / "out", "step_20") == summary(tmp_path / "again", "step_20")
    assert summary(tmp_path / "out", "step_20")["score"]["value"] == 5 / 8


def test_a_failure_lets_what_is_under_way_end_and_asks_no_more(
    answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(delay=0.1) as server:
        server.broken = "500"
        command = [*arguments(server, tmp_path / "out", answers, baseline=baseline), "--yes", "--retries", "0"]
        assert main([*command, "--concurrency", "4"]) == 2
        assert "2 answers are kept" in capsys.readouterr().err
        assert len(server.requests) < 10
        server.broken = ""
        assert main(command) == 0
        assert set(server.answered.values()) == {1}, "what was answered is not asked again"


def test_the_key_is_in_no_message_and_no_file(
    answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-wrong-but-still-secret"
    monkeypatch.setenv("MY_KEY", secret)
    with judge_server() as server:
        command = [*arguments(server, tmp_path / "out", answers, baseline=baseline), "--yes"]
        assert main([*command, "--key-variable", "MY_KEY"]) == 2
        assert len(server.requests) <= 8  # 401 is not tried again
        said = "".join(capsys.readouterr())
        assert "401" in said
        assert "Bearer ***" in said, "the endpoint repeats the key"
        assert main(command) == 0
    files = [file.read_bytes() for file in (tmp_path / "out").iterdir()]
    for key in (secret, KEY):
        assert key not in said + "".join(capsys.readouterr())
        assert not any(key.encode() in content for content in files)
    for bad in ("", "two words", "new\nline", "schlüssel"):
        monkeypatch.setenv("MY_KEY", bad)
        assert main([*command, "--key-variable", "MY_KEY"]) == 2
        said = capsys.readouterr().err
        assert "environment variable MY_KEY" in said
        assert not bad or bad not in said


def test_an_interval_is_over_prompts_that_count_alike(tmp_path: Path) -> None:
    prompts = ["p", "p", "p", "q"]
    left = write(tmp_path / "left.jsonl", ["more words", "more words", "x", "y"], prompts)
    right = write(tmp_path / "right.jsonl", ["one", "one", "two words", "two words"], prompts)
    with judge_server() as server:
        assert main([*arguments(server, tmp_path / "out", left, baseline=right), "--yes"]) == 0
        assert len(server.requests) == 6, "the same question is asked once"
    found = summary(tmp_path / "out", "left")
    assert (found["pairs"], found["prompts"]) == (4, 2)
    assert found["win"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert (found["win"]["low"], found["win"]["high"]) == pytest.approx(estimate_share([2 / 3, 0])[1:])


def test_the_gold_reward_decides_without_an_endpoint(tmp_path: Path) -> None:
    random = Random(3)
    prompts = [sample_prompt(random) for _ in range(40)]
    better = [[sample_sft_response(prompt, random) for prompt in prompts] for _ in range(2)]
    rows = [
        {"input": prompt, "actor_num0_response": old, "actor_latest_response": new, "finished": True}
        for prompt, old, new in zip(prompts, *better, strict=True)
    ]
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output, gold = tmp_path / "out", "nemo_eppo.tools.noun_task:gold_reward"
    command = ["judge", str(path), "--output", str(output), "--gold", gold]
    assert main(command[:-2]) == 2, "nobody is to judge"
    assert main(command) == 0
    expected = []
    for prompt, old, new in zip(prompts, *better, strict=True):
        difference = quality(prompt, new, True) - quality(prompt, old, True)
        expected.append("tie" if abs(difference) < 1e-9 else "win" if difference > 0 else "lose")
    assert [row["verdict"] for row in read_rows(output / "verdicts.jsonl")] == expected
    assert {"win", "tie", "lose"} == set(expected)
    assert summary(output, "both")["win"]["value"] == pytest.approx(expected.count("win") / 40)
    assert summary(output, "both")["flips"] is None


_LENGTH = """\
from pathlib import Path

def reward(sample):
    with Path(__file__).with_name("calls").open("a") as calls:
        print(sample.response, file=calls)
    if sample.response == Path(__file__).with_name("refused").read_text():
        raise ValueError("refused")
    return len(sample.response)
"""


def test_no_gold_reward_is_asked_for_twice(
    answers: Path, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    own, calls, refused = (tmp_path / name for name in ("length_gold.py", "calls", "refused"))
    own.write_text(_LENGTH)
    refused.write_text("as long as")
    output, gold = tmp_path / "out", ["--gold", "length_gold:reward"]
    command = ["judge", str(answers), "--baseline", str(baseline), "--output", str(output), *gold]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "raised ValueError: refused" in error
    before = calls.read_text().splitlines()
    assert f"{len(before) - 1} answers are kept" in error
    assert f"{len(before) - 1}/15 [" in error, (
        "the progress bar; 8 responses, and 8 of the baseline, of which one is equal"
    )
    refused.write_text("")
    calls.unlink()
    assert main(command) == 0
    assert len(calls.read_text().splitlines()) == 15 - (len(before) - 1)
    outcomes = [row["verdict"] for row in read_rows(output / "verdicts.jsonl")]
    assert outcomes == ["win"] * 4 + ["lose"] * 3 + ["tie"]
    calls.unlink()
    (output / "summary.json").unlink()
    assert main(command) == 0, "all is there: only the results are written anew"
    assert summary(output, "step_20")["score"]["value"] == 4.5 / 8
    assert not calls.exists()
    own.write_text(_LENGTH.replace("return ", "return -"))
    capsys.readouterr()
    assert main(command) == 2
    assert "answers.jsonl holds rows of another source_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--baseline", "{other}"], "has 1 responses to the prompt 'prompt 0', {other} has 0"),
        (["--baseline", "nowhere"], "nowhere: no such file"),
        (["--baseline", "{mixed}"], "some rows say how their response ended (finish_reason), and others do not"),
        (["--base-url", "localhost:1"], "base_url = 'localhost:1': expected http://HOST"),
        (["--base-url", "https://me:secret@host/v1"], "expected http://HOST"),
        (["--names", "a", "b"], "--names: 2 names for 1 paths"),
        (["--retries", "-1"], "retries = -1"),
        (["--price-in", "nan"], "price_in = nan"),
        (["--gold", "nowhere:reward"], "expected exactly one of --model MODEL, which an endpoint has, and --gold"),
        (["--output", "{here}"], "exists, but no judge made it"),
    ],
)
def test_bad_input_is_named_before_anything_is_asked(
    change: list[str], said: str, answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.jsonl", ["x"], ["another prompt"])
    mixed = write(tmp_path / "mixed.jsonl", ["x"] * 8, finished=True)
    names = {"other": str(other), "mixed": str(mixed), "here": str(tmp_path)}
    with judge_server() as server:
        command = [*arguments(server, tmp_path / "out", answers, baseline=baseline), "--yes"]
        assert main([*command, *(text.format(**names) for text in change)]) == 2
        assert said.format(**names) in capsys.readouterr().err
        assert server.requests == []
    assert not (tmp_path / "out").exists()


def test_answers_of_another_judge_are_not_taken(
    answers: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server() as server:
        command = [*arguments(server, tmp_path / "out", answers, baseline=baseline), "--yes"]
        assert main(command) == 0
        for change, said in ((["--model", "n"], "another model"), (["--question", "Which?"], "another question")):
            assert main([*command, *change]) == 2
            assert said in capsys.readouterr().err
