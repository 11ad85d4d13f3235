"""Seconds of a PPO step's work on the host, without any model: padding, checks, rewards, batches, rollout files."""

import pickle
import tempfile
from functools import partial
from pathlib import Path

import torch
from pairs import Contestant, Options, Row, interleave, medians

from nemo_eppo.algorithms.advantages import GAE
from nemo_eppo.observability.recorder import record
from nemo_eppo.rewards.inputs import Column, RewardInputs
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import Completion, FinishReason, RolloutBatch, minibatches
from nemo_eppo.settings.shaping import EnergyPenaltyConfig, KLPenaltyConfig, RepetitionConfig, ShapingConfig
from nemo_eppo.training.policy import next_token_targets
from nemo_eppo.training.ppo import engine_mismatch
from nemo_eppo.training.ppo_loop import rollout_rows

SHAPING = ShapingConfig(energy_penalty=EnergyPenaltyConfig(eta=2.0), kl=KLPenaltyConfig(coefficient=0.01))


def measure(options: Options) -> list[Row]:
    count, length = (4, 32) if options.smallest else (1024, 2048)
    half = length // 2
    prompts = torch.randint(2, 32_000, (count, half)).tolist()
    answers = torch.randint(2, 32_000, (count, half)).tolist()
    completions = [Completion(answer, torch.full((half,), -1.0), FinishReason.LENGTH, 1) for answer in answers]
    text = "word " * half
    samples = [Sample(prompt=text, response=text, token_ids=tuple(answer), finished=False) for answer in answers]
    batch = RolloutBatch.from_completions(prompts, completions, pad_id=0)
    mask = batch.mask
    logprobs = -torch.rand(mask.shape)
    logprobs[~mask] = 0
    inputs = RewardInputs(
        scores=torch.randn(count, 1),
        columns=[Column(name="model")],
        samples=samples,
        tokens=batch.tokens,
        prompt_lengths=batch.prompt_lengths,
        mask=mask,
        truncated=batch.truncated,
        logprobs=logprobs,
        energies=torch.rand(count, 1),
        ref_logprobs=logprobs - 0.01,
        ref_energies=torch.rand(count, 1),
        step=1,
        max_steps=10,
    )
    pipeline = RewardPipeline(SHAPING)
    repetition = RewardPipeline(SHAPING.model_copy(update={"repetition": RepetitionConfig(coefficient=1.0)}))
    shaped = pipeline(inputs)
    ledger = shaped.ledger
    with tempfile.TemporaryDirectory() as folder:
        recorded = rollout_rows(batch, samples, ledger.rows())
        work: dict[str, Contestant] = {
            "completions, pickled and unpickled": lambda: pickle.loads(pickle.dumps(completions)),
            "RolloutBatch.from_completions": partial(RolloutBatch.from_completions, prompts, completions, 0),
            "next_token_targets": partial(next_token_targets, batch.tokens, mask),
            "engine_mismatch": partial(engine_mismatch, batch, logprobs, None),
            "reward pipeline": partial(pipeline, inputs),
            "reward pipeline with repetition": partial(repetition, inputs),
            "advantages (GAE)": partial(
                GAE(), shaped.token_rewards, logprobs, mask, torch.arange(count), batch.truncated
            ),
            "ledger means and rows": lambda: (ledger.means(), ledger.rows()),
            "mini-batches": lambda: [batch.select(part) for part in minibatches(count, count // 4, 1, 0)],
            "rollout rows": lambda: rollout_rows(batch, samples, ledger.rows()),
            "rollout recorder": partial(record, Path(folder), 1, recorded),
        }
        seconds = interleave(work, options.rounds)
    return medians(seconds, rows=count, tokens=length)
