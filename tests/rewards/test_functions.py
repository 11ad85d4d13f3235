"""The user's reward functions: what they are given, and what becomes of one that fails."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_eppo.config import ConfigError
from nemo_eppo.rewards.functions import FunctionPool, RewardFunctionError, check_function
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.rewards import FunctionsConfig

sys.path.insert(0, str(Path(__file__).parent))  # the user's own module


def sample(prompt: str, response: str = "yes", finished: bool = True, **fields: object) -> Sample:
    return Sample(prompt=prompt, response=response, token_ids=(4, 5, 1), finished=finished, fields=fields)


@pytest.fixture(scope="module")
def pool() -> Iterator[FunctionPool]:
    made = FunctionPool(FunctionsConfig(workers=2, time_limit=20))
    yield made
    made.close()


def test_a_function_is_given_text_token_ids_and_the_rows_other_fields(pool: FunctionPool) -> None:
    samples = [sample("a", answer="yes"), sample("b", answer="no"), sample("c", finished=False, answer="yes")]
    assert pool.submit("own_functions:length", samples).result() == [3.0, 3.0, 3.0]
    assert pool.submit("own_functions:matches", samples).result() == [1.0, 0.0, 0.0]
    assert pool.submit("own_functions:starts_with", samples).result() == [1.0, 1.0, 1.0]


def test_functions_run_in_other_processes_that_end_with_the_pool() -> None:
    pool = FunctionPool(FunctionsConfig(workers=2, time_limit=20))
    found = {int(number) for number in pool.submit("own_functions:process", [sample("a")] * 20).result()}
    assert 1 <= len(found) <= 2
    assert os.getpid() not in found
    pool.close()
    running = subprocess.run(["ps", "-o", "pid=", "-p", ",".join(map(str, found))], capture_output=True, text=True)
    assert not running.stdout.split()


def test_functions_outlive_a_signal_to_the_ranks_process_group(pool: FunctionPool) -> None:
    found = {int(number) for number in pool.submit("own_functions:process", [sample("a")] * 20).result()}
    assert os.getpgid(0) not in {os.getpgid(number) for number in found}  # torchrun's SIGTERM, which ranks put off


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "raised KeyError: 'no such answer'"),
        ("not_a_number", "gave 'good'; expected a finite number"),
        ("nan", "gave nan; expected a finite number"),
        ("huge", "raised OverflowError: int too large to convert to float"),
        ("dies", "ended its process"),
    ],
)
def test_a_function_that_fails_is_named_with_its_row(pool: FunctionPool, function: str, message: str) -> None:
    with pytest.raises(RewardFunctionError) as error:
        pool.submit(f"own_functions:{function}", [sample("a")]).result()
    assert (
        str(error.value) == f"reward function own_functions:{function}, response 0 of the batch (prompt 'a'): {message}"
    )
    assert pool.submit("own_functions:length", [sample("a")]).result() == [3.0], "the pool works on"


def test_a_call_over_the_time_limit_is_ended() -> None:
    pool, started = FunctionPool(FunctionsConfig(time_limit=2)), time.monotonic()
    with pytest.raises(RewardFunctionError, match=r"response 1 .*\(prompt 'b'\): took more than 2 s"):
        pool.submit("own_functions:hangs_on_b", [sample("a"), sample("b")]).result()
    pool.close()
    assert time.monotonic() - started < 30


def test_of_several_failures_the_first_row_is_named_and_waiting_rows_are_dropped() -> None:
    pool, started = FunctionPool(FunctionsConfig(time_limit=3)), time.monotonic()
    with pytest.raises(RewardFunctionError, match=r"response 0 .*: took more than 3 s"):
        pool.submit("own_functions:hangs_on_b", [sample("b")] * 100).result()
    pool.close()
    assert time.monotonic() - started < 60
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit("own_functions:length", [sample("a")])


def test_closing_drops_the_calls_that_have_not_begun() -> None:
    pool, started = FunctionPool(FunctionsConfig(time_limit=3)), time.monotonic()
    answer = pool.submit("own_functions:hangs_on_b", [sample("b")] * 100)
    pool.close()
    assert time.monotonic() - started < 60
    assert answer.exception() is not None


def test_a_function_that_does_not_exist_is_named_before_anything_runs() -> None:
    with pytest.raises(
        ConfigError, match=r"rewards\[0\]\.function = 'own_functions:missing': expected 'module:function'"
    ):
        check_function("rewards[0].function", "own_functions:missing")
    with pytest.raises(ConfigError, match=r"'own_functions:Sample\.x'"):
        check_function("gold_reward", "own_functions:Sample.x")


def test_a_function_that_takes_no_sample_is_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arguments.py").write_text(
        "def none():\n    return 1\ndef more(sample, scale=2, *, of=3):\n    return 1\n"
    )
    check_function("gold_reward", "arguments:more")
    with pytest.raises(ConfigError, match=r"'arguments:none': expected a function of one argument, a Sample: too many"):
        check_function("gold_reward", "arguments:none")


def test_a_module_of_the_working_directory_is_found_and_what_is_wrong_with_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gold_here.py").write_text("def score(sample):\n    return float(len(sample.response)) + 0.5\n")
    check_function("gold_reward", "gold_here:score")
    pool = FunctionPool(FunctionsConfig())
    assert pool.submit("gold_here:score", [sample("a")]).result() == [3.5]
    pool.close()
    (tmp_path / "gold_broken.py").write_text("def score(sample)\n")
    with pytest.raises(ConfigError, match=r"'gold_broken:score': gold_broken cannot be imported \(SyntaxError: "):
        check_function("gold_reward", "gold_broken:score")
    (tmp_path / "gold_folder").mkdir()
    for path in ("gold_folder:score", "./gold_here.py:score", "gold_here.py:score", "gold_here"):
        with pytest.raises(ConfigError, match=f"gold_reward = '{path}': expected 'module:function'"):
            check_function("gold_reward", path)
