"""The peak of a rank's resident memory over that of the bare process, beside the estimate: one JSON row per case.

Started with MALLOC_MMAP_THRESHOLD_ set, so that freed tensors leave the process at once: what is measured is what is
needed, not what the C library keeps.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed import run_ranks
from features import GEMMA2

from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.launch.memory import Workload, estimate
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig, ParallelConfig
from nemo_eppo.settings.training import OptimizerConfig

SEQUENCES, LONGEST, VOCABULARY = 4, 64, 4096


def kilobytes(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])


def measure(shape: dict[str, Any], layout: dict[str, Any], rows: int, length: int, recompute: bool) -> dict[str, float]:
    """Generate, score and update twice, as an actor does; bytes of the peak and of the estimate."""
    torch.set_num_threads(1)
    model = ModelConfig(
        **shape, num_attention_heads=8, num_query_groups=4, vocab_size=VOCABULARY, max_sequence_length=512
    )
    parallel = ParallelConfig(**layout)
    initialize(parallel, 1)
    small = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 64}
    build_model(model.model_copy(update=small), parallel, head="lm")  # what is imported late is no model's memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = kilobytes("VmRSS")

    chunks: Any = build_model(model, parallel, head="lm", recompute=recompute)
    chunks = wrap_data_parallel(chunks, OptimizerConfig(lr=1e-6), "fp32")
    optimizer, scheduler = build_optimizer(chunks, OptimizerConfig(lr=1e-6), "fp32", 10)
    runner = ModelRunner(chunks, rows, optimizer=optimizer, scheduler=scheduler)
    reference = FrozenWeights(chunks)
    engine = MegatronEngine(
        chunks, EngineLimits(eos_id=1, pad_id=0, max_batch_size=SEQUENCES, max_sequence_length=LONGEST)
    )
    engine.refit(None, 0)
    engine.generate([[3] * 8] * SEQUENCES, SamplingParams(max_new_tokens=8), list(range(SEQUENCES)))
    tokens = torch.randint(0, VOCABULARY, (2 * rows, length))
    targets = tokens.roll(-1, 1)
    targets[:, -1] = IGNORE
    batch = {"tokens": tokens, "lengths": torch.full((2 * rows,), length), "targets": targets}
    with reference.active():
        runner.infer(tokens, batch["lengths"], targets, outputs=2)
    for _ in range(2):
        runner.train_step(batch, lambda output, _: (-output[..., 0].sum() / 1000, {}))
    workload = Workload(rows * length, reference=True, sequences=SEQUENCES, longest=length)
    expected = estimate(model, parallel, "fp32", workload, recompute=recompute)
    return {"measured": (kilobytes("VmHWM") - before) * 1024, "estimated": expected.total}


CASES: dict[str, tuple[int, Any]] = {
    "activations": (1, ({"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1024}, {}, 8, 256, False)),
    "recompute": (1, ({"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1024}, {}, 8, 256, True)),
    "Gemma 2": (1, ({"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1024, **GEMMA2}, {}, 4, 512, False)),
    "weights": (1, ({"num_layers": 8, "hidden_size": 768, "ffn_hidden_size": 2048}, {}, 1, 64, False)),
    "TP2": (
        2,
        (
            {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 2048},
            {"tensor_model_parallel_size": 2},
            8,
            256,
            False,
        ),
    ),
    "PP2": (
        2,
        (
            {"num_layers": 6, "hidden_size": 512, "ffn_hidden_size": 1024},
            {"pipeline_model_parallel_size": 2},
            4,
            256,
            False,
        ),
    ),
}


if __name__ == "__main__":
    for name, (ranks, case) in CASES.items():
        worst = max(run_ranks(measure, ranks, *case), key=lambda result: result["measured"])
        print(json.dumps({"case": name, **worst}), flush=True)
