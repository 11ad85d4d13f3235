"""`nemo-eppo generate` against transformers; a response depends on its seed, prompt and sample and on nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hf_models import VOCABULARY, WORDS, ids, random_model, save
from small_data import read_rows

from nemo_eppo.cli import main
from nemo_eppo.config import load_config
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.evaluation.conversation import Conversation, talk
from nemo_eppo.evaluation.generate import Generating
from nemo_eppo.evaluation.model_rows import WINDOW
from nemo_eppo.evaluation.responses import read_responses
from nemo_eppo.settings.evaluation import GenerateConfig, GeneratorConfig
from nemo_eppo.tools.convert import HfToMegatron

EOS, NEW = 0, 12
PROMPTS = ["w2 w3 w4", "w5", "w6 w7 w8 w9 w10 w11 w12", "w13 w14", "w15 w16 w17 w18", "w19 w20"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model: Path, prompts: Path, output: Path, **changes: Any) -> GenerateConfig:
    values = {"model": model, "prompts": prompts, "output": output, "sampling": {"max_new_tokens": NEW}}
    return load_config(GenerateConfig, values | changes)


def run_job(settings: GenerateConfig) -> None:
    Generating(settings).run()


@torch.no_grad()
def transformers_greedy(prompt: list[int]) -> list[int]:
    network = random_model("Qwen3")
    out = network.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=EOS, pad_token_id=1
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def test_greedy_responses_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4"},
        {"role": "user", "content": "w5"},
    ]
    given: list[tuple[dict[str, Any], list[int], str]] = [
        *(({"prompt": text, "answer": "w9"}, ids(text), text) for text in PROMPTS),
        ({"prompt": chat}, ids("w0 w3 w0 w4 w0 w5 w1"), "w0 w3 w0 w4 w0 w5 w1 "),
        ({"prompt_ids": [9, 8, 7]}, [9, 8, 7], "w7 w6 w5"),
        ({"prompt": "any", "prompt_ids": [9, 8, 7], "index": "x"}, [9, 8, 7], "any"),
    ]
    data = write(tmp_path / "in.jsonl", [row for row, _, _ in given])
    output = tmp_path / "out.jsonl"
    run_ranks(run_job, 1, config(model, data, output, sampling={"max_new_tokens": NEW, "greedy": True}))
    rows = read_rows(output)
    for place, (row, (_, tokens, text)) in enumerate(zip(rows, given, strict=True)):
        expected = transformers_greedy(tokens)
        words = " ".join(WORDS[token - 2] for token in expected if 1 < token < 61)
        stops = expected[-1] == EOS
        fields = {"answer": "w9"} if place < len(PROMPTS) else {"index": "x"} if place == len(given) - 1 else None
        assert row.pop("fields", None) == fields
        assert row == {
            "index": place,
            "sample": 0,
            "prompt": text,
            "response": words,
            "prompt_ids": tokens,
            "response_ids": expected,
            "finish_reason": "stop" if stops else "length",
            "finished": stops,
        }
    read = read_responses(output, Tokenizer.from_directory(model), VOCABULARY, 64)  # as `score` reads them
    assert [row.response.tolist() for row in read] == [row["response_ids"] for row in rows]


def generate_in_many_ways(model: Path, directory: Path) -> None:
    forwards, backwards = directory / "in.jsonl", directory / "backwards.jsonl"
    run_job(config(model, forwards, directory / "plain", samples_per_prompt=3))
    run_job(config(model, forwards, directory / "one_at_once", samples_per_prompt=3, batch_size=1))
    run_job(config(model, backwards, directory / "backwards", samples_per_prompt=3))
    run_job(config(model, forwards, directory / "fewer_samples", samples_per_prompt=2, batch_size=5))
    run_job(config(model, forwards, directory / "seed", samples_per_prompt=3, seed=1))
    HfToMegatron(model, directory / "megatron").run()
    run_job(config(directory / "megatron", forwards, directory / "checkpoint", samples_per_prompt=3))


def by_prompt(path: Path) -> dict[tuple[str, int], list[int]]:
    return {(row["prompt"], row["sample"]): row["response_ids"] for row in read_rows(path)}


def test_a_response_depends_on_seed_prompt_and_sample_alone(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS])
    write(tmp_path / "backwards.jsonl", [{"prompt": text} for text in PROMPTS[::-1]])
    run_ranks(generate_in_many_ways, 1, model, tmp_path)
    for layout in ("tensor", "pipeline", "data"):
        parallel = {f"{layout}_model_parallel_size": 2} if layout != "data" else {}
        run_ranks(run_job, 2, config(model, data, tmp_path / layout, samples_per_prompt=3, parallel=parallel))
    expected = by_prompt(tmp_path / "plain")
    assert len(expected) == 3 * len(PROMPTS)
    assert len(set(map(tuple, expected.values()))) == len(expected), "all differ"
    for way in ("one_at_once", "backwards", "checkpoint", "tensor", "pipeline", "data"):
        assert by_prompt(tmp_path / way) == expected, way
    fewer = by_prompt(tmp_path / "fewer_samples")
    assert fewer == {key: value for key, value in expected.items() if key[1] < 2}
    assert all(other != expected[key] for key, other in by_prompt(tmp_path / "seed").items())
    numbers = [(row["index"], row["sample"]) for row in read_rows(tmp_path / "backwards")]
    assert numbers == [(index, sample) for index in range(len(PROMPTS)) for sample in range(3)]


def resume(settings: GenerateConfig) -> None:
    real, calls = Generating._lines, []

    def interrupted(self: Generating, window: slice) -> list[str]:
        calls.append(window.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, window)

    Generating._lines = interrupted  # type: ignore[method-assign]  # in a process of its own
    with pytest.raises(KeyboardInterrupt):
        run_job(settings)
    with settings.output.open("a") as file:
        file.write('{"index": 3, "sam')  # torn
    run_job(settings)
    assert calls == [0, WINDOW, WINDOW], "nothing was generated twice"


def test_an_interrupted_run_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", [{"prompt": text} for text in PROMPTS])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(run_job, 1, config(model, data, whole, samples_per_prompt=4))
    run_ranks(resume, 1, config(model, data, parts, samples_per_prompt=4, batch_size=1))
    assert parts.read_text() == whole.read_text()


def converse(model: Path, lines: list[str], **sampling: Any) -> str:
    """What is printed; for `run_ranks`."""
    import contextlib
    import io

    waiting = iter(lines)

    def read(_: str) -> str:
        for line in waiting:
            return line
        raise EOFError

    settings = {"model": model, "sampling": {"max_new_tokens": NEW, "greedy": True, **sampling}}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        talk(Conversation(load_config(GeneratorConfig, settings)), read)
    return printed.getvalue()


def answer(prompt: str) -> tuple[str, str]:
    """What transformers answers, as words; and as it is shown."""
    tokens = transformers_greedy(ids(prompt))
    words = " ".join(WORDS[token - 2] for token in tokens if 1 < token < 61)
    return words, words if tokens[-1] == EOS else f"{words} [...]"


def test_a_conversation_has_a_memory_until_it_is_reset(model: Path) -> None:
    (printed,) = run_ranks(converse, 1, model, ["w3", "w5 w6", "", "/reset", " w3 ", "strange", "/quit", "w4"])
    words, first = answer("w0 w3 w1")
    _, second = answer(f"w0 w3 w0 {words} w0 w5 w6 w1")
    help_, *shown = printed.splitlines()
    assert "/quit" in help_
    assert shown[:3] == [first, second, first]
    assert shown[3].startswith("(cannot be tokenised")
    assert len(shown) == 4


def test_a_model_without_a_chat_template_continues_the_text(tmp_path: Path) -> None:
    plain = save(random_model("Qwen3"), tmp_path / "plain")
    (printed,) = run_ranks(converse, 1, plain, ["w3 w4"])
    assert printed.splitlines()[1] == answer("w3 w4")[1]
    (printed,) = run_ranks(converse, 1, plain, ["w3 " * 40, "w4 " * 20])
    assert "tokens; expected 1 to 52, which leaves 12 for the answer" in printed.splitlines()[2]


@pytest.mark.slow
def test_two_processes_answer_a_terminal(model: Path) -> None:
    command = [sys.executable, "-m", "nemo_eppo.cli", "generate", "--model", str(model), "--interactive", "--tp", "2"]
    command += ["--temperature", "0", "--max-new-tokens", str(NEW)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input="w3\n", capture_output=True, text=True, timeout=120, env=environment)
    assert answer("w0 w3 w1")[1] in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "w1"}', ":2: field 'prompt' is missing"),
        ("{", ":2: not JSON"),
        ('{"prompt": ""}', ":2: the prompt has 0 tokens; expected 1 to 52"),
        ('{"prompt": 3}', ":2: field 'prompt' = 3: expected text"),
        ('{"prompt": "strange"}', ":2: cannot be tokenised"),
        ('{"prompt": []}', ":2: field 'prompt': a chat without turns"),
        ('{"prompt": ["w1"]}', ":2: field 'prompt': turn 1 = 'w1': expected {\"role\", \"content\"} as texts"),
        ('{"prompt_ids": []}', ":2: the prompt has 0 tokens; expected 1 to 52"),
        ('{"prompt_ids": [2, 67]}', ":2: field 'prompt_ids' = [2, 67]: expected a list of token ids below 67"),
        (json.dumps({"prompt": "w1 " * 53}), ":2: the prompt has 53 tokens; expected 1 to 52"),
    ],
)
def test_a_bad_row_is_named(
    line: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text('{"prompt": "w1"}\n' + line + "\n")
    command = ["generate", "--model", str(model), "--prompts", str(data), "--output", str(tmp_path / "out")]
    assert main([*command, "--max-new-tokens", str(NEW)]) == 2
    assert f"{data}{said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "in.jsonl", [{"prompt": "w1"}])
    chats = write(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "w1"}]}])
    plain = save(random_model("Qwen3"), tmp_path / "plain")
    files = ["--prompts", str(data), "--output", str(tmp_path / "out")]
    for change, said in (
        (files, "--max-new-tokens: 256 leave no room for a prompt in the model's window of 64 tokens"),
        ([*files, "--max-new-tokens", "0"], "sampling.max_new_tokens = 0"),
        ([*files, "--greedy", "--top-k", "4"], "greedy takes the likeliest token"),
        ([*files, "--temperature", "-1"], "sampling.temperature = -1.0"),
        ([*files, "--samples-per-prompt", "0"], "samples_per_prompt = 0"),
        ([*files, "--model", str(plain), "--chat-template", "--max-new-tokens", "4"], "--chat-template: the tokenizer"),
        (files[:2], "--prompts and --output are required, or --interactive"),
        ([*files, "--interactive"], "--interactive takes no --prompts, --output"),
        (
            ["--prompts", str(chats), *files[2:], "--model", str(plain), "--max-new-tokens", "4"],
            f"{chats}:1: field 'prompt': a chat, but the model's tokenizer has no chat template",
        ),
    ):
        assert main(["generate", "--model", str(model), *change]) == 2
        assert said in capsys.readouterr().err
