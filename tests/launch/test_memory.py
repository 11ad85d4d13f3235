"""The estimate of a rank's memory, against the measured peak and by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scales import planned

from nemo_eppo.launch.colocation import colocated
from nemo_eppo.launch.job_checks import examine_jobs, memory_of
from nemo_eppo.launch.launch_file import LaunchConfig
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
SCALAR = PARAMETERS - 128256 * 4096 + 4097  # one number per token instead of logits, with a bias
STATES = 2 + 4 + 12  # bytes of a trained parameter in bf16: weight, gradient, and Adam's two moments with a copy


def launch(output: Path, ranks: int = 1, reward: bool = True, *, together: bool = False, **engine: Any) -> LaunchConfig:
    """Llama-3-8B on whole GPUs: an actor, and its critic, which serves a reward model too or not."""
    model = {"restore_from_path": "/nowhere", "precision": "bf16", "micro_batch_tokens": 512, "recompute": True}
    optimizer = {"lr": 1e-6, "distributed": True}
    critic: dict[str, Any] = {"model": model, "optimizer": optimizer}
    actor = {
        "model": model,
        "data": {"train": "/nowhere", "max_prompt_length": 256},
        "generation.max_new_tokens": 256,
        "optimizer": optimizer,
        "checkpoint.keep": 3,
        "engine": engine,
    }
    jobs = {
        "critic": {
            "script": "serve_ppo_critic",
            "settings": critic | ({"reward_model": "/nowhere"} if reward else {}),
            "ranks_per_node": ranks,
        },
        "actor": {
            "script": "train_gpt_ppo_actor",
            "needs": ["critic"],
            "ranks_per_node": ranks,
            "colocate": together,
            "settings": actor if reward else {**actor, "rewards": [{"function": "rewards:length"}]},
        },
    }
    return colocated(LaunchConfig.model_validate({"name": "memory", "output": str(output), "jobs": jobs}))


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
    """Whole, though it grows with its sequences: all may be as long as they can be."""
    few, many = (Workload(16, trained=False, sequences=number, longest=8192) for number in (1, 256))
    small, large = (estimate(LLAMA_8B, ParallelConfig(), "bf16", workload) for workload in (few, many))
    layer = 256 * (8192 + 128 + 7) * 2 * 1024 * 2
    assert large.work == layer * (32 + 1)  # one moves
    assert small.work < large.work
    stages = estimate(LLAMA_8B, ParallelConfig(pipeline_model_parallel_size=4), "bf16", many)
    assert stages.work == layer * 8 + layer // 4  # of one of four batches


def test_the_cache_of_an_engine_of_its_own_is_not_the_trainers(tmp_path: Path) -> None:
    few, many = (
        [
            memory_of(planned(launch(tmp_path, name=name, max_batch_size=size), LLAMA_8B)[1]).device
            for name in ("megatron", "tensorrt_llm")
        ]
        for size in (1, 2048)
    )
    assert many[0] > few[0]
    assert many[1] == few[1]


def test_a_reward_model_beside_the_critic_adds_its_weights(tmp_path: Path) -> None:
    alone, both = (memory_of(planned(launch(tmp_path, reward=reward), LLAMA_8B)[0]) for reward in (False, True))
    assert both.device - alone.device == both.total - alone.total == 2 * SCALAR
    assert (alone.host, both.host) == (0, 0)
    work = estimate(LLAMA_8B, ParallelConfig(), "bf16", Workload(512), outputs=1, recompute=True).work
    assert alone.device == STATES * SCALAR + work


def test_colocated_models_take_turns_on_the_device_and_wait_in_the_hosts_memory(tmp_path: Path) -> None:
    alone = memory_of(planned(launch(tmp_path), LLAMA_8B)[1])
    critic, both = (
        memory_of(planned(launch(tmp_path, reward=reward, together=True), LLAMA_8B)[0]) for reward in (False, True)
    )
    work = estimate(LLAMA_8B, ParallelConfig(), "bf16", Workload(512), outputs=1, recompute=True).work
    assert alone.device - alone.staying["model"].work == STATES * PARAMETERS
    assert critic.device == both.device == STATES * PARAMETERS + STATES * SCALAR + work
    assert (alone.host, critic.host) == (2 * PARAMETERS, 2 * PARAMETERS + 14 * SCALAR)
    assert both.host == critic.host + 2 * SCALAR
    assert critic.total == alone.total + STATES * SCALAR  # without a GPU all of it stays; their passes never overlap
    assert both.total == critic.total + 2 * SCALAR


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_checkpoints_are_as_large_on_any_number_of_replicas(ranks: int, together: bool, tmp_path: Path) -> None:
    config = launch(tmp_path, ranks, together=together)
    findings = examine_jobs(config, planned(config, LLAMA_8B), here=False)
    (found,) = (finding.found for finding in findings if finding.check == "disk")
    expected = 14 * (PARAMETERS + SCALAR) * (3 + 1)  # the actor keeps three, as its critic does, and one is written
    assert re.search(r"([\d.]+) needed", found).group(1) == f"{expected / 2**30:.1f}"  # type: ignore[union-attr]
