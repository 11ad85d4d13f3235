"""The estimate of a rank's memory, against the measured peak and by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_eppo.launch.memory import Workload, estimate
from nemo_eppo.settings.model import LoRAConfig, ModelConfig, ParallelConfig

LLAMA_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_sequence_length=8192,
)
PARAMETERS = 8_030_261_248  # as published


@pytest.mark.slow
def test_the_estimate_is_within_a_fifth_of_the_measured_peak() -> None:
    script = Path(__file__).parent / "measure_memory.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 6
    for row in rows:
        ratio = row["estimated"] / row["measured"]
        print(f"{row['case']}: {row['measured'] / 2**20:.0f} MiB measured, estimate {ratio:.2f} of it")
        assert 0.8 < ratio < 1.2, row


def test_weights_and_states_of_llama_3_8b_by_hand() -> None:
    memory = estimate(LLAMA_8B, ParallelConfig(), "bf16", Workload(4096, reference=True))
    assert (memory.weights, memory.gradients) == (2 * PARAMETERS, 4 * PARAMETERS)
    assert (memory.optimizer, memory.reference) == (12 * PARAMETERS, 2 * PARAMETERS)


def test_parallelism_distributed_optimizer_and_lora_take_their_share_off() -> None:
    workload, tp4 = Workload(4096, reference=True), ParallelConfig(tensor_model_parallel_size=4)
    split = estimate(LLAMA_8B, tp4, "bf16", workload)
    assert split.weights == pytest.approx(2 * PARAMETERS / 4, rel=0.01)
    shared = estimate(LLAMA_8B, tp4, "bf16", workload, replicas=2, distributed_optimizer=True)
    assert shared.optimizer == split.optimizer // 2
    adapters = estimate(LLAMA_8B, ParallelConfig(), "bf16", workload, lora=LoRAConfig(rank=16))
    per_layer = 16 * ((4096 + 6144) + (4096 + 4096) + (4096 + 2 * 14336) + (14336 + 4096))
    assert (adapters.gradients, adapters.reference) == (4 * 32 * per_layer, 0)


def test_recomputing_keeps_little_and_the_first_stage_keeps_most() -> None:
    stages = ParallelConfig(pipeline_model_parallel_size=4)
    work = {
        (parallel, recompute): estimate(LLAMA_8B, parallel, "bf16", Workload(8192), recompute=recompute).work
        for parallel in (ParallelConfig(), stages)
        for recompute in (False, True)
    }
    for parallel in (ParallelConfig(), stages):
        assert work[parallel, True] < work[parallel, False] / 3
    # four micro-batches in flight on a quarter of the layers: as much as one on all of them, but for logits and weights
    assert work[stages, False] == pytest.approx(work[ParallelConfig(), False], rel=0.15)


def test_a_long_cache_counts_when_it_is_the_largest() -> None:
    small = estimate(LLAMA_8B, ParallelConfig(), "bf16", Workload(16, trained=False, sequences=1, longest=8192))
    large = estimate(LLAMA_8B, ParallelConfig(), "bf16", Workload(16, trained=False, sequences=256, longest=8192))
    assert large.work == 256 * 8192 * 2 * 1024 * 32 * 2
    assert small.work < large.work
