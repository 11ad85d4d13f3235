"""What every engine promises (`generation/engine.py`), shown for each of them on the same policy."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines import Kind, make_engine
from small_models import (
    EOS,
    MODEL,
    build_policy,
    greedy_without_cache,
    random_prompts,
    tokenizer,
    tokens_of,
    trainer_reads,
)

from nemo_eppo.config import ConfigError
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.generation import SamplingParams

KINDS: tuple[Kind, ...] = ("megatron", "tensorrt_llm")
PROMPTS = random_prompts([7, 1, 4, 12, 4, 9, 3, 20, 5, 5, 6, 2])
PROMPTS.append([*PROMPTS[0], 5, 6])  # shares a prefix
SEEDS = [1000 - 77 * i for i in range(len(PROMPTS))]  # negative ones, too
WINDOW = 40
SAMPLINGS = {
    "hot": SamplingParams(max_new_tokens=30, temperature=2.0),  # hot enough that EOS comes soon
    "top-k": SamplingParams(max_new_tokens=12, temperature=0.7, top_k=5),
    "top-p": SamplingParams(max_new_tokens=12, temperature=1.3, top_p=0.8),
    "penalty": SamplingParams(max_new_tokens=12, temperature=1.3, repetition_penalty=1.6),
    "stop strings": SamplingParams(max_new_tokens=30, temperature=2.0, stop_strings=("<end>", "u", "ob")),
    "greedy": SamplingParams(max_new_tokens=30, greedy=True),
    "greedy, all": SamplingParams(
        max_new_tokens=30, greedy=True, repetition_penalty=1.2, stop_strings=("<end>", "ka", "ob")
    ),
}


def complaint(engine: Any, prompts: list[list[int]], seeds: list[int]) -> str:
    try:
        engine.generate(prompts, SAMPLINGS["greedy"], seeds)
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def exercise(kind: Kind, directory: Path) -> dict[str, Any]:
    """Everything the tests below look at, from one engine."""
    chunks = build_policy({})
    engine = make_engine(kind, chunks, directory, max_sequence_length=WINDOW)
    found: dict[str, Any] = {}

    def refit(version: int) -> None:
        engine.refit(export_tensors(chunks, MODEL), version)

    def generate(prompts: list[list[int]], sampling: SamplingParams, seeds: list[int]) -> list[Completion]:
        return engine.generate(prompts, sampling, seeds)

    refit(1)
    for name, sampling in SAMPLINGS.items():
        completions = generate(PROMPTS, sampling, SEEDS)
        told = sampling  # by its log-probs
        if kind == "tensorrt_llm":
            told = sampling.model_copy(update={"top_k": 0, "top_p": 1.0})
        found[name] = (completions, trainer_reads(chunks, PROMPTS, completions, told))
    hot, backwards = SAMPLINGS["hot"], range(len(PROMPTS) - 1, -1, -1)
    found["backwards"] = generate([PROMPTS[i] for i in backwards], hot, [SEEDS[i] for i in backwards])[::-1]
    found["alone"] = [generate([PROMPTS[i]], hot, [SEEDS[i]])[0] for i in range(len(PROMPTS))]
    found["other seeds"] = generate(PROMPTS, hot, [seed + 1 for seed in SEEDS])
    found["nothing"] = generate([], hot, [])
    found["errors"] = [
        complaint(engine, [[5], []], [0, 1]),
        complaint(engine, [[5, 61]], [0]),
        complaint(engine, [[5] * WINDOW], [0]),
        complaint(engine, [[5]], [0, 1]),
        complaint(engine, [[5]], [2**63]),
    ]
    engine.sleep()
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(1.2).add_(0.02)
    refit(7)
    found["updated"] = generate(PROMPTS, SAMPLINGS["greedy"], SEEDS)
    found["updated, whole passes"] = [greedy_without_cache(chunks, MODEL, prompt, 8) for prompt in PROMPTS]
    with torch.no_grad():
        unwrap(chunks[0]).decoder.layers[2].mlp.linear_fc2.weight[3, 3] = torch.nan
    refit(8)
    try:
        generate(PROMPTS, SAMPLINGS["hot"], SEEDS)
    except FloatingPointError as error:
        found["errors"].append(str(error))
    engine.close()
    return found


@cache
def exercised(kind: Kind) -> dict[str, Any]:
    with TemporaryDirectory() as directory:
        found: dict[str, Any] = run_ranks(exercise, 1, kind, Path(directory))[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_depends_on_its_own_prompt_and_seed_alone(kind: Kind) -> None:
    found = exercised(kind)
    expected = tokens_of(found["hot"][0])
    assert tokens_of(found["backwards"]) == tokens_of(found["alone"]) == expected
    assert all(ours != other for ours, other in zip(expected, tokens_of(found["other seeds"]), strict=True))
    assert found["nothing"] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [name for name in SAMPLINGS if "greedy" not in name])
def test_logprobs_are_of_what_was_sampled_from_or_before_filters(kind: Kind, sampling: str) -> None:
    completions, expected = exercised(kind)[sampling]
    for completion, (logprobs, *_) in zip(completions, expected, strict=True):
        assert len(completion.logprobs) == len(completion.token_ids)
        torch.testing.assert_close(completion.logprobs, logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_ends_with_its_first_eos_or_at_its_limit(kind: Kind) -> None:
    reasons, limits = set(), set()
    for prompt, completion in zip(PROMPTS, exercised(kind)["hot"][0], strict=True):
        limit = min(30, WINDOW - len(prompt))
        reasons.add(completion.finish_reason)
        if completion.finish_reason == FinishReason.STOP:
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1 < limit
        else:
            assert EOS not in completion.token_ids
            assert len(completion.token_ids) == limit
            limits.add(limit)
    assert reasons == set(FinishReason)
    assert len(limits) > 1 or kind == "tensorrt_llm", "both limits should have been met"


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_ends_with_the_token_that_completes_a_stop_string(kind: Kind) -> None:
    texts, reasons = ("<end>", "u", "ob"), set()
    for completion in exercised(kind)["stop strings"][0]:
        before, whole = (tokenizer().decode(completion.token_ids[:end], special_tokens=True) for end in (-1, None))
        assert not any(text in before for text in texts)
        stopped = any(text in whole for text in (*texts, "<eos>"))
        assert stopped == (completion.finish_reason == FinishReason.STOP)
        reasons.add(next((text for text in texts if text in whole), None))
    assert {"u", "ob"} < reasons


@pytest.mark.parametrize("sampling", ["greedy", "greedy, all"])
def test_greedy_responses_are_the_same_of_every_engine(sampling: str) -> None:
    ours, theirs = (exercised(kind)[sampling][0] for kind in KINDS)
    assert tokens_of(ours) == tokens_of(theirs)
    assert [completion.finish_reason for completion in ours] == [completion.finish_reason for completion in theirs]


@pytest.mark.parametrize("kind", KINDS)
def test_completions_follow_an_update_and_name_its_version(kind: Kind) -> None:
    found = exercised(kind)
    before, after = found["greedy"][0], found["updated"]
    assert {completion.weight_version for completion in before} == {1}
    assert {completion.weight_version for completion in after} == {7}
    assert tokens_of(before) != tokens_of(after)
    for completion, whole in zip(after, found["updated, whole passes"], strict=True):
        size = min(len(completion.token_ids), len(whole))
        assert completion.token_ids[:size] == whole[:size]


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_work_is_refused(kind: Kind) -> None:
    expected = (
        "prompt 1 has 0 tokens; expected 1 to 39",
        "prompt 0 has tokens from 5 to 61; expected 0 to 60",
        "prompt 0 has 40 tokens; expected 1 to 39",
        "seeds: 2 for 1 prompts",
        "seed 0 is 9223372036854775808",
        "the model of weight version 8 gives NaN",
    )
    for message, start in zip(exercised(kind)["errors"], expected, strict=True):
        assert message.startswith(start)
