"""The job scripts on real Anthropic HH comparisons, by one launch: SFT, reward model, servers, EPPO steps with TP=2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_eppo.observability.metrics import read_metrics
from nemo_eppo.observability.recorder import read_rows
from nemo_eppo.settings.preparation import PreparationConfig
from nemo_eppo.tools.corpora import CORPORA
from nemo_eppo.tools.preparation import prepare

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("NEMO_EPPO_DATA", REPOSITORY.parent / "shared" / "data")) / "hh-harmless-base-test.jsonl.gz"
STEPS = 5


def launch_file(directory: Path) -> dict[str, Any]:
    """SFT and reward model, then servers and an actor on two ranks, all in `directory`."""
    data, optimizer = f"{directory}/data", {"lr": 1e-3, "warmup_steps": 0}

    def files(kind: str) -> dict[str, str]:
        return {part: f"{data}/{kind}.{part}.jsonl" for part in ("train", "validation")}

    def server(script: str) -> dict[str, Any]:
        model = {"restore_from_path": "${output}/rm/checkpoints"}
        return {"script": script, "needs": ["rm"], "settings": {"model": model}}

    architecture = {
        "num_layers": 2,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "max_sequence_length": 192,
    }
    jobs = {
        "sft": {
            "script": "train_gpt_sft",
            "settings": {
                "model": {"architecture": architecture, "tokenizer": f"{data}/tokenizer", "micro_batch_size": 16},
                "data": files("sft"),
                "fit": {"max_steps": 6, "global_batch_size": 16},
                "optimizer": optimizer,
            },
        },
        "rm": {
            "script": "train_reward_model",
            "needs": ["sft"],
            "settings": {
                "model": {"restore_from_path": "${output}/sft/checkpoints", "micro_batch_size": 8},
                "data": files("preferences"),
                "fit": {"max_steps": 6, "global_batch_size": 16},
                "optimizer": optimizer,
            },
        },
        "reward": server("serve_reward_model"),
        "critic": server("serve_ppo_critic"),
        "actor": {
            "script": "train_gpt_ppo_actor",
            "needs": ["critic", "reward"],
            "ranks_per_node": 2,
            "settings": {
                "model": {
                    "restore_from_path": "${output}/sft/checkpoints",
                    "parallel": {"tensor_model_parallel_size": 2},
                    "micro_batch_size": 8,
                },
                "data": {**files("prompts"), "max_prompt_length": 128},
                "generation": {"max_new_tokens": 32},
                "ppo": {"max_steps": STEPS, "rollout_batch_size": 16, "mini_batch_size": 8},
                "optimizer": {"lr": 1e-5},
                "validation": {"max_prompts": 8},
            },
        },
    }
    return {"name": "hh", "output": str(directory), "jobs": jobs}


@pytest.mark.slow
@pytest.mark.skipif(
    not DATA.exists(), reason=f"needs the Anthropic HH file {DATA} (NEMO_EPPO_DATA names its directory)"
)
def test_five_eppo_steps_on_anthropic_hh(tmp_path: Path) -> None:
    settings = PreparationConfig(vocab_size=1024, max_prompt_tokens=128, max_response_tokens=64)
    prepare(CORPORA["hh"], [DATA], tmp_path / "data", settings)
    (tmp_path / "hh.yaml").write_text(yaml.safe_dump(launch_file(tmp_path)))
    command = [sys.executable, "-m", "nemo_eppo.cli", "launch", str(tmp_path / "hh.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    rm, actor = tmp_path / "rm", tmp_path / "actor"
    validation = json.loads((rm / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= validation["validation/accuracy"] <= 1
    curves = read_metrics(actor / "metrics.jsonl")
    steps, energy = curves["energy/policy"]
    assert steps == list(range(1, STEPS + 1))
    assert all(value != 0 for value in energy)
    assert {"energy/reference", "reward/energy_penalty", "kl/policy_reference", "critic/loss"} <= curves.keys()
    rows = read_rows(actor / "rollouts" / f"step_{STEPS:06d}.jsonl")
    assert len(rows) == 16
    assert all(row["prompt"].rstrip().endswith("Assistant:") for row in rows)
    for row in rows:
        parts = ("proxy", "energy_penalty", "clip")  # a term that does nothing has no entry
        total = sum(row[f"reward/{part}"] for part in parts)
        assert total == pytest.approx(row["reward/final"], abs=1e-6)
    assert len(list((actor / "tensorboard").glob("events.*"))) == 1
    assert (actor / "checkpoints" / f"step_{STEPS:06d}" / "manifest.json").exists()
