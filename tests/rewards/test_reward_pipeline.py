"""The composed reward: order, bookkeeping, refusals, and independence from everything outside the mask."""

import math
from typing import Any

import pytest
import torch

from nemo_eppo.algorithms.masking import response_mask
from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.rewards.inputs import Column, RewardInputs
from nemo_eppo.rewards.pipeline import RewardPipeline, ShapedRewards
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.shaping import ShapingConfig

B, S = 6, 12
PROMPTS, LENGTHS = torch.tensor([3, 1, 5, 9, 2, 2]), torch.tensor([8, 12, 6, 12, 7, 9])
MASK = response_mask(PROMPTS, LENGTHS, S)
EVERYTHING: dict[str, Any] = {
    "combine": "mean",
    "latent_penalty": {"gamma": 0.1},
    "length_penalty": {"kind": "authors", "length": 5},
    "missing_eos": {"penalty": 1.5},
    "energy_penalty": {"eta": 2.0, "floor_ratio": 0.8, "standardize": True, "schedule": "linear"},
    "clip": {"range": 1.0},
    "divergence": {"kind": "sqrt_chi2", "coefficient": 0.1, "placement": "reward"},
    "kl": {"coefficient": 0.1, "controller": "adaptive", "target": 1.0, "horizon": 100},
}


def pipeline(settings: dict[str, Any]) -> RewardPipeline:
    return RewardPipeline(load_config(ShapingConfig, settings))


def make_inputs(seed: int = 0, models: int = 1, **changes: Any) -> RewardInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    values: dict[str, Any] = {
        "scores": 3 * normal(B, models) + 2,
        "columns": [Column(name=f"model {i}", mean=2.0, std=3.0) for i in range(models)],
        "samples": [Sample(prompt="p", response="r", token_ids=(1,), finished=True) for _ in range(B)],
        "tokens": torch.zeros(B, S, dtype=torch.int64),
        "prompt_lengths": PROMPTS,
        "mask": MASK,
        "truncated": torch.tensor([True, False, False, True, False, False]),
        "energies": normal(B, 3),
        "ref_energies": normal(B, 3),
        "logprobs": normal(B, S - 1),
        "ref_logprobs": normal(B, S - 1),
        "latents": normal(B, 5),
        "step": 3,
        "max_steps": 4,
    }
    return RewardInputs(**{**values, **changes})


def final(result: ShapedRewards) -> torch.Tensor:
    return result.ledger.entries["reward/final"]


def test_contributions_add_up_to_the_final_reward_and_to_the_token_rewards() -> None:
    result = pipeline(EVERYTHING)(make_inputs(models=3))
    contributions = result.ledger.contributions
    assert list(contributions) == [
        "reward/proxy",
        "reward/latent_penalty",
        "reward/length_penalty",
        "reward/missing_eos",
        "reward/energy_penalty",
        "reward/clip",
        "reward/divergence",
        "reward/kl",
    ]
    assert all(x.abs().max() > 0 for x in contributions.values())
    assert result.token_rewards.dtype == torch.float32
    torch.testing.assert_close(result.token_rewards.double().sum(1), final(result), rtol=0, atol=1e-6)
    for row in result.ledger.rows():
        assert sum(row[name] for name in contributions) == pytest.approx(row["reward/final"], abs=1e-6)
    means = result.ledger.means()
    assert sum(means[name] for name in contributions) == pytest.approx(means["reward/final"], abs=1e-6)


def test_the_composition_follows_its_documented_order() -> None:
    inputs = make_inputs(models=2)
    assert inputs.ref_energies is not None
    assert inputs.ref_logprobs is not None
    settings = {
        "combine": "mean",
        "length_penalty": {"kind": "linear", "length": 4, "coefficient": 0.3},
        "missing_eos": {"penalty": 0.7},
        "energy_penalty": {"eta": 0.2},
        "clip": {"range": 0.9},
        "kl": {"coefficient": 0.05},
    }
    rewards = pipeline(settings)(inputs).token_rewards
    for b in range(B):
        n = int(LENGTHS[b] - PROMPTS[b])
        reward = float(((inputs.scores[b] - 2) / 3).mean())
        reward -= 0.3 * max(0, n - 4)
        reward -= 0.7 * bool(inputs.truncated[b])
        reward -= 0.2 * float((inputs.energies[b] - inputs.ref_energies[b]).abs().sum())
        reward = min(max(reward, -0.9), 0.9)
        for t in range(S - 1):
            inside = PROMPTS[b] <= t + 1 < LENGTHS[b]
            expected = -0.05 * float(inputs.logprobs[b, t] - inputs.ref_logprobs[b, t]) if inside else 0.0
            if t == LENGTHS[b] - 2:
                expected += reward
            assert float(rewards[b, t]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e9])
def test_what_stands_at_masked_positions_changes_no_bit(poison: float) -> None:
    inputs = make_inputs(models=3)
    assert inputs.ref_logprobs is not None
    fuzzed = make_inputs(
        models=3,
        logprobs=torch.where(MASK, inputs.logprobs, poison),
        ref_logprobs=torch.where(MASK, inputs.ref_logprobs, -poison),
    )
    clean_result, fuzzed_result = pipeline(EVERYTHING)(inputs), pipeline(EVERYTHING)(fuzzed)
    assert torch.equal(clean_result.token_rewards, fuzzed_result.token_rewards)
    assert clean_result.ledger.rows() == fuzzed_result.ledger.rows()


def test_rewards_are_independent_of_padding() -> None:
    inputs = make_inputs(models=3)
    wide: dict[str, Any] = {
        name: torch.nn.functional.pad(getattr(inputs, name), (0, 9))
        for name in ("tokens", "mask", "logprobs", "ref_logprobs")
    }
    padded = pipeline(EVERYTHING)(make_inputs(models=3, **wide)).token_rewards
    torch.testing.assert_close(padded[:, : S - 1], pipeline(EVERYTHING)(inputs).token_rewards)
    assert not padded[:, S - 1 :].any()


@pytest.mark.parametrize("name", ["scores", "energies", "ref_energies", "logprobs", "ref_logprobs"])
def test_nan_is_an_error_that_names_quantity_and_sample(name: str) -> None:
    broken = getattr(make_inputs(), name).clone()
    broken[(2, 4) if broken.dim() == 2 and broken.shape[1] == S - 1 else -1] = math.nan
    sample = 2 if "logprobs" in name else B - 1
    with pytest.raises(ValueError, match=f"{name}: nan in sample {sample}"):
        pipeline(EVERYTHING)(make_inputs(**{name: broken}))


def test_energy_is_needed_only_for_the_penalty_and_reported_whenever_given() -> None:
    nothing = make_inputs(ref_energies=None)
    with pytest.raises(ValueError, match=r"ref_energies: needed for shaping\.energy_penalty"):
        pipeline({"energy_penalty": {"eta": 2.0}})(nothing)
    off = pipeline({"energy_penalty": {"eta": 0}})
    assert "energy/difference" not in off(nothing).ledger.means()
    inputs = make_inputs()
    assert inputs.ref_energies is not None
    means = off(inputs).ledger.means()
    assert "reward/energy_penalty" not in means  # a term that does nothing has no row
    assert means["energy/policy"] == pytest.approx(float(inputs.energies.double().sum(1).mean()))
    difference = (inputs.energies - inputs.ref_energies).abs().sum(1).mean()
    assert means["energy/difference"] == pytest.approx(float(difference))
    several: dict[str, Any] = {"energies": torch.tensor([[1.0, 2.0, 3.0]] * B), "ref_energies": torch.zeros(B, 3)}
    ledger = pipeline({"energy_penalty": {"eta": 1.0}})(make_inputs(**several)).ledger.means()
    assert (ledger["energy/policy"], ledger["energy/difference"]) == (6.0, 6.0), "of three modules"
    assert ledger["reward/energy_penalty"] == -6.0, "the penalty is eta times the recorded difference"


def test_energy_schedule_and_sides() -> None:
    energies: dict[str, Any] = {"energies": torch.ones(B, 1), "ref_energies": torch.full((B, 1), 2.0)}
    for settings, expected in (
        ({"eta": 0.4}, -0.4),
        ({"eta": 0.4, "sided": "rise"}, 0.0),
        ({"eta": 0.4, "schedule": "linear"}, -0.3),  # step 3 of 4
    ):
        means = pipeline({"energy_penalty": settings})(make_inputs(**energies)).ledger.means()
        assert means["reward/energy_penalty"] == pytest.approx(expected)


def test_the_standardised_energy_penalty_uses_statistics_of_the_run() -> None:
    run = pipeline({"energy_penalty": {"eta": 1.0, "standardize": True}, "clip": {"range": None}})
    differences = []
    for seed in range(3):
        inputs = make_inputs(seed)
        assert inputs.ref_energies is not None
        differences.append((inputs.energies - inputs.ref_energies).double().abs().sum(1))
        penalty = run(inputs).ledger.contributions["reward/energy_penalty"]
        seen = torch.cat(differences)
        expected = -(differences[-1] - seen.mean()) / seen.std(correction=0)
        torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "linear", "length": 4, "coefficient": 0.5}, [-0.5, -3.5, 0.0, 0.0, -0.5, -1.5]),
        ({"kind": "soft_overlong", "length": 11, "buffer": 6, "coefficient": 3.0}, [0.0, -3.0, 0.0, 0.0, 0.0, -1.0]),
    ],
)
def test_length_penalties(settings: dict[str, Any], expected: list[float]) -> None:
    result = pipeline({"length_penalty": settings, "energy_penalty": {"eta": 0}})(
        make_inputs()
    )  # lengths 5, 11, 1, 3, 5, 7
    assert result.ledger.contributions["reward/length_penalty"].tolist() == pytest.approx(expected)


def test_the_authors_length_penalty_scales_with_the_running_std_of_the_reward() -> None:
    penalty = {"kind": "authors", "length": 5, "coefficient": 0.7}
    run = pipeline({"length_penalty": penalty, "energy_penalty": {"eta": 0}})
    rewards = []
    for seed in range(3):
        inputs = make_inputs(seed)
        rewards.append((inputs.scores[:, 0].double() - 2) / 3)
        expected = 0.7 * (1 - (LENGTHS - PROMPTS).double() / 5) * torch.cat(rewards).std(correction=0)
        torch.testing.assert_close(run(inputs).ledger.contributions["reward/length_penalty"], expected)


def test_kl_in_the_loss_leaves_rewards_alone_and_hands_out_the_coefficient() -> None:
    loss = {"coefficient": 0.1, "estimator": "k3", "placement": "loss"}
    in_loss = pipeline({"kl": loss})(make_inputs())
    without = pipeline({})(make_inputs())
    assert torch.equal(in_loss.token_rewards, without.token_rewards)
    losses = [loss, {"coefficient": 0.1}, {}]
    assert [pipeline({"kl": kl}).kl.loss_coefficient for kl in losses] == [0.1, 0.0, 0.0]
    in_reward = pipeline({"kl": {"coefficient": 0.1}})(make_inputs())
    assert not torch.equal(in_reward.token_rewards, without.token_rewards)
    with pytest.raises(ValueError, match=r"ref_logprobs: needed for shaping\.kl"):
        pipeline({"kl": loss})(make_inputs(ref_logprobs=None))


def test_the_adaptive_coefficient_acts_from_the_next_step() -> None:
    run = pipeline({"kl": {"coefficient": 0.1, "controller": "adaptive", "target": 1e-3, "horizon": 60}})
    inputs = make_inputs(ref_logprobs=torch.full((B, S - 1), -9.0))
    first = run(inputs).ledger.means()
    run.kl.end_step(first["kl/policy_reference"], B)
    second = run(inputs).ledger.means()
    assert first["reward/kl"] == pytest.approx(-0.1 * first["kl/policy_reference"])
    assert second["reward/kl"] == pytest.approx(1.02 * first["reward/kl"])  # 1 + 0.2 * 6 / 60


@pytest.mark.parametrize(("kl", "error"), [(6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2)])
def test_the_adaptive_coefficient_moves_by_a_clipped_relative_error(kl: float, error: float) -> None:
    adaptive = {"coefficient": 0.2, "controller": "adaptive", "target": 6.0, "horizon": 1000}
    penalty, fixed = (pipeline({"kl": settings}).kl for settings in (adaptive, {"coefficient": 0.2}))
    for each in (penalty, fixed):
        each.end_step(kl, responses=50)
    assert penalty.coefficient == pytest.approx(0.2 * (1 + error * 50 / 1000))
    assert fixed.coefficient == 0.2


def test_a_resumed_pipeline_continues_as_if_never_stopped() -> None:
    steady, stopped, resumed = (pipeline(EVERYTHING) for _ in range(3))
    for seed in range(2):
        steady(make_inputs(seed, models=3))
        stopped(make_inputs(seed, models=3))
    resumed.load_state_dict(stopped.state_dict())
    expected, result = steady(make_inputs(2, models=3)), resumed(make_inputs(2, models=3))
    assert torch.equal(expected.token_rewards, result.token_rewards)
    assert not torch.equal(expected.token_rewards, pipeline(EVERYTHING)(make_inputs(2, models=3)).token_rewards)


def test_a_coefficient_that_was_set_after_a_checkpoint_is_taken_back_with_it() -> None:
    run = pipeline({"kl": {"coefficient": 0.1}})
    state = run.state_dict()
    run.kl.set_coefficient(0.2)
    run.load_state_dict(state)
    assert run.kl.coefficient == 0.1
    assert run.state_dict() == state


def test_what_is_new_in_a_resumed_pipeline_starts_now() -> None:
    before = pipeline({"kl": {"coefficient": 0.1}})
    before(make_inputs())
    new = {
        "kl": {"coefficient": 0.2, "controller": "adaptive", "target": 1.0, "horizon": 60},
        "terms": [{"name": "bonus", "term": "own_terms:Bonus", "settings": {"bonus": 0.5}}],
    }
    resumed, fresh = pipeline(new), pipeline(new)
    resumed.load_state_dict(before.state_dict())
    assert torch.equal(resumed(make_inputs(1)).token_rewards, fresh(make_inputs(1)).token_rewards)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.ones(B)}, "scores: shape"),
        ({"samples": []}, "samples: 0; expected 6"),
        ({"tokens": torch.ones(B, S + 1)}, "tokens: shape"),
        ({"ref_energies": torch.ones(B, 2)}, "ref_energies: shape"),
        ({"logprobs": torch.ones(B, S)}, "logprobs: shape"),
        ({"step": 5}, "step: 5; expected 1 to max_steps = 4"),
        ({"scores": torch.ones(B, 2), "columns": [Column(name="a"), Column(name="b")]}, "2 reward models"),
    ],
)
def test_bad_inputs_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline({})(make_inputs(**changes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": {"kind": "linear"}}, "needs length"),
        ({"length_penalty": {"length": 4}}, "length 4 without a kind"),
        ({"length_penalty": {"kind": "linear", "length": 4, "buffer": 2}}, "only 'soft_overlong' has a buffer"),
        ({"length_penalty": {"kind": "soft_overlong", "length": 4, "buffer": 5}}, "buffer of at most length"),
        ({"kl": {"controller": "adaptive", "target": 1.0, "horizon": 5}}, "coefficient above 0"),
        ({"energy_penalty": {"etta": 1.0}}, "did you mean 'eta'"),
        ({"clip": {"range": -1}}, "clip.range = -1"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline(settings)
