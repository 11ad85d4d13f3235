"""The divergence in the loss of a real update: no layout, micro-batch or padding changes its gradient."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from distributed import run_ranks
from jobs import Models

from nemo_eppo.algorithms.divergences import sequence_divergence
from nemo_eppo.config import load_config
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rollout.batch import Completion, Experience, FinishReason, RolloutBatch
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelSetup, ParallelConfig
from nemo_eppo.settings.ppo import EnergyConfig, PPOSettings
from nemo_eppo.settings.shaping import ShapingConfig
from nemo_eppo.settings.training import OptimizerConfig
from nemo_eppo.training.policy import Policy
from nemo_eppo.training.ppo import PPO
from nemo_eppo.training.setup import build, plan

COEFFICIENT = 0.3
KINDS = ("kl", "chi2", "sqrt_chi2")


def a_batch(columns: int) -> RolloutBatch:
    draw = torch.Generator().manual_seed(3)
    completions = []
    for length in (3, 9, 5, 12, 1, 7, 4, 8):
        tokens = torch.randint(0, 60, (length,), generator=draw).tolist()
        completions.append(Completion(tokens, torch.zeros(length), FinishReason.STOP, 0))
    return RolloutBatch.from_completions([[1, 2, 3]] * 8, completions, 0).with_padding(columns)


def updates(source: Path, layout: dict[str, Any], micro_batch_size: int, columns: int) -> dict[str, dict[str, float]]:
    """The metrics of one update with nothing in the loss but the divergence from a reference that is elsewhere."""
    setup = ModelSetup(restore_from_path=source, parallel=ParallelConfig(**layout), micro_batch_size=micro_batch_size)
    planned = plan(setup, head="lm")
    runtime.initialize(setup.parallel, 1)
    batch, results = a_batch(columns), {}
    for kind in KINDS:
        settings = load_config(
            PPOSettings,
            {
                "max_steps": 1,
                "rollout_batch_size": 8,
                "mini_batch_size": 8,
            },
        )
        shaping = load_config(ShapingConfig, {"divergence": {"kind": kind, "coefficient": COEFFICIENT}})
        runner = build(planned, "lm", optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.0))
        unused = cast(Any, None)
        policy = Policy(runner, planned.model, FrozenWeights(runner.chunks), unused, EnergyConfig(), unused)
        sampling = SamplingParams(max_new_tokens=20)
        ppo = PPO(settings, RewardPipeline(shaping), policy, None, unused, {}, sampling, planned.tokenizer, 1)
        logprobs = policy.infer(batch, energies=False).logprobs
        shift = 0.1 * torch.sin(torch.arange(8 * 14).float()).view(8, 14)  # nothing here may depend on the padding
        ref_logprobs = logprobs.clone()
        ref_logprobs[:, :14] += shift
        zeros = torch.zeros_like(logprobs)
        experience = Experience(
            mask=batch.mask,
            logprobs=logprobs + 1,  # stale: the slope has to come from the weights as they are now
            ref_logprobs=ref_logprobs,
            energies=zeros[:, :1],
            rewards=zeros,
            advantages=zeros,
        )
        chi2 = sequence_divergence(logprobs, ref_logprobs, batch.mask)
        results[kind] = ppo._train_policy(batch, experience, is_first=False)
        results[kind] |= {"expected_kl": float(chi2.kl.mean()), "expected_chi2": float(chi2.chi2.mean())}
    return results


@pytest.fixture(scope="module")
def whole(models: Models) -> dict[str, dict[str, float]]:
    return run_ranks(updates, 1, models.sft, {}, 8, 15)[0]


def test_the_loss_is_the_documented_formula(whole: dict[str, dict[str, float]]) -> None:
    found = {kind: whole[kind]["divergence_loss"] for kind in KINDS}
    chi2 = whole["chi2"]["expected_chi2"]
    assert found["kl"] == pytest.approx(COEFFICIENT * whole["kl"]["expected_kl"], rel=1e-4)
    assert found["chi2"] == pytest.approx(COEFFICIENT * chi2, rel=1e-4)
    assert found["sqrt_chi2"] == pytest.approx(COEFFICIENT * chi2**0.5 / 2, rel=1e-4)  # a surrogate: half the value
    assert whole["sqrt_chi2"]["grad_norm"] == pytest.approx(whole["chi2"]["grad_norm"] / (2 * chi2**0.5), rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "layout", "micro_batch_size", "columns"),
    [(1, {}, 1, 15), (1, {}, 3, 24), (2, {}, 2, 15), (2, {"tensor_model_parallel_size": 2}, 4, 15)],
    ids=["micro_batches_of_1", "padded", "dp2", "tp2"],
)
def test_no_layout_micro_batch_or_padding_changes_it(
    ranks: int,
    layout: dict[str, Any],
    micro_batch_size: int,
    columns: int,
    whole: dict[str, dict[str, float]],
    models: Models,
) -> None:
    for found in run_ranks(updates, ranks, models.sft, layout, micro_batch_size, columns):
        for kind in KINDS:
            for name in ("divergence_loss", "grad_norm"):
                assert found[kind][name] == pytest.approx(whole[kind][name], rel=2e-4), (kind, name)
