"""Predicts a PPO step of an actor and its critic and reward models: seconds of each phase, bytes sent, memory.

Phases are those of `PPO.step`'s timers. Prompts and responses are taken to have their maximum lengths, and
prompts to be new, as in a run's first epoch, unless a job of the launch answers them. Reward functions take no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nemo_eppo.config import Config, ConfigError
from nemo_eppo.launch.cluster import Cluster
from nemo_eppo.launch.job import Job
from nemo_eppo.launch.job_checks import memory_of
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.memory import OPTIMIZER_BYTES, parameters
from nemo_eppo.launch.placement import Passes, Placement
from nemo_eppo.launch.work import Work
from nemo_eppo.rewards.pipeline import RewardPipeline
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reference_energies import ReferenceEnergiesConfig


class Phase(Config):
    """One phase of a step, or what a server does during phases."""

    name: str
    """Name of the timer; for a server JOB: values, scores or updates."""
    seconds: float
    bound: str
    """The part that takes longest: one of PARTS, or `waiting` for a server."""
    parts: dict[str, float]
    """Seconds of each of PARTS, as if nothing overlapped; empty for waiting."""
    during: str = ""
    """Phases during which a server works; empty for a phase of the actor."""


class StepEstimate(Config):
    """The prediction for one step of an actor."""

    actor: str
    """Name of the job."""
    seconds: float
    """Seconds of the step."""
    tokens_per_second: float
    """Response tokens of a step over its seconds."""
    phases: tuple[Phase, ...]
    servers: tuple[Phase, ...]
    sent: dict[str, float]
    """Bytes that a rank of the actor sends in a step, by whom to: tensor, stage, replica; and what goes to servers."""
    memory: dict[str, float]
    """Bytes of a rank of each job at its peak, without what waits in the host's memory."""


@dataclass(frozen=True)
class _Timed:
    """Work of a phase, and the ranks that do it."""

    placement: Placement
    passes: Passes
    hidden: float = 0.0
    """Seconds of it that overlap others."""

    def __add__(self, other: "_Timed | Work") -> "_Timed":
        """Further work of the same ranks."""
        work, hidden = (other, 0.0) if isinstance(other, Work) else (other.passes.own, other.hidden)
        waits = self.passes.waits if isinstance(other, Work) else self.passes.waits + other.passes.waits
        return replace(self, passes=Passes(self.passes.own + work, waits), hidden=self.hidden + hidden)

    def phase(self, name: str, cluster: Cluster, during: str = "") -> Phase:
        """Return its seconds, and the part that takes longest."""
        path = self.passes.path
        parts = self.placement.parts(cluster, path)
        seconds = max(0.0, self.placement.seconds(cluster, path) - self.hidden)
        return Phase(name=name, seconds=seconds, bound=max(parts, key=parts.__getitem__), parts=parts, during=during)


class _Step:
    """The phases of one actor's step."""

    def __init__(self, launch: LaunchConfig, jobs: Sequence[Job], actor: Job, cluster: Cluster) -> None:
        self.launch, self.jobs, self.actor, self.cluster = launch, {job.name: job for job in jobs}, actor, cluster
        self.settings: PPOConfig = actor.settings
        ppo, settings = self.settings.ppo, self.settings
        self.rows, self.prompt, self.new = (
            ppo.responses,
            settings.data.max_prompt_length,
            settings.generation.max_new_tokens,
        )
        self.length = self.prompt + self.new
        self.mini, self.updates = ppo.mini_batch_size, ppo.updates_per_step
        self.policy = self._placed(actor, "model")
        self.served_by = [name for name in launch.jobs[actor.name].needs if launch.jobs[name].serves]
        if missing := [name for name in self.served_by if name not in self.jobs]:
            raise ConfigError(f"jobs.{missing[0]}: no estimate, its settings are wrong: see the findings about it")

    def _placed(self, job: Job, key: str) -> Placement:
        """One of a job's models, by the key of its settings, on the job's ranks."""
        if key not in job.plans:
            raise ConfigError(f"jobs.{job.name}: no estimate, its {key} is not known here: see the findings about it")
        setup, plan = job.models[key], job.plans[key]
        language, optimizer = job.is_language_model(key), job.optimizer(key)
        outputs, stages = None if language else 1, range(setup.parallel.pipeline_model_parallel_size)
        most = max(parameters(plan.model, setup.parallel, stage, outputs, setup.lora) for stage in stages)
        return Placement(
            job=job.name,
            model=plan.model,
            setup=setup,
            ranks=job.ranks,
            ranks_per_node=self.launch.jobs[job.name].ranks_per_node,
            language=language,
            weights=most.all,
            trained=most.trained if optimizer is not None else 0,
            optimizer=optimizer,
        )

    def _passes(self, placed: Placement, rows: int) -> _Timed:
        return _Timed(placed, placed.forward(rows, self.length, self.new if placed.language else 0))

    def _updates(self, placed: Placement) -> _Timed:
        """All updates of a step."""
        targets = self.new if placed.language else 0
        own, waits = placed.train(self.mini, self.length, targets)
        hidden = placed.hidden(self.cluster, self.mini, self.length, targets)
        return _Timed(placed, Passes(own * self.updates, waits * self.updates), hidden * self.updates)

    def _generation(self, prompts: int) -> Work:
        """Decoding by the actor's engine, with what the host does for each token."""
        engine, policy = self.settings.engine, self.policy
        work = Work(token=prompts * self.new)
        if engine.name == "megatron":
            made = policy.generation(prompts, self.prompt, self.new, engine.max_batch_size)
            return work + made + Work(layer_decode=-made.layer_decode if engine.cuda_graphs else 0)
        tp = engine.tensorrt_llm.tensor_parallel_size
        parallel = policy.setup.parallel.model_copy(
            update={
                "tensor_model_parallel_size": tp,
                "pipeline_model_parallel_size": 1,
                "virtual_pipeline_model_parallel_size": None,
                "sequence_parallel": False,
            }
        )
        engines = replace(policy, setup=policy.setup.model_copy(update={"parallel": parallel}))
        made = engines.generation(prompts, self.prompt, self.new, engine.tensorrt_llm.max_batch_size)
        return work + made + Work(layer_decode=-made.layer_decode)  # it makes CUDA graphs

    def _reference(self) -> Work:
        """The frozen model's log-probs of the responses, and its own answers; see `Policy.infer_reference`."""
        needs = RewardPipeline(self.settings.shaping).needs
        same, work = self.settings.energy.reference == "same_response", Work()
        energies = "ref_energies" in needs
        passes = self._passes(self.policy, self.rows).passes.path
        if "ref_logprobs" in needs or (energies and same):
            work += passes
        answered = any(isinstance(job.settings, ReferenceEnergiesConfig) for job in self.jobs.values())
        if energies and not same and not answered:
            prompts = self.settings.ppo.rollout_batch_size
            work += self._generation(prompts)
            if self.settings.engine.name != "megatron":  # it reads no energies
                work += self._passes(self.policy, prompts).passes.path
        if work != Work() and self.policy.setup.lora is None:  # swapped in, and out again
            work += Work(host=4 * self.policy.weights * self.policy.shape.bytes)
        return work

    def _refit(self) -> Work:
        """Weights given to the engine: whole tensors on every rank of a replica, copied with a digest."""
        if self.settings.engine.name == "megatron":
            return Work()
        size = self.policy.weights * self.policy.shape.bytes
        others = self.policy.setup.parallel.model_parallel_size - 1
        return Work(tensor_bytes=size * others, memory=4 * size * (others + 1))

    def _offloading(self, placed: Placement, *, trained: bool = False) -> Work:
        """Copies of a colocated model to its device and back to the host's memory, if ranks have devices."""
        if self.cluster.cores is not None:
            return Work()
        size = placed.weights * placed.shape.bytes
        if trained:
            size += placed.trained * OPTIMIZER_BYTES[placed.setup.precision]
        return Work(host=2 * size)

    def _request(self, numbers: int) -> Work:
        """A request of `numbers` 4-byte numbers, its answer included, which another node may send."""
        apart = self.launch.slurm is not None or self.launch.kubernetes is not None
        return Work(request=1, outside_bytes=4.0 * numbers * apart, outside_messages=2.0 * apart)

    def _colocated_work(self) -> tuple[_Timed, _Timed]:
        """Work of colocated critic and reward models on the actor's ranks: values and scores; the critic's updates."""
        scoring = training = _Timed(self.policy, Passes(Work(), Work()))
        for key in self.actor.models.keys() - {"model"}:
            placed, learns = self._placed(self.actor, key), key == "critic.colocated"
            scoring += self._passes(placed, self.rows) + self._offloading(placed, trained=learns)
            if learns:
                training = self._updates(placed) + self._offloading(placed, trained=True) * self.updates
        return scoring, training

    def _server_work(self) -> tuple[list[Phase], list[Phase], float]:
        """Phases of the servers: values and scores; the critic's updates; and bytes sent to and from them."""
        scoring, training, numbers = list[Phase](), list[Phase](), 0
        critics = self.launch.critics(self.actor.name)
        for name in self.served_by:
            for key in self.jobs[name].models:
                what = "values" if name in critics and key == "model" else "scores"
                work = self._passes(self._placed(self.jobs[name], key), self.rows)
                numbers += 2 * self.rows * self.length
                work += self._request(2 * self.rows * self.length)
                scoring.append(work.phase(f"{name}: {what}", self.cluster, "logprobs, reference, server_wait"))
        for name in critics:  # tokens, returns, values and the mask's bytes
            request = 3 * self.mini * self.length + self.mini * self.length // 4
            numbers += request * self.updates
            work = self._updates(self._placed(self.jobs[name], "model")) + self._request(request) * self.updates
            training.append(work.phase(f"{name}: updates", self.cluster, "actor_train, critic_train"))
        return scoring, training, 4.0 * numbers

    def _wait(self, here: Phase, meanwhile: float, servers: Sequence[Phase]) -> Phase:
        """Return the actor's own phase plus the wait that is left, after `meanwhile` seconds, until all servers have
        answered. A server works on one request after another."""
        if not servers:
            return here
        seconds: dict[str, float] = {}
        for phase in servers:
            job = phase.name.partition(":")[0]
            seconds[job] = seconds.get(job, 0.0) + phase.seconds
        until = max(seconds.values())
        if self.cluster.cores is not None:
            ranks = {job: self.jobs[job].ranks for job in seconds}
            busy = meanwhile * self.actor.ranks + sum(spent * ranks[job] for job, spent in seconds.items())
            until = max(until, busy / self.cluster.cores)
        wait = max(0.0, until - meanwhile)
        return here.model_copy(update={"seconds": here.seconds + wait, "bound": "waiting" if wait else here.bound})

    def estimate(self) -> StepEstimate:
        """Predict the step; see `estimate_step`."""
        policy, ppo, divergence = self.policy, self.settings.ppo, self.settings.shaping.divergence

        def work(amounts: Work) -> _Timed:
            return _Timed(policy, Passes(amounts, Work()))

        greedy = ppo.rollout_batch_size if ppo.advantages.estimator == "remax" else 0
        recompute = ppo.old_logprobs == "recompute"
        actor_train = self._updates(policy)
        if divergence.in_loss and divergence.kind == "sqrt_chi2":  # see PPO._divergence_weight
            for _ in range(self.updates - 1):
                actor_train += self._passes(policy, self.mini)
        scoring, training = self._colocated_work()
        timed = {
            "generate": work(self._generation(self.rows + greedy)),
            "logprobs": self._passes(policy, self.rows) if recompute else work(Work()),
            "reference": work(self._reference()),
            "server_wait": scoring,
            "shape": work(Work(step=1, token=self.rows * self.length)),
            "actor_train": actor_train,
            "critic_train": training,
            "refit": work(self._refit()),
        }
        phases = {name: one.phase(name, self.cluster) for name, one in timed.items()}
        scores, updates, server_bytes = self._server_work()
        meanwhile = phases["logprobs"].seconds + phases["reference"].seconds
        phases["server_wait"] = self._wait(phases["server_wait"], meanwhile, scores)
        phases["critic_train"] = self._wait(phases["critic_train"], phases["actor_train"].seconds, updates)
        total = sum(phase.seconds for phase in phases.values())
        sent = sum((one.passes.own for one in timed.values()), Work())
        needed = {job.name: memory_of(job) for job in (self.actor, *(self.jobs[name] for name in self.served_by))}
        return StepEstimate(
            actor=self.actor.name,
            seconds=total,
            tokens_per_second=self.rows * self.new / total,
            phases=tuple(phases.values()),
            servers=(*scores, *updates),
            sent={
                "tensor": sent.tensor_bytes,
                "stage": sent.stage_bytes,
                "replica": sent.replica_bytes,
                "servers": server_bytes,
            },
            memory={name: float(memory.device) for name, memory in needed.items()},
        )


def estimate_step(launch: LaunchConfig, jobs: Sequence[Job], actor: Job, cluster: Cluster) -> StepEstimate:
    """Predict one step of `actor`, one of the examined `jobs` of a launch.

    Raises:
        ConfigError: a model of the actor or of its servers is not known here, or the cluster lacks a figure.
    """
    return _Step(launch, jobs, actor, cluster).estimate()
