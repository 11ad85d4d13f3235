"""The way of examples/README.md from a Hugging Face directory to an aligned one: its commands as they stand there."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import free_port
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nemo_eppo.data.tokenizer import train_bpe

REPOSITORY = Path(__file__).parents[1]
# what makes a command small enough for a test, put behind it
SMALLER = {
    "train_gpt_sft.py": "fit.max_steps=2 fit.global_batch_size=8",
    "train_reward_model.py": "fit.max_steps=2 fit.global_batch_size=8",
    "train_gpt_ppo_actor.py": "ppo.max_steps=1 ppo.rollout_batch_size=4 ppo.mini_batch_size=4 "
    "generation.max_new_tokens=16 data.max_prompt_length=64",
    "nemo-eppo evaluate": "--max-new-tokens 16",
}


def commands() -> str:
    """The commands of the section of examples/README.md, made small, with ports that are free."""
    text = (REPOSITORY / "examples" / "README.md").read_text()
    section = text.split("## Step by step, with a small model on a CPU")[1]
    script = section.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    for name, settings in SMALLER.items():
        script, count = re.subn(rf"(.*{name}.*)", rf"\1 {settings}", script)
        assert count == 1, name
    for port in ("5555", "5556"):
        script = script.replace(port, str(free_port()))
    return script.replace("source .venv/bin/activate", f'export PATH="{Path(sys.executable).parent}:$PATH"')


def write_inputs(directory: Path) -> None:
    """A Llama directory and dialogues in the form of HH."""
    words = ("I can help you with that please do not ask me why the sky is so very blue today " * 2).split()
    rows = []
    for index in range(60):
        turn = [" ".join(words[(index * k) % 11 : (index * k) % 11 + 5]) for k in (1, 2, 3)]
        start = f"\n\nHuman: {turn[0]} {index}?\n\nAssistant:"
        rows.append({"chosen": f"{start} {turn[1]}", "rejected": f"{start} {turn[2]} never {index}"})
    (directory / "harmless-base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run(["gzip", "harmless-base.jsonl"], cwd=directory, check=True)
    model = directory / "models" / "llama"
    train_bpe((row["chosen"] for row in rows), 400, model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1536,
        eos_token_id=AutoTokenizer.from_pretrained(model).eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(model)


@torch.no_grad()
def logprob(network: AutoModelForCausalLM, prompt: list[int], response: list[int]) -> float:
    logits = network(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
    return float(logits[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum())


@pytest.mark.slow
def test_the_readme_leads_from_a_hugging_face_directory_to_an_aligned_one(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with (tmp_path / "log.txt").open("w") as log:
        shell = subprocess.Popen(
            ["bash", "-e", "-c", commands()],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            code = shell.wait(400)
        finally:
            with contextlib.suppress(ProcessLookupError):  # usually the servers, too, are gone
                os.killpg(shell.pid, signal.SIGTERM)
    assert code == 0, (tmp_path / "log.txt").read_text()[-6000:]

    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name) for name in ("llama", "aligned"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "models" / "aligned")
    question = tokenizer.encode("\n\nHuman: why is the sky blue?\n\nAssistant:", return_tensors="pt")
    assert after.generate(question, max_new_tokens=5, do_sample=False).shape[1] > question.shape[1]

    rows = [json.loads(line) for line in (tmp_path / "data" / "sft.validation.jsonl").read_text().splitlines()]
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == len(scores) > 0
    results = json.loads((tmp_path / "runs" / "evaluation" / "summary.json").read_text())
    assert results["responses"] == 16 * results["prompts"] > 0, results
    for row, score in zip(rows, scores, strict=True):
        prompt, response = (tokenizer.encode(row[key], add_special_tokens=False) for key in ("prompt", "response"))
        assert abs(score["logprob"] - logprob(after, prompt, response)) < 1e-4
        assert score["num_tokens"] == len(response)
        assert abs(score["logprob"] - logprob(before, prompt, response)) > 1e-4  # it has learnt something
