"""What a response depends on, where it ends, and what generating leaves alone."""

from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from small_models import (
    EOS,
    MODEL,
    build_engine,
    build_policy,
    random_prompts,
    tokenizer,
    tokens_of,
)

from nemo_eppo.generation import megatron_engine
from nemo_eppo.generation.decoder import Decoder, Outputs
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.rollout.batch import Completion, FinishReason
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams

LENGTHS = [7, 1, 4, 12, 4, 9, 3, 20, 5, 5, 6, 2, 15, 8, 10, 11]
PROMPTS = random_prompts(LENGTHS)
SEEDS = [1000 + i for i in range(len(PROMPTS))]
HOT = SamplingParams(max_new_tokens=40, temperature=2.0)  # hot enough that EOS comes soon, at different lengths


def on_one_rank(test: Any, *args: Any) -> Any:
    return run_ranks(test, 1, *args)[0]


def generate_alone() -> list[Completion]:
    engine = build_engine(build_policy({}), max_batch_size=1)
    return engine.generate(PROMPTS, HOT, SEEDS)


@cache
def alone() -> list[Completion]:
    """Each prompt decoded by itself."""
    completions: list[Completion] = on_one_rank(generate_alone)
    ends = [len(completion.token_ids) for completion in completions]
    assert len(set(ends)) > 6, f"the responses should end at different lengths: {ends}"
    return completions


def generate_in_batches(sizes: list[int]) -> list[list[list[int]]]:
    chunks = build_policy({})
    return [tokens_of(build_engine(chunks, max_batch_size=size).generate(PROMPTS, HOT, SEEDS)) for size in sizes]


def test_a_response_does_not_depend_on_the_batch_size() -> None:
    for batch in on_one_rank(generate_in_batches, [3, 8, 16]):
        assert batch == tokens_of(alone())


def count_steps(size: int) -> int:
    steps, step = [], Decoder.step

    def counted(self: Decoder, tokens: torch.Tensor) -> Outputs:
        steps.append(tokens)
        return step(self, tokens)

    Decoder.step = counted  # type: ignore[method-assign]
    megatron_engine._BLOCK = 1
    build_engine(build_policy({}), max_batch_size=size).generate(PROMPTS, HOT, SEEDS)
    return len(steps)


def test_prompts_join_as_responses_end() -> None:
    size = 4
    lengths = [len(completion.token_ids) for completion in alone()]
    longest_first = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
    waves = sum(max(lengths[i] for i in longest_first[start : start + size]) for start in range(0, len(PROMPTS), size))
    # until the last prompt has joined every row is at work
    assert on_one_rank(count_steps, size) <= sum(lengths) / size + max(lengths) < waves


def steps_of_each_stage() -> tuple[list[list[int]], list[int]]:
    """Responses, and the sequences whose lane is at work in each of this stage's steps."""
    lanes, step = [], Decoder.step

    def recorded(self: Decoder, tokens: torch.Tensor) -> Outputs:
        lanes.append(id(self))
        return step(self, tokens)

    Decoder.step = recorded  # type: ignore[method-assign]
    engine = build_engine(build_policy({"pipeline_model_parallel_size": 2}), max_batch_size=4)
    return tokens_of(engine.generate(PROMPTS, HOT, SEEDS)), lanes


def test_pipeline_stages_take_turns_with_lanes_of_sequences() -> None:
    for responses, lanes in run_ranks(steps_of_each_stage, 2):
        assert responses == tokens_of(alone())
        assert len(set(lanes)) == 2
        turns = sum(lane != following for lane, following in pairwise(lanes))
        assert turns >= 0.8 * len(lanes)  # while a token is on its way, the stage steps in the other lane


def groups_of_communication() -> tuple[set[str], set[str]]:
    """The names of the groups in which this stage sends or receives, and of those with collectives."""
    names: dict[str, set[str]] = {"send": set(), "recv": set(), "broadcast": set(), "all_reduce": set()}

    def note(name: str, function: Any) -> Any:
        def noted(*args: Any, group: dist.ProcessGroup, **options: Any) -> Any:
            names[name].add(group.group_name)
            return function(*args, group=group, **options)

        return noted

    engine = build_engine(build_policy({"pipeline_model_parallel_size": 2}), max_batch_size=4)
    for name in names:
        setattr(dist, name, note(name, getattr(dist, name)))
    engine.generate(PROMPTS, HOT, SEEDS)
    return names["send"] | names["recv"], names["broadcast"] | names["all_reduce"]


def test_hidden_states_do_not_wait_behind_the_tokens_of_another_lane() -> None:
    for hidden_states, tokens in run_ranks(groups_of_communication, 2):
        assert hidden_states
        assert tokens
        assert not hidden_states & tokens


def generate_among_others() -> list[list[int]]:
    others = random_prompts([30, 2, 17], seed=9)
    engine = build_engine(build_policy({}), max_batch_size=20)
    return tokens_of(engine.generate([*others, *PROMPTS], HOT, [5, 6, 7, *SEEDS]))[len(others) :]


def test_a_response_does_not_depend_on_the_other_prompts() -> None:
    assert on_one_rank(generate_among_others) == tokens_of(alone())


def generate_groups(layout: dict[str, Any], size: int) -> tuple[list[Completion], int]:
    """Three answers to each of five prompts, in batches of `size`, and how many prompts were computed."""
    computed, prefill = [], Decoder._prefill

    def counted(self: Decoder, tokens: torch.Tensor, first: int) -> Any:
        computed.append(len(tokens))
        return prefill(self, tokens, first)

    Decoder._prefill = counted  # type: ignore[method-assign]
    engine = build_engine(build_policy(layout), energy=EnergyProbeConfig(), max_batch_size=size)
    prompts = [prompt for prompt in PROMPTS[:5] for _ in range(3)]
    sampling = HOT.model_copy(update={"repetition_penalty": 1.2})
    return engine.generate(prompts, sampling, SEEDS[:15]), sum(computed)


@pytest.mark.parametrize(
    ("layout", "size", "most"), [({}, 15, 5), ({}, 7, 12), ({"tensor_model_parallel_size": 2}, 15, 5)]
)
def test_equal_prompts_are_computed_once_for_all_their_answers(layout: dict[str, Any], size: int, most: int) -> None:
    alone, computed_alone = on_one_rank(generate_groups, {}, 1)
    assert computed_alone == 15
    for together, computed in run_ranks(generate_groups, layout.get("tensor_model_parallel_size", 1), layout, size):
        assert 5 <= computed <= most
        assert tokens_of(together) == tokens_of(alone)
        for one, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(one.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(one.energies, expected.energies, atol=1e-5, rtol=1e-5)


def generate_per_replica() -> tuple[int, list[list[int]]]:
    engine = build_engine(build_policy({}))
    shares = [slice(0, 5), slice(5, 5)]  # the second replica has no prompts at all
    replica = dist.get_rank()
    share = shares[replica]
    return replica, tokens_of(engine.generate(PROMPTS[share], HOT, SEEDS[share]))


def test_replicas_may_have_different_numbers_of_prompts() -> None:
    assert sorted(run_ranks(generate_per_replica, 2)) == [(0, tokens_of(alone())[:5]), (1, [])]


def draw_many(count: int, sampling: SamplingParams) -> tuple[list[int], torch.Tensor]:
    chunks = build_policy({})
    completions = build_engine(chunks, max_batch_size=count).generate(
        [PROMPTS[0]] * count, sampling, list(range(count))
    )
    tokens = torch.tensor([PROMPTS[0]])
    logits = unwrap(chunks[0])(tokens, torch.arange(tokens.size(1))[None], None)[0, -1, : MODEL.vocab_size]
    return [completion.token_ids[0] for completion in completions], logits.detach()


def test_sampled_tokens_follow_the_softmax() -> None:
    """Pearson's chi-squared test."""
    count, temperature = 4000, 1.5
    drawn, logits = on_one_rank(draw_many, count, SamplingParams(max_new_tokens=1, temperature=temperature))
    expected = (logits.double() / temperature).softmax(-1) * count
    assert expected.min() > 5, "too few draws for the test's approximation"
    observed = torch.bincount(torch.tensor(drawn), minlength=MODEL.vocab_size).double()
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), torch.tensor(MODEL.vocab_size - 1.0)
    p_value = float(torch.special.gammaincc(freedom / 2, statistic / 2))
    assert p_value > 1e-3, f"chi-squared {statistic:.1f} with {freedom:.0f} degrees of freedom"


def test_top_k_samples_only_the_k_likeliest() -> None:
    drawn, logits = on_one_rank(draw_many, 500, SamplingParams(max_new_tokens=1, temperature=5.0, top_k=3))
    assert set(drawn) == set(logits.topk(3).indices.tolist())


def test_only_responses_without_eos_are_truncated() -> None:
    for completion in alone():
        if completion.finish_reason == FinishReason.STOP:
            assert completion.token_ids.index(EOS) == len(completion.token_ids) - 1
        else:
            assert EOS not in completion.token_ids
            assert len(completion.token_ids) == HOT.max_new_tokens
    assert {completion.finish_reason for completion in alone()} == set(FinishReason)


def generate_in_a_window() -> list[Completion]:
    engine = build_engine(build_policy({}), max_sequence_length=24)
    return engine.generate(PROMPTS, SamplingParams(max_new_tokens=12, greedy=True), SEEDS)


def test_a_response_is_cut_at_max_new_tokens_and_at_the_window() -> None:
    truncated = set()
    for prompt, completion in zip(PROMPTS, on_one_rank(generate_in_a_window), strict=True):
        limit = min(12, 24 - len(prompt))
        if completion.finish_reason == FinishReason.LENGTH:
            assert len(completion.token_ids) == limit
            truncated.add(limit)
        else:
            assert len(completion.token_ids) <= limit
    assert {12, 4} <= truncated, "both limits should have been met"


def generate_one_token() -> list[Completion]:
    return build_engine(build_policy({})).generate(PROMPTS, SamplingParams(max_new_tokens=1, temperature=2.0), SEEDS)


def test_one_new_token_is_the_first_of_a_longer_response() -> None:
    assert tokens_of(on_one_rank(generate_one_token)) == [completion.token_ids[:1] for completion in alone()]


def generate_in_blocks_of(sizes: list[int]) -> list[list[list[int]]]:
    chunks = build_policy({})
    batches = []
    for size in sizes:
        megatron_engine._BLOCK = size
        batches.append(tokens_of(build_engine(chunks, max_batch_size=16).generate(PROMPTS, HOT, SEEDS)))
    return batches


def test_how_often_ended_rows_are_dropped_changes_nothing() -> None:
    for batch in on_one_rank(generate_in_blocks_of, [1, 3, 100]):
        assert batch == tokens_of(alone())


STOPPING = HOT.model_copy(update={"stop_strings": ("ob", "kab", "e<pad>", "<end>")})


def generate_with_stop_strings(sizes: list[tuple[int, int]]) -> list[list[Completion]]:
    chunks, batches = build_policy({}), []
    for megatron_engine._BLOCK, size in sizes:
        batches.append(build_engine(chunks, max_batch_size=size).generate(PROMPTS, STOPPING, SEEDS))
    return batches


def test_stop_strings_end_responses_and_change_nothing_before() -> None:
    reasons = []
    for batch in on_one_rank(generate_with_stop_strings, [(1, 16), (3, 5), (8, 1), (100, 8)]):
        for whole, completion in zip(alone(), batch, strict=True):
            texts = [tokenizer().decode(whole.token_ids[: n + 1], True) for n in range(len(whole.token_ids))]
            ends = [n + 1 for n, text in enumerate(texts) if any(stop in text for stop in STOPPING.stop_strings)]
            length = ends[0] if ends else len(whole.token_ids)
            assert completion.token_ids == whole.token_ids[:length]
            torch.testing.assert_close(completion.logprobs, whole.logprobs[:length], atol=1e-4, rtol=0)
            assert completion.finish_reason == (FinishReason.STOP if ends else whole.finish_reason)
            reasons.append((completion.finish_reason, bool(ends)))
    assert len(set(reasons)) == 3, "EOS, a stop string and the longest length should all have ended some"


def look_around_generate() -> dict[str, bool]:
    chunks = build_policy({})
    decoder, fired = unwrap(chunks[0]), []
    for module in decoder.modules():
        module.register_forward_hook(lambda *_: fired.append(True))
    chunks[0].train()
    decoder.decoder.layers[1].eval()
    modes, state = [module.training for module in decoder.modules()], torch.get_rng_state()
    build_engine(chunks).generate(PROMPTS, HOT, SEEDS)
    found = {
        "hooks are silent": not fired,
        "modes are kept": modes == [module.training for module in decoder.modules()],
        "random state is kept": bool(torch.equal(state, torch.get_rng_state())),
    }
    tokens = torch.tensor(PROMPTS[:1])
    decoder(tokens, torch.arange(tokens.size(1))[None], None).sum().backward()
    found["training goes on"] = all(parameter.grad is not None for parameter in decoder.parameters())
    return found


def test_generating_leaves_model_and_random_state_alone() -> None:
    found = on_one_rank(look_around_generate)
    assert all(found.values()), found


def refusals() -> dict[str, str]:
    """What is said of engines that cannot be, and of a model that gives NaN."""
    chunks = build_policy({})

    def greedy_with_nan() -> None:
        with torch.no_grad():
            unwrap(chunks[0]).decoder.layers[2].mlp.linear_fc2.weight[3, 3] = torch.nan
        build_engine(chunks).generate(PROMPTS, SamplingParams(max_new_tokens=3, greedy=True), SEEDS)

    attempts: dict[str, Callable[[], object]] = {
        "long window": lambda: build_engine(chunks, max_sequence_length=65),
        "eos outside": lambda: build_engine(chunks, eos_id=61),
        "no batch": lambda: build_engine(chunks, max_batch_size=0),
        "NaN greedy": greedy_with_nan,
    }
    said = {}
    for case, attempt in attempts.items():
        with pytest.raises((ValueError, FloatingPointError)) as error:
            attempt()
        said[case] = f"{error.type.__name__}: {error.value}"
    return said


def test_what_cannot_work_is_refused() -> None:
    said = on_one_rank(refusals)
    for case, message in (
        ("long window", "ConfigError: max_sequence_length = 65: expected 2 to 64"),
        ("eos outside", "ConfigError: eos_id = 61: expected 0 to 60"),
        ("no batch", "ConfigError: max_batch_size = 0: expected at least 1"),
        ("NaN greedy", "FloatingPointError: the model of weight version 0 gives NaN"),
    ):
        assert said[case].startswith(message)
