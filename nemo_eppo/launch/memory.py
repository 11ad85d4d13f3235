"""Estimates how much memory a rank of a job will need, before the job is started.

At its peak a rank of pipeline stage s (of pp, from 0) holds, in bytes,

    weights     P * b                          P parameters of its stage, b bytes each (4 in fp32, 2 in bf16)
    gradients   T * 4                          T parameters are trained: all, or LoRA's adapters
    optimizer   T * (8, in bf16 12) / D        Adam's two moments and bf16's main copy; D replicas share them if the
                                               optimizer is distributed, else D is 1
    reference   P * b                          the actor's frozen copy, in the host's memory; none with LoRA
    work        the largest of update, forward and generation, which never run at once

with, for n tokens in a micro-batch, L layers of the stage, hidden size H, query width Q, key or value width K, MLP
width F, A heads and vocabulary V, all but H divided by tp, and H too under sequence parallelism (and 12 H instead of
6 H where attention and MLP also have norms after them):

    update      n * b * (pp - s) * L * (6 H + 3 Q + 3 K + 5 F)   tensors kept for the backward pass by each layer, for
                                               each micro-batch in flight: each norm's input, its normed and its scaled
                                               output; query, key, value and attention's output; gate and up, the
                                               activation and the product. (The method is that of Korthikanti et al.,
                                               arXiv 2205.05198, section 4, applied to these modules.)
                + n * S * A * 8 * (pp - s) * L attention with capped logits: their tanh and softmax in fp32
                + 8 * W                        temporary fp32 gradients of the largest weight, W
                + 12 * c on the last stage     c logits at once, of n or at most max(1024, 2^24 / V) tokens, and the
                                               tensors computed from them
                recompute: each layer keeps H only; add the above for one layer, or the logits if they are larger
    forward     n * b * (2 H + Q + 2 K + 3 F) + 12 * c, or n * S * A * 12 for capped logits if that is more
    generation  N * (S + 135) * 2 * K * b * (L + 1 / pp)   an upper bound: the cache of N sequences in pp batches, which
                                               grows with them, when all have S tokens at once, and a layer of a batch,
                                               which is there twice while it moves; 135 columns are an engine's 8 tokens
                                               beyond the end and, on GPUs, rounding up to 128

A job may run several models (`JobMemory`). Those of a server share its device, and one works at a time. Those in an
actor's processes (`colocated`) are on the device in their turns only; in between their weights and optimizer states lie
in the host's memory, and their gradients nowhere:

    device      states of what stays there + the largest of its work and of all turns (states + work)
    host        reference + weights and optimizer of each colocated model

where states are weights, gradients and optimizer. Each model counts by the stage that needs most of it.

On a CPU nothing moves, and the C library may hold half as much again, in small pieces that were freed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

from nemo_eppo.megatron.logprobs import rows_at_once
from nemo_eppo.models.hf_names import entries
from nemo_eppo.settings.model import LoRAConfig, ModelConfig, ParallelConfig, Precision

NUMBER_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Bytes of a weight or an activation."""
OPTIMIZER_BYTES: dict[Precision, int] = {"fp32": 8, "bf16": 12}
"""Bytes that the optimizer keeps of a parameter: Adam's two moments and, of bf16, the main copy."""
_SPARE_COLUMNS = 135  # of the cache, beyond the longest sequence


@dataclass(frozen=True)
class Workload:
    """The work that a job does with its model."""

    micro_batch_tokens: int
    """n, tokens of a micro-batch, padding included."""
    trained: bool = True
    """Whether the job makes updates."""
    reference: bool = False
    """Whether a frozen copy is kept, as the actor does."""
    sequences: int = 0
    """N, sequences that are being decoded; 0 for no generation."""
    longest: int = 0
    """S, tokens of the longest prompt and response together; 0 for the model's longest sequence."""


@dataclass(frozen=True)
class Memory:
    """Memory of one rank with one model in bytes, without that of the bare process (0.5 to 0.6 GB)."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    work: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class JobMemory:
    """Memory of one rank with all models of its job in bytes, without that of the bare process."""

    staying: Mapping[str, Memory]
    """Models that stay on the device, by the key of their settings; at least one."""
    colocated: Mapping[str, Memory]
    """Models that are on the device in their turns only, if that is a GPU."""

    @property
    def device(self) -> int:
        """Bytes of a GPU at the peak."""
        work = [memory.work for memory in self.staying.values()]
        turns = [memory.states + memory.work for memory in self.colocated.values()]
        return sum(memory.states for memory in self.staying.values()) + max(work + turns)

    @property
    def host(self) -> int:
        """Bytes that wait in the host's memory beside a GPU."""
        away = sum(memory.weights + memory.optimizer for memory in self.colocated.values())
        return sum(memory.reference for memory in self.staying.values()) + away

    @property
    def total(self) -> int:
        """Bytes at the peak where there is no GPU, so that nothing moves."""
        models = [*self.staying.values(), *self.colocated.values()]
        return sum(memory.states + memory.reference for memory in models) + max(memory.work for memory in models)


def estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    workload: Workload,
    *,
    outputs: int | None = None,
    replicas: int = 1,
    distributed_optimizer: bool = False,
    recompute: bool = False,
    lora: LoRAConfig | None = None,
) -> Memory:
    """Estimate the memory of a rank on the stage that needs most, by the formulas above.

    Args:
        outputs: numbers per token of a scalar head; None for a language model.
        replicas: D, data-parallel replicas.
    """
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    hidden = model.hidden_size // (tp if parallel.sequence_parallel else 1)
    query, kv = model.num_attention_heads * model.head_width // tp, model.kv_heads * model.head_width // tp
    ffn, vocabulary = model.ffn_hidden_size // tp, model.vocab_size // tp
    each, tokens, layers = NUMBER_BYTES[precision], workload.micro_batch_tokens, model.num_layers // stages
    columns, capped = workload.longest + _SPARE_COLUMNS, 0
    if model.attention_softcap is not None:
        row = min(tokens, workload.longest or model.max_sequence_length)
        capped = tokens * row * model.num_attention_heads // tp
    in_layer = tokens * each * ((12 if model.post_norms else 6) * hidden + 3 * query + 3 * kv + 5 * ffn) + 8 * capped

    def of_stage(stage: int) -> Memory:
        own = parameters(model, parallel, stage, outputs, lora)
        logits = 0
        if outputs is None and stage == stages - 1:
            logits = vocabulary * min(tokens, rows_at_once(vocabulary))
        work = max(tokens * each * (2 * hidden + query + 2 * kv + 3 * ffn) + 12 * logits, 12 * capped)
        if workload.trained:
            in_flight = (stages - stage) * layers
            if recompute:  # a layer is computed again after the logits are freed
                update = tokens * each * in_flight * hidden + max(in_layer, 12 * logits)
            else:
                update = in_flight * in_layer + 12 * logits
            work = max(work, update + 8 * own.largest)
        trained = own.trained if workload.trained else 0
        return Memory(
            weights=own.all * each,
            gradients=trained * 4,
            optimizer=trained * OPTIMIZER_BYTES[precision] // (replicas if distributed_optimizer else 1),
            reference=own.all * each if workload.reference and lora is None else 0,
            work=max(work, workload.sequences * columns * 2 * kv * each * (layers * stages + 1) // stages),
        )

    return max(map(of_stage, range(stages)), key=lambda memory: memory.total)


class Parameters(NamedTuple):
    """How many parameters a rank of a pipeline stage has."""

    all: int
    trained: int
    """All, or those of LoRA's adapters, which `all` leaves out."""
    largest: int
    """Those of the largest weight."""


def parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, outputs: int | None, lora: LoRAConfig | None
) -> Parameters:
    """Count the parameters of one rank of a stage; see `estimate`."""
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sizes = []
    for name, entry in entries(model, outputs).items():
        if name.startswith("decoder.layers."):
            own = int(name.split(".")[2]) * stages // model.num_layers
        else:
            own = 0 if name.startswith("embedding.") else stages - 1
        if own == stage or (model.tie_embeddings and name.startswith("embedding.") and stage == stages - 1):
            numbers = math.prod(entry.shape(model))
            sizes.append(numbers if entry.split == "whole" else numbers // tp)
    if lora is None:
        return Parameters(sum(sizes), sum(sizes), max(sizes))
    query, kv = model.num_attention_heads * model.head_width // tp, model.kv_heads * model.head_width // tp
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tp
    widths = {
        "linear_qkv": hidden + query + 2 * kv,
        "linear_proj": query + hidden,
        "linear_fc1": hidden + 2 * ffn,
        "linear_fc2": ffn + hidden,
    }
    adapters = model.num_layers // stages * lora.rank * sum(widths[name] for name in lora.targets)
    return Parameters(sum(sizes), adapters, max(sizes))
