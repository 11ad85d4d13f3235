"""LoRA in plain torch: W + alpha / rank B A as whole fp64 matrices, in one process."""

from typing import Any

import torch
from reference_eppo import ReferenceConfig, logits, scalars
from tiny import MODEL, random_weights
from torch import Tensor

from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.settings.model import LoRAConfig
from nemo_eppo.settings.training import OptimizerConfig

LORA = LoRAConfig(rank=3, alpha=4.5)
SCALE = 4.5 / 3
OPTIMIZER = OptimizerConfig(lr=1.0, betas=(0.9, 0.99), eps=1.0, weight_decay=0.1, clip_grad=1.0)
UPDATES = 3
HIDDEN, FFN, LAYERS = 32, 48, 4
WIDTHS = {  # in, out of each linear
    "linear_qkv": (HIDDEN, 2 * HIDDEN),
    "linear_proj": (HIDDEN, HIDDEN),
    "linear_fc1": (HIDDEN, 2 * FFN),
    "linear_fc2": (FFN, HIDDEN),
}
PLAIN = ReferenceConfig(
    vocab_size=101, hidden_size=HIDDEN, intermediate_size=FFN, num_layers=LAYERS, num_heads=4, num_kv_heads=2
)
Adapters = dict[tuple[int, str], Tensor]


def split_delta(target: str, delta: Tensor, layer: int) -> dict[str, Tensor]:
    """B A of a Megatron linear -> what it adds to Hugging Face weights."""
    attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
    if target == "linear_proj":
        return {f"{attention}.o_proj.weight": delta}
    if target == "linear_fc2":
        return {f"{mlp}.down_proj.weight": delta}
    if target == "linear_fc1":
        return {f"{mlp}.gate_proj.weight": delta[:FFN], f"{mlp}.up_proj.weight": delta[FFN:]}
    groups = delta.view(2, 4, 8, HIDDEN)  # of each key/value group: two query heads, its key, its value
    return {
        f"{attention}.q_proj.weight": groups[:, :2].reshape(HIDDEN, HIDDEN),
        f"{attention}.k_proj.weight": groups[:, 2].reshape(HIDDEN // 2, HIDDEN),
        f"{attention}.v_proj.weight": groups[:, 3].reshape(HIDDEN // 2, HIDDEN),
    }


def plain_lora(a: Adapters, rows: Rows, head: str, tied: bool) -> dict[str, Any]:
    """The same updates in one process and fp64, from the same A and B = 0."""
    model = MODEL.model_copy(update={"tie_embeddings": tied})
    base = {name: weight.double() for name, weight in random_weights(model).items()}
    if tied:
        base["lm_head.weight"] = base["model.embed_tokens.weight"]
    a = {key: value.double().requires_grad_() for key, value in a.items()}
    b = {(i, target): torch.zeros(WIDTHS[target][1], 3).double().requires_grad_() for i, target in a}
    heads = [base[name].requires_grad_() for name in ("score.weight", "score.bias") if head == "scalar"]
    matrices = [*a.values(), *b.values(), *heads[:1]]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": heads[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    norms = []

    def weights() -> dict[str, Tensor]:
        whole = dict(base)
        for (i, target), down in a.items():
            for name, delta in split_delta(target, SCALE * b[i, target] @ down, i).items():
                whole[name] = whole[name] + delta
        return whole

    def outputs() -> Tensor:
        if head == "scalar":
            return scalars(weights(), rows["tokens"], PLAIN)
        logprobs = logits(weights(), rows["tokens"], PLAIN).log_softmax(-1)
        chosen = logprobs.gather(-1, rows["targets"].clamp(min=0)[..., None])[..., 0]
        return torch.where(rows["targets"] == IGNORE, 0, chosen)

    for _ in range(UPDATES):
        optimizer.zero_grad()
        (outputs() * rows["coefficients"]).sum().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(matrices + heads[1:], OPTIMIZER.clip_grad)))
        optimizer.step()
    merged = {name: weight.detach() for name, weight in weights().items() if name in exported_names(head, tied)}
    return {"a": a, "b": b, "after": outputs().detach(), "norms": torch.tensor(norms), "merged": merged}


def exported_names(head: str, tied: bool) -> set[str]:
    absent = {"lm_head.weight"} if tied or head == "scalar" else set()
    absent |= set() if head == "scalar" else {"score.weight", "score.bias"}
    return set(random_weights(MODEL)) - absent
