"""The single-process reference itself: against transformers, and against the product's own formulas."""

import os

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from reference_eppo import ReferenceConfig, State, body, logits, ppo_step, random_weights, scalars

from nemo_eppo.algorithms import advantages, masking, policy
from nemo_eppo.config import load_config
from nemo_eppo.rewards.inputs import Column, RewardInputs
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.settings.shaping import ShapingConfig

CONFIG = ReferenceConfig(
    temperature=0.7,
    score_mean=0.1,
    score_std=0.5,
    missing_eos=0.5,
    eta=1.5,
    reward_clip=1.0,
    kl_coefficient=0.05,
    gamma=0.99,
    actor_lr=3e-3,
    critic_lr=3e-3,
)
PROMPTS, LENGTHS = torch.tensor([3, 1, 5, 2]), torch.tensor([9, 12, 6, 11])
TRUNCATED = torch.tensor([False, True, False, False])
TOKENS = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def make_state() -> State:
    policy_weights = random_weights(CONFIG, 1)
    noise = torch.Generator().manual_seed(9)
    reference = {
        name: x + 0.02 * torch.randn(x.shape, dtype=x.dtype, generator=noise) for name, x in policy_weights.items()
    }
    return State(
        CONFIG, policy_weights, reference, random_weights(CONFIG, 3, "score"), random_weights(CONFIG, 4, "score")
    )


@pytest.mark.parametrize("preset", ["paper", "down_proj"])
def test_logits_and_energies_are_those_of_transformers(preset: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ReferenceConfig(energy=preset)  # type: ignore[arg-type]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    ).double()
    weights = random_weights(config, 1)
    model.load_state_dict(weights, strict=True)
    seen: dict[str, torch.Tensor] = {}

    def watch(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["in"], seen["out"] = args[0], output[0] if isinstance(output, tuple) else output

    last = model.model.layers[-1]
    (last if preset == "paper" else last.mlp.down_proj).register_forward_hook(watch)
    with torch.no_grad():
        expected = model(TOKENS).logits
    # transformers computes the angles of the rotary embedding in fp32
    torch.testing.assert_close(logits(weights, TOKENS, config), expected, rtol=1e-5, atol=1e-6)
    energy = seen["in"].abs().mean(-1) - seen["out"].abs().mean(-1)
    torch.testing.assert_close(body(weights, TOKENS, config)[1], energy, rtol=1e-5, atol=1e-6)


def test_a_step_shapes_and_trains_with_the_formulas_of_the_product() -> None:
    state = make_state()
    result = ppo_step(state, TOKENS, PROMPTS, LENGTHS, TRUNCATED, [[0, 1, 2, 3]])
    mask = masking.response_mask(PROMPTS, LENGTHS, 12)
    assert torch.equal(mask, result["mask"])

    settings = {
        "missing_eos": {"penalty": CONFIG.missing_eos},
        "energy_penalty": {"eta": CONFIG.eta},
        "clip": {"range": CONFIG.reward_clip},
        "kl": {"coefficient": CONFIG.kl_coefficient},
    }
    shaped = RewardPipeline(load_config(ShapingConfig, settings))(
        RewardInputs(
            scores=result["scores"][:, None],
            columns=[Column(name="model", mean=CONFIG.score_mean, std=CONFIG.score_std)],
            samples=[Sample(prompt="", response="", token_ids=(1,), finished=True)] * len(TOKENS),
            tokens=TOKENS,
            prompt_lengths=PROMPTS,
            mask=mask,
            truncated=TRUNCATED,
            energies=result["energies"][:, None],
            ref_energies=result["ref_energies"][:, None],
            logprobs=result["logprobs"],
            ref_logprobs=result["ref_logprobs"],
            step=1,
            max_steps=1,
        )
    )
    torch.testing.assert_close(shaped.token_rewards.double(), result["rewards"], rtol=1e-6, atol=1e-6)
    at_work = {name for name, x in shaped.ledger.contributions.items() if x.abs().max() > 0}
    assert at_work == {f"reward/{name}" for name in ("proxy", "missing_eos", "energy_penalty", "clip", "kl")}

    estimator = advantages.GAE(CONFIG.gamma, CONFIG.lam)
    white, returns = estimator(result["rewards"], result["values"], mask, torch.arange(len(TOKENS)), TRUNCATED)
    torch.testing.assert_close(white, result["advantages"])
    torch.testing.assert_close(returns, result["returns"])

    tokens = int(mask.sum())
    loss, _ = policy.policy_loss(
        result["logprobs"], result["logprobs"], white, mask, clip_low=0.2, clip_high=0.2, denominator=tokens
    )
    assert result["actor_loss"] == [pytest.approx(float(loss))]
    critic_loss, _ = policy.value_loss(result["values"], result["values"], returns, mask, 0.2, tokens)
    assert result["critic_loss"] == [pytest.approx(float(critic_loss))]


def test_a_step_improves_what_it_optimises_and_leaves_frozen_models_alone() -> None:
    state = make_state()
    frozen = {name: x.clone() for name, x in state.reference.items()}
    result = ppo_step(state, TOKENS, PROMPTS, LENGTHS, TRUNCATED, [[0, 1], [2, 3], [3, 0], [1, 2]])
    assert all(torch.equal(x, frozen[name]) for name, x in state.reference.items())
    with torch.no_grad():
        distribution = (logits(state.policy, TOKENS, CONFIG)[:, :-1] / CONFIG.temperature).log_softmax(-1)
        after = distribution.gather(2, TOKENS[:, 1:, None])[..., 0]
        values = scalars(state.critic, TOKENS, CONFIG)[:, :-1]
    mask, advantage, returns = result["mask"], result["advantages"], result["returns"]
    assert ((after - result["logprobs"]) * advantage)[mask].mean() > 0
    assert (values - returns)[mask].square().mean() < (result["values"] - returns)[mask].square().mean()
    assert all(len(result[name]) == 4 for name in ("actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm"))


def test_results_do_not_depend_on_padding() -> None:
    padded = torch.nn.functional.pad(TOKENS, (0, 5), value=7)
    narrow, wide = (
        ppo_step(make_state(), tokens, PROMPTS, LENGTHS, TRUNCATED, [[0, 1], [2, 3]]) for tokens in (TOKENS, padded)
    )
    for name in ("logprobs", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(wide[name][:, :11], narrow[name])
    for name in ("energies", "scores"):
        torch.testing.assert_close(wide[name], narrow[name])
    for name in ("actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm"):
        assert wide[name] == pytest.approx(narrow[name])
