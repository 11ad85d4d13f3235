"""The job scripts on real Anthropic HH comparisons: SFT, reward model, servers, five EPPO steps with TP=2."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import free_port

from nemo_eppo.data.corpora import CORPORA
from nemo_eppo.data.preparation import prepare
from nemo_eppo.observability.metrics import read_metrics
from nemo_eppo.observability.recorder import read_rows

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("NEMO_EPPO_DATA", REPOSITORY.parent / "shared" / "data")) / "hh-harmless-base-test.jsonl.gz"
SCRIPTS = REPOSITORY / "examples" / "nlp" / "gpt"
STEPS = 5


def command(script: str, directory: Path, *overrides: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    return [*launcher, str(SCRIPTS / script), f"exp_manager.explicit_log_dir={directory}", *overrides]


def run(arguments: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.mark.skipif(
    not DATA.exists(), reason=f"needs the Anthropic HH file {DATA} (NEMO_EPPO_DATA names its directory)"
)
def test_five_eppo_steps_on_anthropic_hh(tmp_path: Path) -> None:
    prepare(
        CORPORA["hh"], [DATA], tmp_path / "data", bpe_vocab_size=1024, max_prompt_tokens=128, max_response_tokens=64
    )
    data, sft, rm, actor = (tmp_path / name for name in ("data", "sft", "rm", "actor"))
    model = "{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, max_sequence_length: 192}"
    run(
        command(
            "train_gpt_sft.py",
            sft,
            f"model.architecture={model}",
            f"model.tokenizer={data}/tokenizer",
            "model.micro_batch_size=16",
            f"data.train={data}/sft.train.jsonl",
            f"data.validation={data}/sft.validation.jsonl",
            "sft.max_steps=6",
            "sft.global_batch_size=16",
            "optimizer.lr=1e-3",
            "optimizer.warmup_steps=0",
        )
    )
    run(
        command(
            "train_reward_model.py",
            rm,
            f"model.restore_from_path={sft}/checkpoints",
            "model.micro_batch_size=8",
            f"data.train={data}/preferences.train.jsonl",
            f"data.validation={data}/preferences.validation.jsonl",
            "fit.max_steps=6",
            "fit.global_batch_size=16",
            "optimizer.lr=1e-3",
            "optimizer.warmup_steps=0",
        )
    )
    ports = {"serve_reward_model.py": free_port(), "serve_ppo_critic.py": free_port()}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    servers = []
    for script, port in ports.items():
        arguments = command(
            script, tmp_path / script, f"model.restore_from_path={rm}/checkpoints", f"server.port={port}"
        )
        with (tmp_path / f"{script}.log").open("wb") as log:
            servers.append(subprocess.Popen(arguments, stdout=log, stderr=log, env=environment))
    try:
        run(
            command(
                "train_gpt_ppo_actor.py",
                actor,
                f"model.restore_from_path={sft}/checkpoints",
                "model.parallel.tensor_model_parallel_size=2",
                "model.micro_batch_size=8",
                f"data.train={data}/prompts.train.jsonl",
                f"data.validation={data}/prompts.validation.jsonl",
                "data.max_prompt_length=128",
                "generation.max_new_tokens=32",
                f"ppo.max_steps={STEPS}",
                "ppo.rollout_batch_size=16",
                "ppo.mini_batch_size=8",
                "optimizer.lr=1e-5",
                "validation.max_prompts=8",
                f"servers.critic.url=http://127.0.0.1:{ports['serve_ppo_critic.py']}",
                f"servers.rewards=[{{url: 'http://127.0.0.1:{ports['serve_reward_model.py']}'}}]",
                ranks=2,
            )
        )
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        endings = [server.wait(60) for server in servers]
    assert endings == [0, 0]

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
        parts = ("proxy", "length_penalty", "missing_eos", "energy_penalty", "clip", "kl")
        total = sum(row[f"reward/{part}"] for part in parts)
        assert total == pytest.approx(row["reward/final"], abs=1e-6)
    assert len(list((actor / "tensorboard").glob("events.*"))) == 1
    assert (actor / "checkpoints" / f"step_{STEPS:06d}" / "manifest.json").exists()
