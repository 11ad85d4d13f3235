"""Rollout batches: layout of tokens and actions, selection, validation, seeds and mini-batches."""

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.rollout.batch import (
    Completion,
    Experience,
    FinishReason,
    RolloutBatch,
    minibatches,
    seeds_for,
    step_seed,
)
from nemo_eppo.settings.generation import SamplingParams

PAD = 99
PROMPTS = [[1, 2, 3], [4], [5, 6]]


def completion(tokens: list[int], reason: FinishReason) -> Completion:
    size = len(tokens)
    return Completion(tokens, -torch.rand(size), reason, 3, torch.rand(size), torch.randn(size + 1, 2))


COMPLETIONS = [
    completion([7, 8], FinishReason.STOP),
    completion([9, 10, 11, 12], FinishReason.LENGTH),
    completion([13], FinishReason.STOP),
]


def batch() -> RolloutBatch:
    return RolloutBatch.from_completions(PROMPTS, COMPLETIONS, PAD)


def test_a_batch_is_prompt_response_padding() -> None:
    rollout = batch()
    assert (rollout.batch_size, rollout.sequence_length) == (3, 5)
    assert rollout.tokens.dtype == torch.int64
    assert rollout.truncated.tolist() == [False, True, False]
    for row, prompt, completion in zip(rollout.tokens.tolist(), PROMPTS, COMPLETIONS, strict=True):
        tokens = prompt + completion.token_ids
        assert row == tokens + [PAD] * (5 - len(tokens))


def test_the_mask_selects_the_actions_that_produced_the_response() -> None:
    rollout = batch()
    assert rollout.mask.shape == rollout.engine_logprobs.shape == (3, 4)
    for b, completion in enumerate(COMPLETIONS):
        assert rollout.tokens[b, 1:][rollout.mask[b]].tolist() == completion.token_ids
        assert rollout.engine_logprobs[b][rollout.mask[b]].tolist() == completion.logprobs.tolist()
    assert not rollout.engine_logprobs[~rollout.mask].any()


def test_what_the_engine_read_stands_where_the_trainer_reads_it() -> None:
    rollout = batch()
    assert rollout.engine_entropies is not None
    assert rollout.engine_energies is not None
    assert rollout.engine_energies.shape == (3, 5, 2)
    for b, (prompt, made) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        torch.testing.assert_close(rollout.engine_entropies[b][rollout.mask[b]], made.entropies, rtol=0, atol=0)
        from_prompt = slice(len(prompt) - 1, len(prompt) + len(made.token_ids))
        torch.testing.assert_close(rollout.engine_energies[b, from_prompt], made.energies, rtol=0, atol=0)
        assert not rollout.engine_energies[b, : len(prompt) - 1].any()
        assert not rollout.engine_energies[b, from_prompt.stop :].any()


def test_padding_can_be_added_and_removed() -> None:
    rollout = batch()
    wide = rollout.with_padding(9)
    assert (wide.tokens[:, 5:] == PAD).all()
    assert torch.equal(wide.mask[:, :4], rollout.mask)
    assert wide.mask.sum() == rollout.mask.sum()
    assert wide.engine_logprobs.shape == (3, 8)
    assert wide.engine_energies is not None
    assert wide.engine_energies.shape == (3, 9, 2)
    assert torch.equal(wide.with_padding(5).tokens, rollout.tokens)
    with pytest.raises(ValueError, match="sequence_length: 4; expected at least 5"):
        rollout.with_padding(4)


def test_selection_takes_every_field_in_order() -> None:
    rollout, indices = batch(), torch.tensor([2, 0])
    chosen = rollout.select(indices)
    for field in dataclasses.fields(RolloutBatch):
        if field.name != "pad_id":
            assert torch.equal(getattr(chosen, field.name), getattr(rollout, field.name)[indices])


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "0 for 0 prompts"),
        ([[1]], COMPLETIONS, "3 for 1 prompts"),
        ([[]], [COMPLETIONS[0]], "sample 0: prompt is empty"),
        ([[1]], [Completion([], torch.zeros(0), FinishReason.STOP, 0)], "sample 0: response is empty"),
        ([[1]], [Completion([1, 2], torch.zeros(1), FinishReason.STOP, 0)], "sample 0: 1 log-probs for 2 tokens"),
    ],
)
def test_impossible_completions_are_refused(prompts: Any, completions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutBatch.from_completions(prompts, completions, PAD)


def experience(**changes: Any) -> Experience:
    mask = batch().mask
    per_token = {
        name: torch.randn(mask.shape)
        for name in ("logprobs", "values", "rewards", "advantages", "returns", "ref_logprobs")
    }
    return Experience(**{"mask": mask, **per_token, "energies": torch.randn(3, 2), **changes})


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "energies"])
def test_validation_names_the_field_with_a_wrong_shape(name: str) -> None:
    good = experience()
    good.validate()
    with pytest.raises(ValueError, match=f"^{name}: shape"):
        dataclasses.replace(good, **{name: getattr(good, name)[:2]}).validate()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["values", "rewards", "advantages", "returns"])
def test_validation_names_the_field_that_is_not_finite(name: str, poison: float) -> None:
    good = experience()
    broken = getattr(good, name).clone()
    broken[0, 2] = poison
    with pytest.raises(ValueError, match=f"^{name}: {poison} in sample 0 at position 2"):
        dataclasses.replace(good, **{name: broken}).validate()


def test_validation_does_not_look_at_masked_positions() -> None:
    good = experience()
    assert good.values is not None
    dataclasses.replace(good, values=torch.where(good.mask, good.values, torch.nan)).validate()


def test_experience_selects_every_field_it_has() -> None:
    full, indices = experience(), torch.tensor([1, 1, 0])
    chosen = full.select(indices)
    assert chosen.ref_energies is None
    for field in dataclasses.fields(Experience):
        if (x := getattr(full, field.name)) is not None:
            assert torch.equal(getattr(chosen, field.name), x[indices])


def test_minibatches_cover_the_batch_once_and_each_epoch_in_its_own_order() -> None:
    orders = [torch.cat(minibatches(24, 6, seed, epoch)).tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert [len(m) for m in minibatches(24, 6, 1, 0)] == [6] * 4
    assert torch.cat(minibatches(24, 8, 1, 0)).tolist() == orders[0]
    with pytest.raises(ValueError, match="mini_batch_size: 7"):
        minibatches(24, 7, 1, 0)


def test_every_order_is_as_likely_as_any_other() -> None:
    first = torch.stack([torch.cat(minibatches(8, 8, seed, 0)) for seed in range(4000)])
    counts = torch.stack([torch.bincount(column, minlength=8) for column in first.T]).double()
    chi_squared = ((counts - 500) ** 2 / 500).sum(1)
    assert (chi_squared < 29.9).all()  # 0.9999 quantile for 7 degrees of freedom


def test_seeds_depend_on_run_step_and_place_in_the_global_batch_only() -> None:
    seeds = seeds_for(step_seed(5, 2), torch.arange(16))
    assert torch.equal(seeds_for(step_seed(5, 2), torch.tensor([7, 3])), seeds[[7, 3]])
    every = torch.cat([seeds_for(step_seed(run, step), torch.arange(50)) for run in range(8) for step in range(8)])
    assert len(every.unique()) == 8 * 8 * 50


def test_sampling_params_refuse_what_cannot_be_sampled() -> None:
    assert SamplingParams(max_new_tokens=8).temperature == 1
    for settings in ({"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": 0}, {"max_new_tokens": 1, "top_p": 0}):
        with pytest.raises(ConfigError):
            load_config(SamplingParams, settings)
    with pytest.raises(ConfigError, match="greedy"):
        load_config(SamplingParams, {"max_new_tokens": 1, "greedy": True, "top_k": 5})


def test_greedy_responses_begin_and_end_as_sampled_ones() -> None:
    ends: dict[str, Any] = {
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "stop_strings": ("###",),
        "repetition_penalty": 1.2,
    }
    sampled = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, **ends)
    assert sampled.as_greedy == SamplingParams(greedy=True, **ends)


@pytest.mark.parametrize("reads", [False, True])
def test_completions_travel_whole(reads: bool) -> None:
    read = (torch.rand(3), torch.rand(4, 2)) if reads else (None, None)
    sent = Completion([7, 128_000, 0], torch.tensor([-1.5, -0.1, 0.0]), FinishReason.LENGTH, 12, *read)
    got = pickle.loads(pickle.dumps(sent))
    assert (got.token_ids, got.finish_reason, got.weight_version) == (sent.token_ids, FinishReason.LENGTH, 12)
    for name in ("logprobs", "entropies", "energies"):
        one, other = getattr(got, name), getattr(sent, name)
        assert (one is None and other is None) or torch.equal(one, other)


def test_completions_travel_as_arrays() -> None:
    sent = Completion([128_000] * 1000, torch.zeros(1000), FinishReason.STOP, 1)
    assert len(pickle.dumps(sent)) < 9 * 1000, "4 bytes for a token id and 4 for its log-prob; a list takes more"
