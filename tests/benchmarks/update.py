"""Seconds of an update and of a log-prob pass, ours and in a plain loop over a transformers model of the same shape.

`update`: forward, mean negative log-prob, backward, global gradient norm and clipping, AdamW. `log-probs`: no gradient;
ours gives entropies in the same pass, so transformers is measured without and with them.
"""

from functools import partial

import torch
from networks import OPTIMIZER, even_rows, mean_nll, our_runner, shape, their_model
from pairs import Contestant, Options, Row, compare, interleave
from torch import Tensor
from transformers import LlamaForCausalLM

from nemo_eppo.megatron import device
from nemo_eppo.megatron.runner import Rows

UPDATES = {"quickstart": (64, 64, 64, 36), "4 x 256": (256, 1024, 64, 96)}  # width, vocabulary, rows, tokens of a row
PASSES = ((64, 96), (8, 512), (1, 4096))  # rows, tokens of a row


def measure(options: Options) -> list[Row]:
    found: list[Row] = []
    for case, (width, vocabulary, batch, length) in UPDATES.items():
        model = shape(width=width, vocabulary=vocabulary)
        if options.smallest:
            batch, length = 2, 8
        rows = even_rows(batch, length, vocabulary)
        contestants: dict[str, Contestant] = {
            "transformers": their_update(their_model(model), rows),
            "ours": partial(our_runner(model, batch, trained=True).train_step, rows, mean_nll),
        }
        seconds = interleave(contestants, options.rounds)
        found += compare(seconds, "transformers", case=f"update, {case}", batch=batch, length=length)
    for batch, length in ((2, 8),) if options.smallest else PASSES:
        model = shape(window=4096)
        rows, network = even_rows(batch, length, model.vocab_size), their_model(model).eval()
        contestants = {
            "transformers": partial(their_pass, network, rows["tokens"], False),
            "transformers with entropies": partial(their_pass, network, rows["tokens"], True),
            "ours": partial(our_runner(model).infer, *rows.values(), outputs=2),
        }
        seconds = interleave(contestants, options.rounds)
        found += compare(seconds, "transformers", case="log-probs", batch=batch, length=length)
    return found


def their_update(network: LlamaForCausalLM, rows: Rows) -> Contestant:
    tokens = rows["tokens"].to(device.device())
    optimizer = torch.optim.AdamW(network.parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, weight_decay=0.0)

    def update() -> None:
        loss = -response_logprobs(network(tokens).logits, tokens).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return update


@torch.no_grad()
def their_pass(network: LlamaForCausalLM, tokens: Tensor, entropies: bool) -> None:
    tokens = tokens.to(device.device())
    logits = network(tokens).logits
    response_logprobs(logits, tokens)
    if entropies:
        torch.distributions.Categorical(logits=logits).entropy()


def response_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, S, V], [B, S] -> [B, S - 1]."""
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
