"""How much memory a rank of a job will need, before it is started.

At its peak a rank of pipeline stage s (of pp, from 0) holds

    weights     P * b                          P parameters of its stage, b bytes each (4 in fp32, 2 in bf16)
    gradients   T * 4                          T of them are trained: all, or LoRA's adapters
    optimizer   T * (8, in bf16 12) / D        Adam's two moments and bf16's main copy; D replicas share them if the
                                               optimizer is distributed, else D is 1
    reference   P * b                          the actor's frozen copy, in the host's memory; none with LoRA
    work        of an update, scoring or generation, which never run at once

with, for n tokens in a micro-batch, L layers of the stage, hidden size H, query width Q, key or value width K, MLP
width F, A heads and vocabulary V, all but H divided by tp, and H too under sequence parallelism (and 12 H in place of
6 H where attention and MLP have norms after them, too):

    update      n * b * (pp - s) * L * (6 H + 3 Q + 3 K + 5 F)   what the backward pass keeps of each layer, for each
                                               micro-batch in flight: each norm's input, its normed and its scaled
                                               output; query, key, value and attention's output; gate and up, the
                                               activation and the product. (The method is that of Korthikanti et al.,
                                               arXiv 2205.05198, section 4, applied to these modules.)
                + n * S * A * 8 * (pp - s) * L of attention that caps its scores: their tanh and their softmax in fp32
                + 8 * W                        fp32 gradients under way of the largest weight, W
                + 12 * c on the last stage     c logits at once, of n or at most max(1024, 2^24 / V) tokens, and what
                                               is computed from them
                recompute: of each layer H in place of the sum; one layer as above, or the logits, come to that
    scoring     n * b * (2 H + Q + 2 K + 3 F) + 12 * c, or n * S * A * 12 for capped scores if that is more
    generation  N * S * 2 * K * L * b          the cache of N sequences of S tokens

The C library may hold half as much again on a CPU, for what was freed in small pieces.
"""

from dataclasses import dataclass, fields
from functools import partial

from nemo_eppo.megatron.logprobs import rows_at_once
from nemo_eppo.models.hf_names import entries
from nemo_eppo.models.layout import ParallelConfig
from nemo_eppo.models.model_config import LoRAConfig, ModelConfig, Precision


@dataclass(frozen=True)
class Workload:
    """What a job does with its model."""

    micro_batch_tokens: int
    """n, tokens of a micro-batch, padding counted."""
    trained: bool = True
    reference: bool = False
    """A frozen copy is kept (the actor)."""
    sequences: int = 0
    """N, decoded at once; 0 for none."""
    longest: int = 0
    """S, tokens of the longest row, prompt and response."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, the one that needs most, beside what the bare process takes (0.5 to 0.6 GB)."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    work: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


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
    """Memory of a rank on the stage that needs most; see the formulas above.

    Args:
        outputs: of a scalar head in place of the output projection.
        replicas: D, data-parallel replicas.
    """
    sharing = replicas if distributed_optimizer else 1
    of_stage = partial(_of_stage, model, parallel, precision, workload, outputs, sharing, recompute, lora)
    stages = range(parallel.pipeline_model_parallel_size)
    return max(map(of_stage, stages), key=lambda memory: memory.total)


def _of_stage(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: Precision,
    workload: Workload,
    outputs: int | None,
    sharing: int,
    recompute: bool,
    lora: LoRAConfig | None,
    stage: int,
) -> Memory:
    each = 4 if precision == "fp32" else 2
    parameters, largest = _parameters(model, parallel, stage, outputs)
    hidden, query, kv, ffn = _widths(model, parallel)
    tokens, stages = workload.micro_batch_tokens, parallel.pipeline_model_parallel_size
    layers = model.num_layers // stages
    trained = 0
    if workload.trained:
        trained = parameters if lora is None else _adapters(model, parallel, lora) // stages
    logits = 0
    if outputs is None and stage == stages - 1:
        vocabulary = model.vocab_size // parallel.tensor_model_parallel_size
        logits = vocabulary * min(tokens, rows_at_once(vocabulary))
    scores = 0
    if model.attention_softcap is not None:
        heads = model.num_attention_heads // parallel.tensor_model_parallel_size
        scores = tokens * min(tokens, workload.longest or model.max_sequence_length) * heads
    work = max(tokens * each * (2 * hidden + query + 2 * kv + 3 * ffn) + 12 * logits, 12 * scores)
    if workload.trained:
        norms = 12 if model.post_norms else 6
        layer = tokens * each * (norms * hidden + 3 * query + 3 * kv + 5 * ffn) + 8 * scores
        in_flight = (stages - stage) * layers
        if recompute:  # a layer is computed again after the logits are gone
            update = tokens * each * in_flight * hidden + max(layer, 12 * logits)
        else:
            update = in_flight * layer + 12 * logits
        work = max(work, update + 8 * largest)
    work = max(work, workload.sequences * workload.longest * 2 * kv * layers * each)
    return Memory(
        weights=parameters * each,
        gradients=trained * 4,
        optimizer=trained * (8 if precision == "fp32" else 12) // sharing,
        reference=parameters * each if workload.reference and lora is None else 0,
        work=work,
    )


def _parameters(model: ModelConfig, parallel: ParallelConfig, stage: int, outputs: int | None) -> tuple[int, int]:
    """Parameters of one rank of a stage, and those of its largest weight."""
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    sizes = []
    for name, entry in entries(model, outputs).items():
        if name.startswith("decoder.layers."):
            own = int(name.split(".")[2]) * stages // model.num_layers
        else:
            own = 0 if name.startswith("embedding.") else stages - 1
        if own == stage or (model.tie_embeddings and name.startswith("embedding.") and stage == stages - 1):
            numbers = 1
            for size in entry.shape(model):
                numbers *= size
            sizes.append(numbers if entry.split == "whole" else numbers // tp)
    return sum(sizes), max(sizes)


def _adapters(model: ModelConfig, parallel: ParallelConfig, lora: LoRAConfig) -> int:
    """Parameters of a tensor-parallel rank's adapters in all layers."""
    hidden = model.hidden_size
    _, query, kv, ffn = _widths(model, parallel)
    shapes = {
        "linear_qkv": hidden + query + 2 * kv,
        "linear_proj": query + hidden,
        "linear_fc1": hidden + 2 * ffn,
        "linear_fc2": ffn + hidden,
    }
    return model.num_layers * lora.rank * sum(shapes[target] for target in lora.targets)


def _widths(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int, int, int]:
    """H, Q, K and F of one tensor-parallel rank."""
    tp = parallel.tensor_model_parallel_size
    hidden = model.hidden_size // (tp if parallel.sequence_parallel else 1)
    width = model.head_width
    return hidden, model.num_attention_heads * width // tp, model.kv_heads * width // tp, model.ffn_hidden_size // tp
