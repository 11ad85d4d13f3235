"""Small models with random weights, and a batch for them."""

from typing import Any

import torch
from torch import Tensor

from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.lora import train_adapters
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.weights import export_tensors, load_tensors
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import Head, LoRAConfig, ModelConfig, ParallelConfig, Precision
from nemo_eppo.settings.training import OptimizerConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=101,  # odd, so that tensor parallelism has to pad it
    max_sequence_length=64,
)
PRESETS = ("paper", "mlp_block", "mlp_linears", "mlp_linears_out", "down_proj")
Layout = dict[str, Any]
TP2 = {"tensor_model_parallel_size": 2}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def random_weights(model: ModelConfig, outputs: int = 1, *, seed: int = 5, scale: float = 0.15) -> dict[str, Tensor]:
    """Whole tensors under Hugging Face names, of a size that makes every module matter; with outputs `score.*` too."""
    draw = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = dict(hf_names(model))
    if outputs:
        shapes |= {"score.weight": (outputs, model.hidden_size), "score.bias": (outputs,)}
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        weights[name] = noise * (0.5 if len(shape) == 1 else scale)
        if "norm" in name:
            weights[name] = 0.3 * noise + (0 if model.norm_plus_one else 1)
    return weights


def random_batch(rows: int = 6, longest: int = 12) -> Rows:
    """Rows of different lengths: tokens, lengths, targets; the first token of each row is its prompt."""
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, MODEL.vocab_size, (rows, longest), generator=draw)
    lengths = torch.randint(longest // 2, longest, (rows,), generator=draw)
    lengths[rows // 2] = longest
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:]
    targets[torch.arange(longest) >= lengths[:, None] - 1] = IGNORE
    return {"tokens": tokens, "lengths": lengths, "targets": targets}


def inputs(head: Head = "lm") -> tuple[Tensor, Tensor, Tensor | None]:
    """What `ModelRunner.infer` takes of `random_batch`."""
    batch = random_batch()
    return batch["tokens"], batch["lengths"], batch["targets"] if head == "lm" else None


def build_runner(
    layout: Layout,
    model: ModelConfig = MODEL,
    head: Head = "lm",
    *,
    precision: Precision = "fp32",
    recompute: bool = False,
    micro_batch_size: int = 2,
    micro_batch_tokens: int | None = None,
    probe: EnergyProbeConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 10,
    lora: LoRAConfig | None = None,
) -> ModelRunner:
    """A runner over a model with `random_weights`, in a process that `run_ranks` started."""
    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=1)
    chunks: Any = build_model(model, parallel, head=head, precision=precision, recompute=recompute)
    load_tensors(chunks, model, random_weights(model).__getitem__)
    if lora is not None:
        train_adapters(chunks, lora)
    energy_probe = EnergyProbe(probe, chunks, model.num_layers) if probe else None
    megatron_optimizer = scheduler = None
    if optimizer is not None:
        chunks = wrap_data_parallel(chunks, optimizer, precision)
        megatron_optimizer, scheduler = build_optimizer(chunks, optimizer, precision, total_steps)
    return ModelRunner(
        chunks,
        micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        optimizer=megatron_optimizer,
        scheduler=scheduler,
        probe=energy_probe,
    )


def exported(runner: ModelRunner, model: ModelConfig = MODEL) -> dict[str, Tensor]:
    return dict(export_tensors(runner.chunks, model))


def largest_difference(got: Tensor | dict[str, Tensor], expected: Tensor | dict[str, Tensor]) -> float:
    """Largest absolute difference of two tensors, or of two dicts of tensors with the same keys."""
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        assert got.shape == expected.shape
        return float((got.double() - expected.double()).abs().max())
    assert isinstance(got, dict)
    assert isinstance(expected, dict)
    assert got.keys() == expected.keys()
    return max(largest_difference(got[name], expected[name]) for name in expected)


def close(what: str, got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Assert that two tensors, or dicts of tensors, agree; the difference is printed (`pytest -rP` shows it)."""
    difference = largest_difference(got, expected)
    print(f"{what}: {difference:.1e}")
    assert difference <= tolerance, f"{what}: largest difference {difference:.3e}, allowed {tolerance:.0e}"


def squares(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    real = torch.arange(output.size(1)) < rows["lengths"].unsqueeze(1)
    return torch.where(real.unsqueeze(-1), output, 0).square().sum() / 50, {}


def update(runner: ModelRunner, head: str) -> dict[str, float]:
    """Of sums of squares, which any head gives."""
    rows = random_batch()
    if head == "scalar":
        del rows["targets"]
    return runner.train_step(rows, squares)
