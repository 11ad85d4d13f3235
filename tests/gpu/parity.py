"""Our model and transformers' on the device, with the same weights: log-probs, entropies, energies, gradients.

The judge is transformers in fp32 on the CPU, and the peer transformers in the same precision on the device. Weights are
numbers of bf16, so that both precisions have the same. Our rows are padded to each other's length, and once packed.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from checks import PRECISIONS, TINY, agreement
from features import GEMMA2
from networks import mean_nll, rows_of
from pairs import Options, Row
from tiny import random_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_eppo.megatron import device
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.specs import has_transformer_engine
from nemo_eppo.megatron.weights import export_tensors, load_tensors
from nemo_eppo.models.hf_config import hf_config
from nemo_eppo.models.numerics import DTYPES
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, Precision
from nemo_eppo.settings.training import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=1e-6, clip_grad=0.0)


class Outputs(NamedTuple):
    """All in the order of the batch's tokens, those without a target left out; `gradients` of the mean over them."""

    logprobs: Tensor
    entropies: Tensor
    energies: Tensor
    gradients: Tensor


def families(smallest: bool) -> dict[str, ModelConfig]:
    llama = TINY if smallest else TINY.model_copy(update={"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1024})
    llama = llama.model_copy(update={"vocab_size": 1009})
    own: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen3": {"qk_norm": True, "head_dim": 24}}
    if not has_transformer_engine():  # its attention cannot cap logits
        own["Gemma2"] = GEMMA2 | {"global_layers": (1,), "head_dim": 24}
    return {name: llama.model_copy(update=changes) for name, changes in own.items()}


def measure(options: Options) -> Iterator[Row]:
    initialize(ParallelConfig(), seed=1)
    for family, model in families(options.smallest).items():
        draw = random_weights(model, outputs=0, scale=0.85 * model.hidden_size**-0.5)
        weights = {name: tensor.bfloat16().float() for name, tensor in draw.items()}
        lengths = torch.tensor([5, 12, 3, 12] if options.smallest else [17, 128, 64, 90, 33, 128, 2, 71])
        rows = rows_of(lengths, model.vocab_size)
        judge = theirs(family, model, weights, rows, "fp32", torch.device("cpu"))
        for precision in PRECISIONS:
            peer = theirs(family, model, weights, rows, precision, device.device())
            for packed in (False, True):
                found = ours(model, weights, rows, precision, packed)
                for name, value, of_peer, expected in zip(Outputs._fields, found, peer, judge, strict=True):
                    row: Row = {"what": name, "family": family, "rows": "packed" if packed else "padded"}
                    yield agreement(row, precision, value, of_peer, expected)


def theirs(
    family: str, model: ModelConfig, weights: dict[str, Tensor], rows: Rows, precision: Precision, place: torch.device
) -> Outputs:
    """One row at a time, without padding."""
    config = AutoConfig.for_model(**hf_config(model, f"{family}ForCausalLM"), pad_token_id=None)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    network.load_state_dict(weights, strict=False)
    network.tie_weights()
    angles = {name: buffer.to(place) for name, buffer in network.named_buffers() if name.endswith("inv_freq")}
    network.to(place, DTYPES[precision])
    for name, buffer in network.named_buffers():  # which transformers keeps in fp32 whatever it loads a model in
        buffer.data = angles.get(name, buffer)
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # hidden_states would not do: its last is behind the final norm
        left = output[0] if isinstance(output, tuple) else output
        seen.append((args[0] if args else kwargs["hidden_states"], left))

    network.model.layers[-1].register_forward_hook(hook, with_kwargs=True)
    parts: list[list[Tensor]] = [[], [], []]
    for row, length in zip(rows["tokens"].to(place), rows["lengths"].tolist(), strict=True):
        logits = network(row[None, :length]).logits[0, :-1].float()
        logp = logits.log_softmax(-1)
        entered, left = (x.flatten(0, -2)[:-1].float().abs().mean(-1) for x in seen.pop())
        parts[0].append(logp.gather(-1, row[1:length, None])[:, 0])
        parts[1].append(-(logp.exp() * logp).sum(-1))
        parts[2].append(entered - left)
    logprobs, entropies, energies = (torch.cat(part) for part in parts)
    (-logprobs.mean()).backward()
    gradients = in_order({name: parameter.grad for name, parameter in network.named_parameters()})
    return Outputs(logprobs.detach(), entropies.detach(), energies.detach(), gradients)


def ours(model: ModelConfig, weights: dict[str, Tensor], rows: Rows, precision: Precision, packed: bool) -> Outputs:
    built: list[Any] = build_model(model, ParallelConfig(), head="lm", precision=precision)
    load_tensors(built, model, weights.__getitem__)
    chunks = wrap_data_parallel(built, OPTIMIZER, precision)
    optimizer, scheduler = build_optimizer(chunks, OPTIMIZER, precision, total_steps=10)
    runner = ModelRunner(
        chunks,
        len(rows["tokens"]),  # all in one micro-batch, as `mean_nll` wants it
        micro_batch_tokens=int(rows["lengths"].sum()) if packed else None,
        optimizer=optimizer,
        scheduler=scheduler,
        probe=EnergyProbe(EnergyProbeConfig(), chunks, model.num_layers),
    )
    read, energies = runner.infer(*rows.values(), outputs=2, energies=True)
    assert energies is not None
    wanted: Callable[[Tensor], Tensor] = lambda x: x[rows["targets"] != IGNORE]  # noqa: E731
    runner.train_step(rows, mean_nll)
    for parameter in built[0].parameters():
        parameter.data = parameter.main_grad
    gradients = in_order(dict(export_tensors(built, model)))
    return Outputs(wanted(read[..., 0]), wanted(read[..., 1]), wanted(energies[..., 0]), gradients)


def in_order(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([named[name].float().flatten().cpu() for name in sorted(named)])
