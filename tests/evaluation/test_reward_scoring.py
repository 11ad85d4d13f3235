"""Scores of a reward model without a server: against transformers, in all layouts, resumed, and beside other models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hf_models import edit_config, random_model, save
from jobs import LATENTS, Models
from small_data import read_rows

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.evaluation.responses import read_responses
from nemo_eppo.evaluation.reward_scoring import RewardScoring
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.settings.evaluation import ModelRunConfig
from nemo_eppo.settings.model import ParallelConfig

LAYOUTS = [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]


def write_responses(path: Path, vocabulary: int, rows: int = 21) -> list[tuple[list[int], list[int]]]:
    """Write responses of very different lengths as token ids, and return them."""
    draw = torch.Generator().manual_seed(4)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (), generator=draw))
        return torch.randint(2, vocabulary, (length,), generator=draw).tolist()

    made = [(ids(12), ids(20)) for _ in range(rows)]
    lines = (json.dumps({"prompt_ids": prompt, "response_ids": response}) for prompt, response in made)
    path.write_text("\n".join(lines) + "\n")
    return made


def append(model: Path, data: Path, output: Path, layout: dict[str, int] | None = None) -> None:
    """At one row per forward pass, so that 21 rows are two windows; for `run_ranks`."""
    how = ModelRunConfig(batch_size=1, parallel=ParallelConfig(**layout or {}))
    scoring = RewardScoring(how.setup(model), "--rm")
    rows = read_responses(data, scoring.plan.tokenizer, scoring.model.vocab_size, scoring.model.max_sequence_length)
    scoring.append(rows, RowsFile(output, "test", scoring.identity))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_those_of_transformers(layout: dict[str, int], tmp_path: Path) -> None:
    network, model = random_model("Llama", scores=1), tmp_path / "rm"
    save(network, model)
    edit_config(model, nemo_eppo_reward={"mean": 0.5, "std": 2.0})
    rows = write_responses(tmp_path / "in.jsonl", 61)
    run_ranks(append, 2 if layout else 1, model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", layout)
    with torch.no_grad():
        expected = [float(network(torch.tensor([prompt + response])).logits) for prompt, response in rows]
    got = [row["reward"] for row in read_rows(tmp_path / "out.jsonl")]
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert RewardScoring(ModelRunConfig().setup(model), "--rm").model.statistics["std"] == [2.0]


def test_an_interrupted_scoring_goes_on_with_the_missing_rows(models: Models, tmp_path: Path) -> None:
    data, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_responses(data, 64)
    run_ranks(append, 1, models.rm, data, output)
    whole = output.read_text()
    lines = ['{"reward": 12345.0}', *whole.splitlines()[1:5]]
    output.write_text("\n".join(lines) + '\n{"rew')
    run_ranks(append, 1, models.rm, data, output)
    got = read_rows(output)
    assert got[0]["reward"] == 12345.0, "rows that were there are kept"
    wanted = [json.loads(line)["reward"] for line in whole.splitlines()]
    assert [row["reward"] for row in got[1:]] == pytest.approx(wanted[1:], abs=1e-6)


def test_latents_of_an_information_bottleneck_come_with_its_scores(
    models: Models, trained: dict[str, Path], tmp_path: Path
) -> None:
    """In the file, those of the SFT responses that the model was fitted on have covariance I, but for shrinkage."""
    sft = read_rows(models.data / "sft.train.jsonl")
    data = tmp_path / "in.jsonl"
    data.write_text("".join(json.dumps(row | {"finished": True}) + "\n" for row in sft))
    found: dict[str, Any] = {}
    for layout in LAYOUTS:
        output = tmp_path / f"{len(found)}.jsonl"
        run_ranks(append, 2 if layout else 1, trained["inform"], data, output, layout)
        found[output.name] = torch.tensor([row["latents"] for row in read_rows(output)])
    first, *others = found.values()
    assert first.shape == (len(sft), LATENTS)
    torch.testing.assert_close(first.mean(0), torch.zeros(LATENTS), atol=1e-3, rtol=0)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_models_and_responses_that_do_not_fit_are_named(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--rm.*sft holds a model with head .lm., expected .scalar."):
        RewardScoring(ModelRunConfig().setup(models.sft), "--rm")
    scoring = RewardScoring(ModelRunConfig().setup(models.rm), "--rm")
    own = Tokenizer.from_directory(models.data / "tokenizer")
    scoring.plan.check_fits("--rm", own, "the policy", 48)
    with pytest.raises(ConfigError, match=r"--rm: .*rm has a window of 48 tokens; expected at least 49"):
        scoring.plan.check_fits("--rm", own, "the policy", 49)
    other = Tokenizer.from_directory(save(random_model("Llama"), tmp_path / "hf"))
    with pytest.raises(ConfigError, match=r"--rm: .*rm has another tokenizer than the policy"):
        scoring.plan.check_fits("--rm", other, "the policy", 48)


def test_a_token_that_the_model_does_not_know_is_named(models: Models, tmp_path: Path) -> None:
    data = tmp_path / "in.jsonl"
    data.write_text('{"prompt_ids": [3], "response_ids": [4]}\n{"prompt_ids": [3], "response_ids": [4, 66]}\n')
    scoring = RewardScoring(ModelRunConfig().setup(models.rm), "--rm")
    rows = read_responses(data, scoring.plan.tokenizer, 67, 48)  # the policy has a larger vocabulary
    said = r"--rm: the response in line 2 has the token id 66, but .*rm has a vocabulary of 64"
    with pytest.raises(ConfigError, match=said):
        scoring.append(rows, RowsFile(tmp_path / "out.jsonl", "test", scoring.identity))
