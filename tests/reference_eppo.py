"""EPPO in one file: single process, plain torch, fp64. The distributed product must match it step for step.

It shares nothing with the product but the conventions: `tokens [B, S]` is prompt, response, right padding; action `t`
of T = S - 1 predicts token `t + 1`; per-token results are [B, T] and zero outside the response. Models are Llama
decoders with untied embeddings, held as plain dictionaries of tensors under Hugging Face names. The critic and the
reward model have `score.weight` [1, H] and `score.bias` [1] in place of `lm_head.weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """Everything that determines a step."""

    # model
    vocab_size: int = 64
    hidden_size: int = 32
    intermediate_size: int = 48
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    initial_std: float = 0.1
    # log-probs and energy
    temperature: float = 1.0
    energy: Literal["paper", "down_proj"] = "paper"
    # reward: standardise, missing EOS, energy penalty (same response), clip, k1 penalty
    score_mean: float = 0.0
    score_std: float = 1.0
    missing_eos: float = 0.0
    eta: float = 2.0
    reward_clip: float = 5.0
    kl_coefficient: float = 0.0
    # advantages and losses
    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float = 0.2
    # AdamW; decay only for parameters of more than one dimension
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float = 1.0


# ---------------------------------------------------------------------------------------------------------- models


def random_weights(config: ReferenceConfig, seed: int, head: Literal["lm_head", "score"] = "lm_head") -> Weights:
    """Fresh fp64 weights; the same seed gives the same body under either head."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, head_size = config.hidden_size, config.intermediate_size, config.hidden_size // config.num_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.num_layers):
        shapes |= {
            f"model.layers.{i}.input_layernorm.weight": (hidden,),
            f"model.layers.{i}.self_attn.q_proj.weight": (config.num_heads * head_size, hidden),
            f"model.layers.{i}.self_attn.k_proj.weight": (config.num_kv_heads * head_size, hidden),
            f"model.layers.{i}.self_attn.v_proj.weight": (config.num_kv_heads * head_size, hidden),
            f"model.layers.{i}.self_attn.o_proj.weight": (hidden, config.num_heads * head_size),
            f"model.layers.{i}.post_attention_layernorm.weight": (hidden,),
            f"model.layers.{i}.mlp.gate_proj.weight": (inner, hidden),
            f"model.layers.{i}.mlp.up_proj.weight": (inner, hidden),
            f"model.layers.{i}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if head == "lm_head":
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    else:
        shapes |= {"score.weight": (1, hidden), "score.bias": (1,)}
    weights = {}
    for name, shape in shapes.items():
        noise = config.initial_std * torch.randn(shape, dtype=torch.float64, generator=generator)
        weights[name] = 1 + noise if "norm" in name else noise
    return weights


def load_weights(arrays: Mapping[str, Any], trainable: bool) -> Weights:
    """Copy numpy arrays or tensors to fp64 leaves."""
    weights = {name: torch.as_tensor(x).detach().double().clone() for name, x in arrays.items()}
    return {name: x.requires_grad_(trainable) for name, x in weights.items()}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of [B, heads, S, D]: the first half of D pairs with the second."""
    positions, size = torch.arange(x.shape[2], dtype=x.dtype), x.shape[3]
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=x.dtype) / size)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def attention(x: Tensor, weights: Weights, prefix: str, config: ReferenceConfig) -> Tensor:
    batch, length, hidden = x.shape

    def project(name: str, heads: int) -> Tensor:
        return (x @ weights[f"{prefix}.{name}.weight"].T).view(batch, length, heads, -1).transpose(1, 2)

    query = rotate(project("q_proj", config.num_heads), config.rope_theta)
    key = rotate(project("k_proj", config.num_kv_heads), config.rope_theta)
    value = project("v_proj", config.num_kv_heads)
    group = config.num_heads // config.num_kv_heads
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value
    return mixed.transpose(1, 2).reshape(batch, length, hidden) @ weights[f"{prefix}.o_proj.weight"].T


def body(weights: Weights, tokens: Tensor, config: ReferenceConfig) -> tuple[Tensor, Tensor]:
    """Final normed hidden states [B, S, H], and the last layer's energy loss at every position [B, S]."""
    x = weights["model.embed_tokens.weight"][tokens]
    layer_in = down_in = down_out = x
    for i in range(config.num_layers):
        prefix, layer_in = f"model.layers.{i}", x
        normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.norm_eps)
        x = x + attention(normed, weights, f"{prefix}.self_attn", config)
        normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.norm_eps)
        gate, up = (normed @ weights[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        down_in = F.silu(gate) * up
        down_out = down_in @ weights[f"{prefix}.mlp.down_proj.weight"].T
        x = x + down_out
    energy_in, energy_out = (layer_in, x) if config.energy == "paper" else (down_in, down_out)
    energy = energy_in.abs().mean(dim=-1) - energy_out.abs().mean(dim=-1)
    return rms_norm(x, weights["model.norm.weight"], config.norm_eps), energy


def logits(weights: Weights, tokens: Tensor, config: ReferenceConfig) -> Tensor:
    """[B, S, V], temperature not applied."""
    return body(weights, tokens, config)[0] @ weights["lm_head.weight"].T


def scalars(weights: Weights, tokens: Tensor, config: ReferenceConfig) -> Tensor:
    """The critic's or reward model's output at every position: [B, S]."""
    return (body(weights, tokens, config)[0] @ weights["score.weight"].T)[..., 0] + weights["score.bias"]


# ------------------------------------------------------------------------------------------------------------ a step


@dataclass
class State:
    """Four models and two optimizers."""

    config: ReferenceConfig
    policy: Weights
    reference: Weights
    critic: Weights
    reward_model: Weights
    actor_optimizer: torch.optim.Optimizer = field(init=False)
    critic_optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.policy, self.critic = load_weights(self.policy, True), load_weights(self.critic, True)
        self.reference, self.reward_model = load_weights(self.reference, False), load_weights(self.reward_model, False)
        self.actor_optimizer = adamw(self.policy, self.config.actor_lr, self.config)
        self.critic_optimizer = adamw(self.critic, self.config.critic_lr, self.config)


def adamw(weights: Weights, lr: float, config: ReferenceConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": [x for x in weights.values() if x.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [x for x in weights.values() if x.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.adam_eps)


def policy_pass(weights: Weights, tokens: Tensor, config: ReferenceConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the tokens [B, T], entropies [B, T], and energies at the predicted tokens [B, T]."""
    hidden, energy = body(weights, tokens, config)
    log_distribution = (hidden[:, :-1] @ weights["lm_head.weight"].T / config.temperature).log_softmax(dim=-1)
    logprobs = log_distribution.gather(2, tokens[:, 1:, None])[..., 0]
    entropy = -(log_distribution.exp() * log_distribution).sum(dim=-1)
    return logprobs, entropy, energy[:, 1:]


def shape_rewards(
    scores: Tensor,
    energies: Tensor,
    ref_energies: Tensor,
    truncated: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    config: ReferenceConfig,
) -> Tensor:
    """Per-token rewards [B, T] from raw scores [B] and mean energies [B]."""
    reward = (scores - config.score_mean) / config.score_std
    reward = reward - config.missing_eos * truncated
    reward = reward - config.eta * (ref_energies - energies).abs()
    reward = reward.clamp(-config.reward_clip, config.reward_clip)
    token_rewards = -config.kl_coefficient * (logprobs - ref_logprobs) * mask
    for b in range(len(mask)):
        token_rewards[b, int(mask[b].nonzero().max())] += reward[b]
    return token_rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, config: ReferenceConfig) -> tuple[Tensor, Tensor]:
    advantages = torch.zeros_like(rewards)
    for b in range(len(mask)):
        next_value, advantage = 0.0, 0.0
        for t in reversed(mask[b].nonzero()[:, 0].tolist()):
            delta = float(rewards[b, t]) + config.gamma * next_value - float(values[b, t])
            advantage = delta + config.gamma * config.lam * advantage
            advantages[b, t], next_value = advantage, float(values[b, t])
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance over the response tokens of the whole batch."""
    chosen = x[mask]
    return (x - chosen.mean()) / (chosen.var(correction=0) + 1e-8).sqrt() * mask


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: ReferenceConfig) -> Tensor:
    ratio = (logprobs - old)[mask].exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    return torch.maximum(-advantages[mask] * ratio, -advantages[mask] * clipped).mean()


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, config: ReferenceConfig) -> Tensor:
    values, old, returns = values[mask], old[mask], returns[mask]
    clipped = old + (values - old).clamp(-config.value_clip, config.value_clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()


def update(weights: Weights, optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float) -> float:
    """One optimizer step; returns the norm of the gradient before clipping."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), grad_clip)
    optimizer.step()
    return float(norm)


def ppo_step(
    state: State,
    tokens: Tensor,
    prompt_lengths: Tensor,
    lengths: Tensor,
    truncated: Tensor,
    mini_batches: list[list[int]],
) -> dict[str, Any]:
    """Score a rollout, then train policy and critic on it, in place.

    Args:
        state: models and optimizers.
        tokens: int64 [B, S].
        prompt_lengths: [B].
        lengths: [B].
        truncated: bool [B].
        mini_batches: samples of each optimizer step, in order, all epochs one after another.

    Returns:
        [B, T]: mask, logprobs, entropy, ref_logprobs, values, rewards, advantages (whitened if configured), returns;
        [B]: energies, ref_energies, scores; one number per mini-batch: actor_loss, critic_loss, actor_grad_norm,
        critic_grad_norm.
    """
    config = state.config
    predicted = torch.arange(1, tokens.shape[1])
    mask = (predicted >= prompt_lengths[:, None]) & (predicted < lengths[:, None])

    with torch.no_grad():
        logprobs, entropy, energy = policy_pass(state.policy, tokens, config)
        ref_logprobs, _, ref_energy = policy_pass(state.reference, tokens, config)
        values = scalars(state.critic, tokens, config)[:, :-1] * mask
        scores = scalars(state.reward_model, tokens, config)[torch.arange(len(tokens)), lengths - 1]
        logprobs, entropy, ref_logprobs = logprobs * mask, entropy * mask, ref_logprobs * mask
        energies, ref_energies = ((x * mask).sum(dim=1) / mask.sum(dim=1) for x in (energy, ref_energy))
        rewards = shape_rewards(scores, energies, ref_energies, truncated, logprobs, ref_logprobs, mask, config)
        advantages, returns = gae(rewards, values, mask, config)
        if config.whiten:
            advantages = whiten(advantages, mask)

    curves: dict[str, list[float]] = {
        name: [] for name in ("actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm")
    }
    for chosen in mini_batches:
        new_logprobs, _, _ = policy_pass(state.policy, tokens[chosen], config)
        loss = policy_loss(new_logprobs, logprobs[chosen], advantages[chosen], mask[chosen], config)
        curves["actor_loss"].append(float(loss))
        curves["actor_grad_norm"].append(update(state.policy, state.actor_optimizer, loss, config.grad_clip))

        new_values = scalars(state.critic, tokens[chosen], config)[:, :-1]
        loss = value_loss(new_values, values[chosen], returns[chosen], mask[chosen], config)
        curves["critic_loss"].append(float(loss))
        curves["critic_grad_norm"].append(update(state.critic, state.critic_optimizer, loss, config.grad_clip))

    return {
        "mask": mask,
        "logprobs": logprobs,
        "entropy": entropy,
        "ref_logprobs": ref_logprobs,
        "values": values,
        "energies": energies,
        "ref_energies": ref_energies,
        "scores": scores,
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        **curves,
    }
