"""Checks jobs of a launch against each other: an actor's rewards, windows and tokenizers, and its servers'.

The model that a job starts from is checked with the job itself (examination.py).
"""

from collections.abc import Iterator, Sequence
from typing import Any

from nemo_eppo.config import flat
from nemo_eppo.launch.findings import Finding, error, guarded, ok, warning
from nemo_eppo.launch.job import Job
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig


def examine_together(launch: LaunchConfig, jobs: Sequence[Job], *, files: bool) -> Iterator[Finding]:
    """Examine every actor with the jobs that it needs, as far as their models are known.

    Args:
        files: the actors' own code can be loaded here.
    """
    known = {job.name: job for job in jobs}
    for job in jobs:
        if isinstance(job.settings, ReferenceEnergiesConfig):
            yield from _energy_cache(job, [other for other in jobs if other.kind.samples])
    for actor in (job for job in jobs if job.kind.samples):
        others = [known[name] for name in launch.order() if name in launch.before(actor.name) and name in known]
        yield from guarded(f"{actor.name}: rewards", _rewards)(launch, actor, known, files)
        for job in (actor, *others):
            yield from _windows(actor, job)
            yield from _tokenizers(actor, job)


def _energy_cache(job: Job, actors: Sequence[Job]) -> Iterator[Finding]:
    """Check that an actor of the launch, if it has one, reads the reference energies that a job writes."""
    ours, check, differences = _answer_settings(job), f"{job.name}: energy cache", []
    for actor in actors:
        theirs = _answer_settings(actor)
        differing = [name for name in ours if ours[name] != theirs[name]]
        if not differing:
            yield ok(check, f"{actor.name} reads what is written to {job.settings.energy.cache}")
            return
        differences += [f"{name} = {ours[name]!r}, of {actor.name} {theirs[name]!r}" for name in differing]
    if differences:
        yield error(check, ", ".join(differences), "an actor uses answers of its own model and settings alone")


def _answer_settings(job: Job) -> dict[str, Any]:
    """Return the settings that must agree for an actor to find cached answers."""
    energy, model, answers = job.settings.energy, job.settings.model, dict(flat(job.settings.answer_settings))
    return {
        "energy.cache": str(energy.cache),
        "energy.reference": energy.reference,
        "model.restore_from_path": str(model.restore_from_path),
        "model.tokenizer": model.tokenizer and str(model.tokenizer),
        "model.precision": answers.pop("precision"),
        **answers,
    }


def _rewards(launch: LaunchConfig, actor: Job, known: dict[str, Job], files: bool) -> Iterator[Finding]:
    """Check that kind and number of reward models are what the actor's settings expect."""
    from nemo_eppo.monitor.monitor import HackingMonitor
    from nemo_eppo.rewards.inputs import Column
    from nemo_eppo.rewards.pipeline import RewardPipeline
    from nemo_eppo.training.reward_sources import model_columns

    servers, columns, latents = iter(launch.rewards(actor.name)), list[Column](), 0
    for index, source in enumerate(actor.settings.rewards):
        if source.function is not None:
            columns.append(Column(name=source.function, is_model=False))
            continue
        where = f"rewards[{index}].colocated"
        statistics = actor.rewards.get(where)
        if source.server is not None and (server := next(servers, None)) in known:
            where, statistics = f"the job {server}", next(iter(known[server].rewards.values()), None)
        if statistics is None:
            return  # its fault is reported elsewhere, or it is not on this machine
        columns += model_columns(source, where, statistics, actor.settings.reward_kind)
        latents += statistics["latent_size"]
    if files:
        RewardPipeline(actor.settings.shaping).check_sources(columns, latents)
    HackingMonitor(actor.settings.monitor).check_latents(latents)
    yield ok(f"{actor.name}: rewards", f"{len(columns)} sources, as the settings expect")


def _windows(actor: Job, job: Job) -> Iterator[Finding]:
    """Check that a server takes the actor's longest rollout and, if it is the critic, its mini-batches.

    That the rollout fits the actor itself is checked with its settings.
    """
    for key, plan in job.plans.items():
        if not job.kind.serves and (job is not actor or key == "model"):
            continue
        window = plan.model.max_sequence_length
        check = f"{job.name}: window" if key == "model" else f"{job.name}: window of {key}"
        text = f"{actor.longest} tokens of prompt and response, a window of {window}"
        if actor.longest > window:
            yield error(check, text, "lower data.max_prompt_length or generation.max_new_tokens")
        else:
            yield ok(check, text)
    if job.kind.serves == "critic":
        most, rows = job.settings.server.max_batch_size, actor.settings.ppo.mini_batch_size
        if rows > most:
            found = f"server.max_batch_size = {most}, the job {actor.name} sends ppo.mini_batch_size = {rows}"
            yield error(f"{job.name}: batches", found, f"expected at least {rows}")


def _tokenizers(actor: Job, job: Job) -> Iterator[Finding]:
    """Check that a job's models have the actor's tokenizer."""
    from nemo_eppo.training.setup import unlike

    if actor.plan is None:
        return
    expected, first = actor.plan.tokenizer, actor.name
    for key, plan in job.plans.items():
        tokenizer, check = (
            plan.tokenizer,
            f"{job.name}: tokenizer" if key == "model" else f"{job.name}: tokenizer of {key}",
        )
        if tokenizer is expected:
            continue
        if difference := unlike(tokenizer, expected, first):
            yield error(check, difference, f"models of one run need one tokenizer: {first}'s")
        elif plan.model.vocab_size < actor.plan.model.vocab_size:
            sizes = f"a vocabulary of {plan.model.vocab_size}, {first}'s model has {actor.plan.model.vocab_size}"
            mend = "nothing, if the policy never samples ids that its tokenizer lacks: a request with one is refused"
            yield warning(check, sizes, mend)
        elif tokenizer.chat_template != expected.chat_template:
            yield warning(
                check,
                f"another chat template than {first}'s",
                "no job uses it, but the data have to be prepared with the one that both models were trained with",
            )
        else:
            yield ok(check, f"as {first}'s: {tokenizer.vocab_size} tokens, EOS {tokenizer.eos_id}")
