"""`nemo-eppo score` against transformers, through interruptions, layouts and bad input."""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hf_models import WORDS, ids, random_model, save
from small_data import read_rows
from torch import Tensor
from torch.distributed.run import parse_args as torchrun_arguments

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.evaluation.model_rows import WINDOW
from nemo_eppo.evaluation.score import Scoring
from nemo_eppo.settings.evaluation import ScoreConfig
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.tools.convert import HfToMegatron

EOS = 0


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """37 rows of very different lengths."""
    draw = torch.Generator().manual_seed(9)

    def text(longest: int) -> str:
        length = int(torch.randint(1, longest, (), generator=draw))
        return " ".join(WORDS[int(word)] for word in torch.randint(len(WORDS), (length,), generator=draw))

    return [{"prompt": text(12), "response": text(20), "ignored": "x"} for _ in range(37)]


@pytest.fixture
def data(rows: list[dict[str, str]], tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_job(config: ScoreConfig) -> None:
    Scoring(config).run()


@torch.no_grad()
def expected(rows: list[dict[str, str]], chat: bool = False, linears: bool = False, layer: int = -1) -> Tensor:
    """[N, 3]: log-prob, tokens, energy loss of each row by transformers, one row at a time."""
    network = random_model("Qwen3")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def listen(name: str, module: Any) -> None:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            left = output[0] if isinstance(output, tuple) else output
            seen[name] = (args[0] if args else kwargs["hidden_states"]), left

        module.register_forward_hook(hook, with_kwargs=True)

    block = network.model.layers[layer]
    modules = {n: getattr(block.mlp, n) for n in ("gate_proj", "up_proj", "down_proj")} if linears else {"layer": block}
    for name, module in modules.items():
        listen(name, module)
    results = []
    for row in rows:
        prompt = ids(f"w0 {row['prompt']} w1") if chat else ids(row["prompt"])
        response = ids(row["response"]) + ([EOS] if row.get("finished") else [])
        logprobs = network(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        at = torch.arange(len(prompt), len(prompt) + len(response))
        logprob = logprobs[at - 1, torch.tensor(response)].sum()
        energy = sum(
            (entered.abs().mean(-1) - left.abs().mean(-1)).view(-1)[at].mean() for entered, left in seen.values()
        )
        results.append([float(logprob), len(response), float(energy)])
    return torch.tensor(results)


def close(output: Path, wanted: Tensor) -> None:
    got = torch.tensor([[row["logprob"], row["num_tokens"], row["energy_loss"]] for row in read_rows(output)])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


# one rank is compared when it is interrupted, tensor parallelism by the command; {} is data parallelism
@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}])
def test_scores_are_those_of_transformers(
    layout: dict[str, int], model: Path, data: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    output, parallel = tmp_path / "out.jsonl", ParallelConfig(**layout)
    run_ranks(
        run_job, 2, ScoreConfig(model=model, data=data, output=output, parallel=parallel, batch_size=1)
    )  # three windows
    close(output, expected(rows))


class Replaced(Exception):
    """This process would now be another program, whose arguments these are."""


def run_rank(command: list[str]) -> str:
    """What a rank of torchrun's prints; for `run_ranks`."""
    os.environ["TORCHELASTIC_RUN_ID"] = "1"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command) == 0
    return printed.getvalue()


def test_a_command_becomes_that_of_as_many_ranks(
    model: Path, data: Path, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(program: str, words: list[str]) -> None:
        raise Replaced(program, *words)

    monkeypatch.setattr(os, "execv", replace)
    output = tmp_path / "out.jsonl"
    command = ["score", "--model", str(model), "--data", str(data), "--output", str(output), "--tp", "2"]
    with pytest.raises(Replaced) as replaced:
        main(command)
    program, argument_0, *words = replaced.value.args
    assert (program, argument_0, words[:2]) == (sys.executable, sys.executable, ["-m", "nemo_eppo.entry.torchrun"])
    found = torchrun_arguments(words[2:])
    assert (found.nproc_per_node, found.module, found.training_script) == ("2", True, "nemo_eppo.cli")
    said, silent = run_ranks(run_rank, 2, found.training_script_args)
    assert (str(output) in said, silent) == (True, "")
    close(output, expected(rows))


def score_in_all_ways(model: Path, data: Path, directory: Path) -> None:
    run_job(ScoreConfig(model=model, data=data, output=directory / "first", layer=0))
    run_job(ScoreConfig(model=model, data=data, output=directory / "linears", preset="mlp_linears"))
    run_job(ScoreConfig(model=model, data=data, output=directory / "chat", chat_template=True))
    HfToMegatron(model, directory / "megatron").run()
    run_job(ScoreConfig(model=directory / "megatron", data=data, output=directory / "checkpoint"))


def test_layers_presets_chat_templates_and_checkpoints(
    model: Path, data: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    run_ranks(score_in_all_ways, 1, model, data, tmp_path)
    close(tmp_path / "first", expected(rows, layer=0))
    close(tmp_path / "linears", expected(rows, linears=True))
    close(tmp_path / "chat", expected(rows, chat=True))
    close(tmp_path / "checkpoint", expected(rows))


def test_what_counts_are_the_rows_token_ids_or_its_text_with_eos_where_it_finished(
    model: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    words: list[Any] = [row | {"finished": index % 2 == 0} for index, row in enumerate(rows[:12])]
    given: list[dict[str, Any]] = []
    for index, row in enumerate(words):
        end = [EOS] if row["finished"] else []
        with_ids = row | {"prompt_ids": ids(row["prompt"]), "response_ids": ids(row["response"]) + end}
        old = {name: row[name] for name in ("prompt", "response")} | {"finish_reason": "stop" if end else "length"}
        only_ids = {name: with_ids[name] for name in ("prompt_ids", "response_ids")}
        given.append((row, with_ids, old, only_ids)[index % 4])
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    run_ranks(run_job, 1, ScoreConfig(model=model, data=data, output=tmp_path / "out.jsonl"))
    close(tmp_path / "out.jsonl", expected(words))


def resume(model: Path, data: Path, output: Path) -> None:
    config = ScoreConfig(model=model, data=data, output=output, batch_size=1)
    real, calls = Scoring._score, []

    def interrupted(self: Scoring, *args: Any) -> list[str]:
        calls.append(args[-1][0].line)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    Scoring._score = interrupted  # type: ignore[method-assign, assignment]  # in a process of its own
    with pytest.raises(KeyboardInterrupt):
        run_job(config)
    assert len(read_rows(output)) == 2 * WINDOW
    complete = output.read_text()
    with output.open("a") as file:
        file.write('{"logprob": -12.3')  # torn
    run_job(config)
    assert output.read_text().startswith(complete)
    assert calls == [1, 17, 33, 33], "nothing was scored twice"
    finished = output.read_bytes()
    run_job(config)
    assert len(calls) == 4
    assert output.read_bytes() == finished


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: Path, data: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    run_ranks(resume, 1, model, data, tmp_path / "out.jsonl")
    close(tmp_path / "out.jsonl", expected(rows))


def test_scores_of_a_model_that_was_replaced_are_not_taken_for_those_of_the_new_one(
    model: Path, data: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "checkpoints"
    HfToMegatron(model, trained / "step_000001").run()
    config = ScoreConfig(model=trained, data=data, output=tmp_path / "out.jsonl")
    run_ranks(run_job, 1, config)
    Scoring(config)
    HfToMegatron(model, trained / "step_000002").run()  # the run went on
    with pytest.raises(ConfigError, match="another model"):
        Scoring(config)
    shutil.rmtree(trained)
    HfToMegatron(model, trained / "step_000001").run()  # or was started anew
    with pytest.raises(ConfigError, match="another model"):
        Scoring(config)


def test_an_output_of_something_else_is_never_continued(model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    settings = {"model": model, "data": data, "output": output}
    run_ranks(run_job, 1, ScoreConfig(**settings))
    for change, said in (({"layer": 0}, "another layer"), ({"preset": "mlp_block"}, "another preset")):
        with pytest.raises(ConfigError, match=said):
            Scoring(ScoreConfig(**settings | change))
    with data.open("a") as file:
        file.write('{"prompt": "w1", "response": "w2"}\n')
    with pytest.raises(ConfigError, match="another data_sha256"):
        Scoring(ScoreConfig(**settings))
    foreign = tmp_path / "precious.jsonl"
    foreign.write_text("mine\n")
    with pytest.raises(ConfigError, match="nemo-eppo score did not write it"):
        Scoring(ScoreConfig(**settings | {"output": foreign}))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "w1"}', ":2: field 'response' is missing"),
        ("{", ":2: not JSON"),
        ('{"prompt": "", "response": "w1"}', ":2: field 'prompt' has no tokens"),
        ('{"prompt": "w1", "response": " "}', ":2: field 'response' has no tokens"),
        ('{"prompt": "w1", "response": "strange"}', ":2: cannot be tokenised"),
        ('{"prompt": "w1", "response": "w2", "finished": 1}', ":2: field 'finished' = 1: expected true or false"),
        ('{"prompt_ids": [2]}', ":2: field 'response_ids' = None: expected a list of token ids below"),
        ('{"prompt_ids": [2], "response_ids": [2, -1]}', ":2: field 'response_ids' = [2, -1]: expected a list of"),
        ('{"prompt_ids": [2], "response_ids": []}', ":2: field 'response_ids' has no tokens"),
        (
            '{"prompt": "w1", "response": "w2", "prompt_ids": [3], "response_ids": [5, 0]}',
            ":2: field 'response_ids' are 'w3' to this model's tokenizer, but field 'response' is 'w2'",
        ),
        (
            json.dumps({"prompt": "w1 " * 60, "response": "w2 " * 5}),
            ":2: 60 + 5 tokens are more than the model's window",
        ),
    ],
)
def test_a_bad_row_is_named(
    line: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text('{"prompt": "w1", "response": "w2"}\n' + line + "\n")
    assert main(["score", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    assert f"{data}{said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_row_of_which_the_model_makes_nan_is_named(tmp_path: Path) -> None:
    broken = random_model("Llama")
    broken.model.norm.weight.data.fill_(torch.nan)
    model, data = save(broken, tmp_path / "broken"), tmp_path / "in.jsonl"
    data.write_text('\n{"prompt": "w1", "response": "w2"}\n')
    with pytest.raises(RuntimeError, match=rf"{data}:2: {model} gives NaN or infinity: log-probability nan"):
        run_ranks(run_job, 1, ScoreConfig(model=model, data=data, output=tmp_path / "out.jsonl"))


def test_bad_settings_are_named(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = save(random_model("Llama"), tmp_path / "plain")
    for change, said in (
        (["--layer", "2"], "2 is not a layer of a model with 2 layers"),
        (["--tp", "3"], "num_attention_heads = 4 is not divisible by tensor_model_parallel_size = 3"),
        (["--batch-size", "0"], "batch_size = 0"),
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--data", "nowhere"], "nowhere: no such file"),
        (["--model", str(plain), "--chat-template"], "--chat-template: the tokenizer"),
    ):
        command = ["score", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "out"), *change]
        assert main(command) == 2
        assert said in capsys.readouterr().err
