"""The table of predicted steps in nemo_eppo/launch/README.md and what each size needs: python tests/launch/scales.py"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_eppo.entry.settings import read_settings
from nemo_eppo.launch.cluster import H100
from nemo_eppo.launch.command import REPOSITORY, Address, overrides
from nemo_eppo.launch.job import Job
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.step_time import StepEstimate, estimate_step
from nemo_eppo.settings.model import ModelConfig

LLAMA = {"num_query_groups": 8, "vocab_size": 128256, "max_sequence_length": 8192}
SIZES: dict[str, tuple[dict[str, int], dict[str, Any], bool]] = {  # architecture, layout, whether it recomputes
    "8B": (
        {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
        {"tensor_model_parallel_size": 4, "sequence_parallel": True},
        False,
    ),
    "70B": (
        {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
        {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "sequence_parallel": True},
        True,
    ),
    "405B": (
        {"num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_attention_heads": 128},
        {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 18, "sequence_parallel": True},
        True,
    ),
}
ROWS = [  # size, replicas of the actor, of the critic
    *(("8B", replicas, replicas) for replicas in (1, 2, 8, 32, 128)),
    *(("70B", replicas, replicas) for replicas in (1, 4, 16)),
    *(("405B", *replicas) for replicas in ((1, 1), (2, 2), (4, 2), (4, 3))),
]
HEADER = (
    "| model | GPUs, actor + critic | layout | step s | generate | logprobs, reference | actor_train | waits "
    "| tokens/s | step s with CUDA graphs | with TensorRT-LLM | GB sent by a GPU | GiB a GPU |"
)
NODE = 8
"""GPUs of a machine."""
GPU_BYTES = 80e9


def planned(launch: LaunchConfig, model: ModelConfig) -> list[Job]:
    """The jobs of a launch, as if every model that they name had been found, with this architecture."""
    plan: Any = SimpleNamespace(model=model)
    examined = []
    for name, config in launch.jobs.items():
        kind = config.kind
        given = overrides(launch, name, dict.fromkeys(launch.servers, Address("grpc://127.0.0.1:1")))
        settings: Any = read_settings(kind.schema, REPOSITORY / "conf", kind.config_name, given, gpus=True)
        job = Job(name, kind, config.ranks, settings)
        examined.append(replace(job, plans=dict.fromkeys(job.models, plan)))
    return examined


def estimated(
    size: str, actors: int, critics: int, engine: str = "megatron", *, graphs: bool = False, **changes: Any
) -> StepEstimate:
    """A step of EPPO on 1,024 prompts of 1,024 tokens with answers of 1,024, and mini-batches of 256.

    Args:
        actors: replicas of the actor.
        critics: replicas of the critic.
        changes: sizes of the layout that are others than in SIZES; activations are recomputed then.
    """
    architecture, layout, recompute = SIZES[size]
    layout = layout | changes
    ranks = layout["tensor_model_parallel_size"] * layout.get("pipeline_model_parallel_size", 1)
    model: dict[str, Any] = {
        "restore_from_path": "/nowhere",
        "precision": "bf16",
        "micro_batch_size": 2,
        "recompute": recompute or bool(changes),
        "parallel": layout,
    }

    def nodes(replicas: int) -> dict[str, int]:
        return {"nodes": -(-replicas * ranks // NODE), "ranks_per_node": min(NODE, replicas * ranks)}

    optimizer = {"lr": 1e-6, "distributed": True}
    jobs = {
        "critic": {
            "script": "serve_ppo_critic",
            **nodes(critics),
            "settings": {"model": model, "reward_model": "/nowhere", "optimizer": optimizer},
        },
        "actor": {
            "script": "train_gpt_ppo_actor",
            "needs": ["critic"],
            **nodes(actors),
            "settings": {
                "method": "eppo",
                "model": model,
                "data": {"train": "/nowhere", "max_prompt_length": 1024},
                "generation.max_new_tokens": 1024,
                "engine": {
                    "name": engine,
                    "cuda_graphs": graphs,
                    "tensorrt_llm": {"tensor_parallel_size": min(NODE, ranks)},
                },
                "ppo": {"max_steps": 500, "rollout_batch_size": 1024, "mini_batch_size": 256},
                "energy.reference": "same_response",
                "optimizer": optimizer,
            },
        },
    }
    launch = LaunchConfig(name="scale", output=Path("/nowhere"), jobs=jobs, slurm={"image": "none"})
    examined = planned(launch, ModelConfig(**architecture, **LLAMA))
    return estimate_step(launch, examined, examined[1], H100)


def table(rows: Sequence[tuple[str, int, int]] = ROWS) -> str:
    """These rows, as Markdown."""
    lines = [HEADER, "|---" * HEADER.count(" | ") + "|---|"]
    for size, actors, critics in rows:
        layout = SIZES[size][1]
        tp, pp = layout["tensor_model_parallel_size"], layout.get("pipeline_model_parallel_size", 1)
        found, faster = (estimated(size, actors, critics, engine) for engine in ("megatron", "tensorrt_llm"))
        graphs = estimated(size, actors, critics, graphs=True)
        phases = {phase.name: phase for phase in found.phases}

        def told(*names: str, phases: Any = phases) -> str:
            return f"{sum(phases[name].seconds for name in names):.0f}, {phases[names[0]].bound}"

        waits = phases["server_wait"].seconds + phases["critic_train"].seconds
        lines.append(
            f"| {size} | {actors * tp * pp} + {critics * tp * pp} | TP {tp} PP {pp} DP {actors} | {found.seconds:.0f} "
            f"| {told('generate')} | {told('logprobs', 'reference')} | {told('actor_train')} | {waits:.0f} "
            f"| {found.tokens_per_second:,.0f} | {graphs.seconds:.0f} | {faster.seconds:.0f} "
            f"| {sum(found.sent.values()) / 1e9:,.0f} | {max(found.memory.values()) / 2**30:.0f} |"
        )
    return "\n".join(lines)


def smallest(size: str) -> int:
    """The fewest GPUs of an actor, and of a critic as large, that any layout has room on.

    Tensor-parallel ranks stay within a machine; of more GPUs than a machine has, all machines are full.
    """
    layers = SIZES[size][0]["num_layers"]
    layouts = [
        (tp * pp * dp, -tp, pp, dp)
        for tp in (1, 2, 4, 8)
        for pp in range(1, layers + 1)
        for dp in (1, 2, 3, 4)
        if layers % pp == 0 and (tp * pp * dp in (1, 2, 4) or tp * pp * dp % NODE == 0)
    ]
    for gpus, minus_tp, pp, dp in sorted(layouts):
        parallel: dict[str, Any] = {"tensor_model_parallel_size": -minus_tp, "pipeline_model_parallel_size": pp}
        found = estimated(size, dp, dp, **parallel, sequence_parallel=minus_tp < -1)
        if max(found.memory.values()) < GPU_BYTES:
            return gpus
    raise ValueError(f"{size}: no layout has room")


if __name__ == "__main__":
    print(table())
    for size in SIZES:  # minutes: every layout of fewer GPUs is tried
        gpus = smallest(size)
        print(f"{size}: at least {gpus} + {gpus} GPUs")
