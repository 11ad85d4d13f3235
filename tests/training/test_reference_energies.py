"""The job that fills an actor's energy cache: the actor's own numbers, in any layout, before it or beside it."""

import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from distributed import run_ranks
from jobs import Models

from nemo_eppo.config import ConfigError, RunStopped, load_config
from nemo_eppo.data.datasets import GlobalBatches, PromptDataset
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.observability.run import Run
from nemo_eppo.rollout.batch import Completion, FinishReason, RolloutBatch
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.training.energy_cache import energy_cache, prompt_digest
from nemo_eppo.training.ppo_job import PPOJob
from nemo_eppo.training.reference_energies import read_reference_energies
from nemo_eppo.training.setup import plan
from nemo_eppo.training.stopping import StopWatch

PROMPTS = 13


def write_prompts(models: Models, directory: Path) -> Path:
    file = directory / "prompts.jsonl"
    lines = (models.data / "prompts.train.jsonl").read_text().splitlines()
    file.write_text("\n".join(list(dict.fromkeys(lines))[:PROMPTS]) + "\n")
    return file


@pytest.fixture
def prompts(models: Models, tmp_path: Path) -> Path:
    return write_prompts(models, tmp_path)


def settings(models: Models, prompts: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "seed": 5,
        "model": {"restore_from_path": models.sft},
        "data": {"train": prompts, "max_prompt_length": 16},
        "generation": {"max_new_tokens": 8},
        "energy": {"cache": prompts.parent / "cache"},
        "batch_size": 4,
    }
    for section, extra in changes.items():
        values[section] = values[section] | extra if isinstance(extra, dict) and section in values else extra
    return values


def run_of(directory: Path) -> Run:
    return Run(directory, 0, logging.getLogger("nemo_eppo"), ExpManagerConfig())


def fill(values: dict[str, Any], directory: Path) -> None:
    read_reference_energies(load_config(ReferenceEnergiesConfig, values), run_of(directory))


def written(prompts: Path) -> dict[str, list[float]]:
    """Entries of the cache, in the order in which they were written."""
    files = (prompts.parent / "cache").glob("*/*.jsonl")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = {row["prompt"]: row["energies"] for row in rows}
    assert len(found) == len(rows)  # none was answered twice
    return found


def ids(models: Models, prompts: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_directory(models.data / "tokenizer")
    return [item.token_ids.tolist() for item in PromptDataset(prompts, tokenizer, max_prompt_length=16).items]


def by_actor(models: Models, prompts: Path, meanwhile: Callable[[], None] | None = None) -> tuple[torch.Tensor, int]:
    """The reference energies of an actor with these prompts, and how many it answered itself."""
    values = settings(models, prompts) | {
        "ppo": {
            "max_steps": 1,
            "rollout_batch_size": 8,
            "mini_batch_size": 8,
            "advantages": {"estimator": "reinforce_plus_plus"},
        },
        "rewards": [{"function": "nemo_eppo.tools.noun_task:gold_reward"}],
        "critic": None,
        "shaping": {"energy_penalty": {"eta": 2.0}},
        "optimizer": {"lr": 1e-6},
    }
    del values["batch_size"]
    with ExitStack() as stack:
        policy = PPOJob(load_config(PPOConfig, values), run_of(prompts.parent / "actor")).build(stack).policy
        if meanwhile is not None:
            meanwhile()
        asked = ids(models, prompts)
        completions = [Completion([2, 1], torch.zeros(2), FinishReason.STOP, 0) for _ in asked]
        batch = RolloutBatch.from_completions(asked, completions, 0)
        if not (answered := len(policy.unanswered(asked))):
            policy.reference.active = no_turn  # type: ignore[method-assign]
        found = policy.infer_reference(batch, asked, logprobs=False, energies=True)
    assert found.energies is not None
    return found.energies, answered


def no_turn() -> NoReturn:
    raise AssertionError("the reference's weights take the policy's place, and have nothing to do")


@pytest.fixture(scope="module")
def cold(models: Models, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """What an actor without a cache reads."""
    prompts = write_prompts(models, tmp_path_factory.mktemp("cold"))
    (energies, answered), *_ = run_ranks(by_actor, 1, models, prompts)
    assert answered == PROMPTS
    return energies


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, {"tensor_model_parallel_size": 2}), (2, {})])
def test_an_actor_finds_what_it_would_have_read(
    ranks: int, parallel: dict[str, int], cold: torch.Tensor, models: Models, prompts: Path, tmp_path: Path
) -> None:
    values = settings(models, prompts, model={"parallel": parallel})
    run_ranks(fill, ranks, values, tmp_path)
    (warm, answered), *_ = run_ranks(by_actor, 1, models, prompts)
    assert answered == 0
    torch.testing.assert_close(warm, cold, atol=1e-6, rtol=1e-5)


def test_an_actor_that_runs_meanwhile_finds_it_too(models: Models, prompts: Path, tmp_path: Path) -> None:
    def meanwhile() -> None:
        cache = energy_cache(plan(config.model), config, tmp_path)
        assert cache is not None
        cache.append([(prompt, [], [float(len(prompt))]) for prompt in ids(models, prompts)[:5]])

    config = load_config(ReferenceEnergiesConfig, settings(models, prompts))
    (energies, answered), *_ = run_ranks(by_actor, 1, models, prompts, meanwhile)
    assert answered == PROMPTS - 5
    assert energies[:5, 0].tolist() == [len(prompt) for prompt in ids(models, prompts)[:5]]


def stopped_after(steps: int, values: dict[str, Any], directory: Path) -> bool:
    """Fill the cache until the job is told to end after some steps; whether it says that it has not finished."""
    left = steps

    def due(self: object) -> str:
        nonlocal left
        left -= 1
        return "" if left else "told"

    StopWatch.due = due  # type: ignore[method-assign]
    try:
        fill(values, directory)
    except RunStopped:
        return True
    return False


def test_prompts_come_in_the_actors_order_and_a_second_start_goes_on(
    models: Models, prompts: Path, tmp_path: Path
) -> None:
    values = settings(models, prompts)
    assert run_ranks(stopped_after, 1, 2, values, tmp_path) == [True]
    batches = GlobalBatches(PROMPTS, 6, seed=5, digest="")  # the actor's, whatever the size of its batches
    met = [ids(models, prompts)[index] for index in [*next(batches), *next(batches)]]
    first = list(written(prompts))
    assert first == [prompt_digest(prompt).hex() for prompt in met[:8]]
    run_ranks(fill, 1, values, tmp_path)
    assert set(written(prompts)) == {prompt_digest(prompt).hex() for prompt in ids(models, prompts)}
    assert run_ranks(stopped_after, 1, 4, values, tmp_path) == [False]  # nothing was left to do


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": {"cache": None}}, "energy.cache = null: expected the directory"),
        ({"energy": {"reference": "same_response"}}, "expected 'own_response'"),
        ({"generation": {"max_new_tokens": 48}}, "is more than the model's window of 48 tokens"),
        ({"energy": {"layers": [7]}}, "7 is not a layer of a model with 4 layers"),
    ],
)
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], message: str, models: Models, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        fill(settings(models, prompts, **changes), tmp_path)


def test_an_actor_is_told_that_the_answers_are_of_other_settings(models: Models, prompts: Path, tmp_path: Path) -> None:
    run_ranks(fill, 1, settings(models, prompts, generation={"max_new_tokens": 9}), tmp_path)
    [said] = run_ranks(warnings_of_actor, 1, models, prompts)
    assert "are of other settings, and are not used: generation.max_new_tokens = 9, here 8" in said


def warnings_of_actor(models: Models, prompts: Path) -> str:
    said: list[str] = []
    logger = logging.getLogger("nemo_eppo")
    logger.addFilter(lambda record: said.append(record.getMessage()) or True)  # type: ignore[func-returns-value]
    by_actor(models, prompts)
    return "\n".join(said)
