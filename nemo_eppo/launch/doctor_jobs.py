"""Whether the jobs of a launch file can run, and fit together: settings, layouts, models, data, memory, disk, ports."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.data.jsonl import read_jsonl
from nemo_eppo.entry.settings import read_settings
from nemo_eppo.launch.check import HEADS, UPDATES, check_job, maker, schemas, taken_ports
from nemo_eppo.launch.command import REPOSITORY, Address, overrides
from nemo_eppo.launch.findings import Finding, error, guarded, ok, warning
from nemo_eppo.launch.gpus import Gpus, visible_gpus
from nemo_eppo.launch.machine import disk
from nemo_eppo.launch.memory import Memory, Workload, estimate
from nemo_eppo.launch.schema import LaunchConfig
from nemo_eppo.megatron import device
from nemo_eppo.training.setup import Plan, plan

FIELDS = {
    "train_gpt_sft": ("prompt", "response"),
    "train_reward_model": ("prompt", "chosen", "rejected"),
    "train_gpt_ppo_actor": ("prompt",),
}
BATCHES = {**UPDATES, "train_gpt_ppo_actor": "ppo.rollout_batch_size"}
_PROCESS = 600 * 2**20  # what a rank takes before there is a model
_SECONDS_PER_FILE = 4.0


@dataclass(frozen=True)
class Job:
    """A job of the launch whose settings are right."""

    name: str
    script: str
    ranks: int
    settings: Any
    plan: Plan | None
    """None where the model is wrong, or yet to be made by an earlier job."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence the job works on; 0 if that is not known."""
        if self.script == "train_gpt_ppo_actor":
            return int(self.settings.data.max_prompt_length + self.settings.generation.max_new_tokens)
        chosen = getattr(getattr(self.settings, "data", None), "max_sequence_length", None)
        return int(chosen or (self.plan.model.max_sequence_length if self.plan else 0))


def examine_launch(launch: LaunchConfig) -> tuple[list[Finding], list[Job]]:
    """Everything about the jobs of a launch file, and those whose settings are right; no check hides another."""
    findings, jobs = [], []
    for name in launch.jobs:
        found, job = _settings(launch, name)
        findings += found
        if job is not None:
            jobs.append(job)
    for check, examine in (("data", _data), ("tokenizers", _tokenizers), ("windows", _windows), ("memory", _memory)):
        findings += guarded(check, examine)(jobs)
    if launch.slurm is None and launch.kubernetes is None:
        findings += guarded("GPUs of the jobs", _gpus)(launch)
    findings += guarded("disk", _disk)(launch, jobs)
    taken = taken_ports(launch)
    findings += [error("ports", fault, "choose another, or 0 for any") for fault in taken]
    return findings, jobs


def _settings(launch: LaunchConfig, name: str) -> tuple[list[Finding], Job | None]:
    """Keys and values, then layout, checkpoint and tokenizer."""
    job = launch.jobs[name]
    nowhere = {other: Address("http://127.0.0.1:1") for other, its in launch.jobs.items() if its.serves}
    found: list[Job] = []

    def examine() -> Iterator[Finding]:
        schema: type[Config]
        schema, config_name = schemas()[job.script]
        settings: Any = read_settings(schema, REPOSITORY / "conf", config_name, overrides(launch, name, nowhere))
        yield ok(f"{name}: settings", f"every key of {job.script} is known, every value allowed")
        found.append(Job(name, job.script, job.ranks, settings, None))
        replicas = settings.model.parallel.data_parallel_size(job.ranks)
        source = settings.model.restore_from_path or settings.model.tokenizer
        by = maker(launch, source)
        if by is not None:
            yield ok(f"{name}: model", f"{source} will be made by the job {by}; examine again when it is there")
            return
        planned = plan(settings.model, head=HEADS.get(job.script), ranks=job.ranks)  # type: ignore[arg-type]
        found[0] = Job(name, job.script, job.ranks, settings, planned)
        parallel = settings.model.parallel
        yield ok(
            f"{name}: layout",
            f"{job.ranks} ranks = TP {parallel.tensor_model_parallel_size} x "
            f"PP {parallel.pipeline_model_parallel_size} x DP {replicas} for {planned.model.num_layers} layers "
            f"of width {planned.model.hidden_size}",
        )
        check_job(job.script, settings, planned.model, job.ranks)

    return guarded(f"{name}: settings and model", examine)(), found[0] if found else None


def _data(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Every row of every file has the fields that its job reads, as far as time allows."""
    for job in jobs:
        for key in ("train", "validation"):
            path = getattr(getattr(job.settings, "data", None), key, None)
            if path is None or job.script not in FIELDS:
                continue
            check, rows, started, whole = f"{job.name}: data.{key}", 0, time.monotonic(), True
            try:
                for rows, _ in enumerate(read_jsonl(path, FIELDS[job.script]), start=1):
                    if rows % 1000 == 0 and time.monotonic() - started > _SECONDS_PER_FILE:
                        whole = False
                        break
            except (ConfigError, OSError) as fault:
                yield error(check, str(fault), f"expected JSON lines with {', '.join(FIELDS[job.script])}")
                continue
            batch = attrgetter(BATCHES[job.script])(job.settings) if key == "train" else 1
            if rows < batch and whole:
                yield error(check, f"{path}: {rows} rows", f"expected {batch} or more ({BATCHES[job.script]})")
            else:
                yield ok(check, f"{path}: {rows} rows{'' if whole else ' and more'}")


def _tokenizers(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Actor, critic and reward models read the same tokens in the same way."""
    known = [(job.name, job.plan.tokenizer) for job in jobs if job.plan is not None]
    if len(known) < 2:
        return
    (first, expected), *others = known
    for name, tokenizer in others:
        differences = [
            f"{what} {theirs!r}, {first} has {ours!r}"
            for what, theirs, ours in (
                ("vocabulary of", tokenizer.vocab_size, expected.vocab_size),
                ("EOS", tokenizer.eos_id, expected.eos_id),
            )
            if theirs != ours
        ]
        if not differences and tokenizer.digest() != expected.digest():
            differences = [f"other tokens than {first}'s under the same numbers"]
        if differences:
            yield error(
                f"{name}: tokenizer", "; ".join(differences), f"models of one run need one tokenizer: {first}'s"
            )
        elif tokenizer.chat_template != expected.chat_template:
            yield warning(
                f"{name}: tokenizer",
                f"another chat template than {first}'s",
                "no job uses it, but the data have to be prepared with the one that both models were trained with",
            )
        else:
            yield ok(f"{name}: tokenizer", f"as {first}'s: {tokenizer.vocab_size} tokens, EOS {tokenizer.eos_id}")


def _windows(jobs: Sequence[Job]) -> Iterator[Finding]:
    """The longest rollout fits every server that reads it; the actor's own window is one of its settings' checks."""
    for actor in (job for job in jobs if job.script == "train_gpt_ppo_actor"):
        for job in jobs:
            if job.plan is None or job.script not in ("serve_ppo_critic", "serve_reward_model"):
                continue
            window = job.plan.model.max_sequence_length
            text = f"{actor.longest} tokens of prompt and response, a window of {window}"
            if actor.longest > window:
                yield error(f"{job.name}: window", text, "lower data.max_prompt_length or generation.max_new_tokens")
            else:
                yield ok(f"{job.name}: window", text)


def memory_of(job: Job) -> Memory:
    """Of the rank that needs most."""
    assert job.plan is not None
    setup, actor = job.settings.model, job.script == "train_gpt_ppo_actor"
    rows = setup.micro_batch_size * (2 if job.script == "train_reward_model" else 1)
    optimizer = getattr(job.settings, "optimizer", None)
    return estimate(
        job.plan.model,
        setup.parallel,
        setup.precision,
        Workload(
            micro_batch_tokens=setup.micro_batch_tokens or rows * job.longest,
            trained=optimizer is not None,
            reference=actor,
            sequences=job.settings.engine.max_batch_size if actor else 0,
            longest=job.longest,
        ),
        outputs=None if job.script in ("train_gpt_sft", "train_gpt_ppo_actor") else 1,
        replicas=setup.parallel.data_parallel_size(job.ranks),
        distributed_optimizer=bool(optimizer and optimizer.distributed),
        recompute=setup.recompute,
        lora=setup.lora,
    )


def _memory(jobs: Sequence[Job]) -> Iterator[Finding]:
    """What each rank will need, against what a GPU, or this machine, has."""
    import psutil

    capacities, together = device.capacities(), 0
    for job in (job for job in jobs if job.plan is not None):
        memory = memory_of(job)
        parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer}
        parts |= {"reference": memory.reference, "work": memory.work}
        told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
        on_device = memory.total - memory.reference  # the reference lies in the host's memory
        text, check = f"{on_device / 2**30:.2f} GiB a rank at its peak (GiB: {told})", f"{job.name}: memory"
        if capacities and on_device > min(capacities):
            hint = "more tensor or pipeline parallelism, model.recompute, a smaller micro-batch, or model.lora"
            yield error(check, f"{text}; a GPU has {min(capacities) / 2**30:.0f}", hint)
        else:
            yield ok(check, text)
        together += job.ranks * (_PROCESS + (memory.reference if capacities else memory.total))
    available = psutil.virtual_memory().available
    text = f"{together / 2**30:.1f} GiB for all jobs, {available / 2**30:.1f} free on this machine"
    if together > available:
        yield warning("memory of the machine", text, "run fewer ranks here, or jobs on machines of their own")
    elif together:
        yield ok("memory of the machine", text)


def _gpus(launch: LaunchConfig) -> Iterator[Finding]:
    """The jobs that run together have a GPU for each rank, if there are any."""
    gpus = visible_gpus()
    Gpus(launch, gpus)
    if gpus:
        yield ok("GPUs of the jobs", f"{len(gpus)} are enough for all ranks that run together")


def _disk(launch: LaunchConfig, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Room for the checkpoints that will be there at once: those kept, and the one being written."""
    needed = 0
    for job in (job for job in jobs if job.plan is not None and getattr(job.settings, "optimizer", None) is not None):
        memory, parallel = memory_of(job), job.settings.model.parallel
        kept = getattr(getattr(job.settings, "checkpoint", None), "keep", 2)
        needed += (memory.weights + memory.optimizer) * parallel.model_parallel_size * (kept + 1)
    yield disk("disk", launch.output, needed)
