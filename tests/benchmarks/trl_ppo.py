"""A whole PPO step of ours (critic and reward model in the actor's process) and of TRL's PPOTrainer at the same work.

All have the same fp32 weights, whose EOS has no probability: every response is as long as it may be. All do one update
of one micro-batch a step. `forwards` are log-probs, reference, values and rewards; eppo with own_response also
generates the reference's answers there, to prompts that are new in every step, as in a run's first epoch; of those that
were answered before (read_reference_energies.py) it only looks up the energies. TRL takes the policy's log-probs from
generation; so do ours (`ppo.old_logprobs: engine`), but for the one that recomputes.
"""

import gc
import json
import logging
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from pairs import Contestant, Options, Row, Seconds, compare, interleave
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from nemo_eppo.data.datasets import PromptItem
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.entry.settings import Source, check
from nemo_eppo.observability.run import Run
from nemo_eppo.observability.timers import Timers
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.training.ppo import PPO
from nemo_eppo.training.ppo_job import PPOJob

CONF = Path(__file__).resolve().parents[2] / "conf"
VOCABULARY, EOS, LR = 1024, 0, 1e-6
INSTALL = "trl is not installed, ours runs alone: pip install -e '.[benchmarks]', or pip install --no-deps trl==1.12.0"
ANSWERED = "eppo own_response, answered before"
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "eppo own_response": ("eppo", {}),
    ANSWERED: ("eppo", {}),
    "eppo same_response": ("eppo", {"energy.reference": "same_response"}),
    "ppo": ("ppo", {}),
    "ppo, recompute": ("ppo", {"ppo.old_logprobs": "recompute"}),
}
PHASES = {
    "generate": ("generate",),
    "forwards": ("logprobs", "reference", "server_wait", "shape", "refit"),
    "training": ("actor_train", "critic_train"),
}
Phases = dict[str, list[Seconds]]


class CPUTimers(Timers):
    """Adds up the CPU seconds of each phase as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        before = time.process_time()
        with super().__call__(phase):
            yield
        self.cpu[phase] += time.process_time() - before


class Work:
    """Size of the models and of a step, and files with models and prompts."""

    def __init__(self, folder: Path, rounds: int, smallest: bool, layers: int = 4, width: int = 256) -> None:
        self.folder, self.steps = folder, rounds + 1
        self.layers, self.width = (2, 32) if smallest else (layers, width)
        self.prompt, self.response, self.batch = (4, 8, 4) if smallest else (32, 64, 64)
        words = [f"w{number}" for number in range(VOCABULARY - 2)]
        torch.manual_seed(0)
        for kind, name in ((LlamaForCausalLM, "policy"), (LlamaForSequenceClassification, "reward")):
            network = without_eos(kind(self._config()))
            network.save_pretrained(folder / name)
            word_level(words, folder / name)
        draw = torch.randint(len(words), (self.steps * self.batch, self.prompt)).tolist()
        self.prompts = [" ".join(words[word] for word in row) for row in draw]
        lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in self.prompts]
        (folder / "prompts.jsonl").write_text("".join(lines))

    def _config(self) -> LlamaConfig:
        return LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_attention_heads=8,
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=EOS,
            num_labels=1,
            nemo_eppo_reward={"mean": 0.0, "std": 1.0},
        )


@torch.no_grad()
def without_eos(network: Any) -> Any:
    """Make channel 0 of the residual stream a positive constant that only EOS's logit reads, with a large weight."""
    network.model.embed_tokens.weight[:, 0] = 0.1
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
    if hasattr(network, "lm_head"):
        network.lm_head.weight[:, 0] = 0
        network.lm_head.weight[EOS, 0] = -100
    return network


def our_job(work: Work, name: str, stack: ExitStack, **changes: Any) -> tuple[PPO, Callable[[], list[PromptItem]]]:
    """Build one of OURS in this process; return it, and a function that gives the prompts of the next step."""
    method, settings = OURS[name]
    optimizer = {"lr": LR, "weight_decay": 0.0}
    values: dict[str, Any] = {
        "model.restore_from_path": str(work.folder / "policy"),
        "model.precision": "fp32",  # as TRL's
        "model.micro_batch_size": work.batch,
        "data.train": str(work.folder / "prompts.jsonl"),
        "data.max_prompt_length": work.prompt,
        "generation.max_new_tokens": work.response,
        "ppo": {
            "max_steps": work.steps,
            "rollout_batch_size": work.batch,
            "mini_batch_size": work.batch,
            "old_logprobs": "engine",
        },
        "rewards": [{"colocated": {"restore_from_path": str(work.folder / "reward")}}],
        "critic": {"colocated": {"restore_from_path": str(work.folder / "reward"), "optimizer": optimizer}},
        "optimizer": optimizer,
        **settings,
        **changes,
    }
    composed = Source("gpt_ppo_actor", [CONF], [f"method={method}"]).compose()
    for key, value in values.items():
        OmegaConf.update(composed, key, value, force_add=True)
    directory = work.folder / name.replace(" ", "_")
    directory.mkdir()
    job = PPOJob(check(PPOConfig, composed), Run(directory, 0, logging.getLogger(), ExpManagerConfig()))
    ppo = job.build(stack)
    assert ppo.critic is not None
    ppo.critic.begin(1, 0, False)
    if name == ANSWERED:
        with ppo.policy.reference.active():
            ppo.policy.answer([item.token_ids.tolist() for item in job.prompts.items], ppo.tokenizer.pad_id)
    return ppo, lambda: [job.prompts[index] for index in next(job.batches)]


def our_step(work: Work, name: str, stack: ExitStack, phases: Phases) -> Callable[[], None]:
    """Return a function that makes the next step, having built the job in this process."""
    ppo, prompts = our_job(work, name, stack)
    ppo.timers = timers = CPUTimers()
    numbers: Iterator[int] = iter(range(1, work.steps + 1))

    def step() -> None:
        result = ppo.step(next(numbers), prompts())
        assert result.batch.mask.sum() == work.batch * work.response
        for phase, parts in PHASES.items():
            clock = sum(result.metrics[f"seconds/{part}"] for part in parts)
            phases.setdefault(phase, []).append(Seconds(clock, sum(timers.cpu[part] for part in parts)))
        timers.cpu.clear()

    return step


def their_step(work: Work, phases: Phases) -> Callable[[], None]:
    """Return a function that makes a step of TRL's trainer; its `train` is one step long."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig as TheirConfig
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(work.folder / "policy")
    tokenizer.pad_token = tokenizer.eos_token  # a sampled PAD would be taken for padding
    policy, reward = work.folder / "policy", work.folder / "reward"
    trainer = PPOTrainer(
        TheirConfig(
            output_dir=str(work.folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=work.batch,
            local_rollout_forward_batch_size=work.batch,
            total_episodes=work.batch,
            num_ppo_epochs=1,
            num_sample_generations=0,
            response_length=work.response,
            temperature=1.0,
            learning_rate=LR,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        tokenizer,
        model=LlamaForCausalLM.from_pretrained(policy),
        ref_model=LlamaForCausalLM.from_pretrained(policy),
        reward_model=LlamaForSequenceClassification.from_pretrained(reward),
        value_model=LlamaForSequenceClassification.from_pretrained(reward),
        train_dataset=Dataset.from_dict({"input_ids": tokenizer(work.prompts)["input_ids"]}),
    )
    generate = ppo_trainer.batch_generation
    moments: dict[str, Seconds] = {}

    def timed_generation(*arguments: Any) -> Any:
        found = generate(*arguments)
        assert found[0].shape == (work.batch, work.prompt + work.response)
        moments["generate"] = now()
        return found

    ppo_trainer.batch_generation = timed_generation
    # policy and value model are called through their wrapper in training only
    trainer.model.register_forward_pre_hook(lambda *_: moments.update(forwards=now()))

    def step() -> None:
        before = now()
        with redirect_stdout(StringIO()):  # its metrics
            trainer.train()
        for phase in PHASES:
            after = moments.pop(phase, now())
            phases.setdefault(phase, []).append(Seconds(after.clock - before.clock, after.cpu - before.cpu))
            before = after

    return step


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def measure(options: Options) -> list[Row]:
    phases: dict[str, Phases] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Work(Path(folder), options.rounds, options.smallest)
        contestants: dict[str, Contestant] = {}
        if find_spec("trl") is None:
            print(INSTALL)
        else:
            contestants["TRL PPOTrainer"] = their_step(work, phases.setdefault("TRL PPOTrainer", {}))
        for name in OURS:
            contestants[name] = our_step(work, name, stack, phases.setdefault(name, {}))
        gc.freeze()  # TRL collects garbage twice a step, and would pay for what we have imported
        seconds = interleave(contestants, options.rounds)
        gc.unfreeze()
    rows = compare(seconds, next(iter(seconds)))
    for row in rows:
        for phase, times in phases[str(row["what"])].items():
            for part in Seconds._fields:
                row[f"{phase} {part} s"] = median(getattr(one, part) for one in times[1:])
    return rows
