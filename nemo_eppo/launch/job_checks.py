"""Checks the jobs of a launch for `nemo-eppo doctor` alone: data rows, memory, GPUs, disk.

`nemo-eppo launch` leaves them out, because reading all rows takes too long.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import tokenised_rows
from nemo_eppo.data.jsonl import read_jsonl
from nemo_eppo.launch.findings import Finding, error, guarded, ok, warning
from nemo_eppo.launch.gpus import Gpus
from nemo_eppo.launch.job import DATA, Job
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.machine_checks import disk
from nemo_eppo.launch.memory import JobMemory, Memory, Workload, estimate
from nemo_eppo.machine import visible_gpus
from nemo_eppo.megatron import device
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.settings.training import CheckpointConfig

_PROCESS = 600 * 2**20  # bytes that a rank takes without a model
_SECONDS_PER_FILE = 4.0


def examine_jobs(launch: LaunchConfig, jobs: Sequence[Job], *, here: bool) -> list[Finding]:
    """Examine jobs with valid settings; a failed check does not stop the others.

    Args:
        here: the jobs run on this machine and need its GPUs.
    """
    findings = []
    for check, examine in (("data", _data), ("memory", _memory)):
        findings += guarded(check, examine)(jobs)
    if not here or device.capacities():
        findings += guarded("speed", _speed)(jobs)
    if here:
        findings += guarded("GPUs of the jobs", _gpus)(launch)
    return findings + guarded("disk", _disk)(launch, jobs)


def _data(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Check, as far as time allows, that every row of the existing files is one that its job can use."""
    for job in jobs:
        for key in DATA:
            path: Path | None = job.setting(key)
            if path is None or not path.exists():
                continue
            check, rows, started, whole = f"{job.name}: {key}", 0, time.monotonic(), True
            try:
                for rows, _ in enumerate(_rows(job, path), start=1):
                    if rows % 1000 == 0 and time.monotonic() - started > _SECONDS_PER_FILE:
                        whole = False
                        break
            except (ConfigError, OSError) as fault:
                yield error(check, str(fault), f"expected JSON lines with {', '.join(job.kind.row_fields)}")
                continue
            batch = job.setting(job.kind.rows_per_step) if key == "data.train" and job.kind.rows_per_step else 1
            if rows < batch and whole:
                yield error(check, f"{path}: {rows} rows", f"expected {batch} or more ({job.kind.rows_per_step})")
            else:
                yield ok(check, f"{path}: {rows} rows{'' if whole else ' and more'}")


def _rows(job: Job, path: Path) -> Iterator[object]:
    """The rows of a file as the job reads them, or, if its tokenizer is not known, those that have the right fields.

    Raises:
        ConfigError: as the job would.
    """
    if job.plan is None:
        return iter(read_jsonl(path, job.kind.row_fields))
    _, *responses = job.kind.row_fields
    data = job.settings.data
    name, limit = ("max_sequence_length", job.longest) if responses else ("max_prompt_length", data.max_prompt_length)
    return tokenised_rows(path, job.plan.tokenizer, tuple(responses), name, limit, data.too_long)


def memory_of(job: Job) -> JobMemory:
    """Estimate the memory of the job's rank that needs most; all models of the job have to be known."""
    staying, colocated = dict[str, Memory](), dict[str, Memory]()
    for key, setup in job.models.items():
        main, optimizer, stages = key == "model", job.optimizer(key), setup.parallel.pipeline_model_parallel_size
        sequences = setup.micro_batch_size * job.kind.sequences_per_row
        replicas = setup.parallel.data_parallel_size(job.ranks)
        decodes = main and job.setting("engine.name") == "megatron"  # TensorRT-LLM's cache takes what is free
        memory = estimate(
            job.plans[key].model,
            setup.parallel,
            setup.precision,
            Workload(
                micro_batch_tokens=setup.micro_batch_tokens or sequences * job.longest,
                trained=optimizer is not None,
                reference=main and job.kind.samples,
                sequences=stages * job.setting("engine.max_batch_size") if decodes else 0,
                longest=job.longest,
            ),
            outputs=None if job.is_language_model(key) else 1,
            replicas=replicas,
            distributed_optimizer=optimizer is not None and optimizer.is_distributed(replicas),
            recompute=setup.recompute,
            lora=setup.lora,
        )
        (colocated if key.endswith(".colocated") else staying)[key] = memory
    return JobMemory(staying, colocated)


def _memory(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Compare the memory that ranks need with the memory of a GPU and of this machine."""
    import psutil

    capacities, together = device.capacities(), 0
    for job in (job for job in jobs if job.is_examined):
        memory = memory_of(job)
        parts = {
            name: sum(getattr(model, name) for model in memory.staying.values())
            for name in ("weights", "gradients", "optimizer")
        }
        parts |= {"work": max(model.work for model in memory.staying.values())}
        parts |= {f"{key} in its turn": model.states + model.work for key, model in memory.colocated.items()}
        parts |= {"in the host's memory": memory.host}
        told = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items() if size)
        text, check = f"{memory.device / 2**30:.2f} GiB a rank at its peak (GiB: {told})", f"{job.name}: memory"
        if capacities and memory.device > min(capacities):
            hint = "more tensor or pipeline parallelism, model.recompute, a smaller micro-batch, or model.lora"
            yield error(check, f"{text}; a GPU has {min(capacities) / 2**30:.0f}", hint)
        else:
            yield ok(check, text)
        together += job.ranks * (_PROCESS + (memory.host if capacities else memory.total))
    available = psutil.virtual_memory().available
    text = f"{together / 2**30:.1f} GiB for all jobs, {available / 2**30:.1f} free on this machine"
    if together > available:
        yield warning("memory of the machine", text, "run fewer ranks here, or jobs on machines of their own")
    elif together:
        yield ok("memory of the machine", text)


def _speed(jobs: Sequence[Job]) -> Iterator[Finding]:
    """Name settings that a CPU does well with, and a GPU badly."""
    for job in jobs:
        slow = {}
        if job.settings.model.precision == "fp32":
            slow["model.precision = fp32"] = "bf16, in which an H100 computes 989 TFLOP/s against 67 in fp32"
        if job.settings.model.micro_batch_tokens is None:
            slow["model.micro_batch_tokens = null"] = (
                "a number of tokens, for packed rows, in which no padding is computed"
            )
        optimizer = job.setting("optimizer")
        replicas = job.settings.model.parallel.data_parallel_size(job.ranks)
        if optimizer is not None and replicas > 1:
            if optimizer.distributed is False:
                slow["optimizer.distributed = false"] = (
                    f"true, with which each of {replicas} replicas updates, and keeps the states of, its own share"
                )
            if not optimizer.overlap_grad_reduce:
                slow["optimizer.overlap_grad_reduce = false"] = "null, which sums gradients during the backward pass"
        if slow:
            yield warning(f"{job.name}: speed", f"slow on GPUs: {', '.join(slow)}", f"set {'; '.join(slow.values())}")
        if job.setting("engine.name") == "megatron" and not job.setting("engine.cuda_graphs"):
            why = "off until proven on your GPU: bash tests/gpu/run.sh --only decoder tells what they gain"
            yield ok(f"{job.name}: CUDA graphs", f"engine.cuda_graphs = false, {why}")


def _gpus(launch: LaunchConfig) -> Iterator[Finding]:
    """Check that jobs which run together have a GPU for each rank, if there are GPUs."""
    gpus = visible_gpus()
    Gpus(launch, gpus)
    if gpus:
        yield ok("GPUs of the jobs", f"{len(gpus)} are enough for all ranks that run together")


def _disk(launch: LaunchConfig, jobs: Sequence[Job]) -> Iterator[Finding]:
    """Check the disk space for checkpoints: the ones kept, and one being written."""
    needed = 0
    for job in (job for job in jobs if job.is_examined):
        asked_by = (actor for actor in jobs if actor.kind.samples and job.name in launch.jobs[actor.name].needs)
        owner = next(asked_by, job) if job.kind.serves else job  # an actor decides what its critic keeps
        kept = (owner.setting("checkpoint.keep") or CheckpointConfig().keep) + bool(owner.setting("checkpoint.best"))
        number = kept * (job.setting("ensemble.members") or 1) + 1
        for key in (key for key in job.models if job.optimizer(key) is not None):
            setup, outputs = job.models[key], None if job.is_language_model(key) else 1
            model, layout = job.plans[key].model, ParallelConfig()  # a checkpoint is as large in every layout
            whole = estimate(model, layout, setup.precision, Workload(1), outputs=outputs, lora=setup.lora)
            needed += number * (whole.weights + whole.optimizer)
    yield disk(launch.output, needed)
