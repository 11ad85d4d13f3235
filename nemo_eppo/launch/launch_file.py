"""The schema of launch files: the jobs of a run, their ranks, how they depend on each other, and where they run."""

import re
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, Field, field_validator, model_validator

from nemo_eppo.config import Config, ConfigError, load_config, value_at, yaml_fault
from nemo_eppo.entry.settings import nested
from nemo_eppo.settings.kinds import KINDS, JobKind

_SIZES = {"nodes": "nodes", "ntasks": "ranks_per_node", "ntasks-per-node": "ranks_per_node"}
_RESOURCES = {"nvidia.com/gpu": "the jobs' ranks_per_node", "memory": "kubernetes.memory", "cpu": "kubernetes.cpus"}
_FILLED_IN = {"colocated", "function", "server.url", "server.job", "server.certificates"}  # for a reward of a job
_POD_KEYS = ("restartPolicy", "subdomain")
_CONTAINER_KEYS = ("image", "command", "args")


def _no_sizes(options: dict[str, str | int | None]) -> dict[str, str | int | None]:
    for name, field in _SIZES.items():
        if name in options:
            raise ValueError(f"{name} = {options[name]!r}: expected the job's {field} instead, which the run relies on")
    return options


SbatchOptions = Annotated[dict[str, str | int | None], AfterValidator(_no_sizes)]


class JobConfig(Config):
    """One job: a script of examples/nlp/gpt on some ranks. Servers run as long as a job needs them."""

    script: Literal[*KINDS]  # type: ignore[valid-type]  # known at run time only
    """Name of the script, without .py."""
    needs: tuple[str, ...] = ()
    """Jobs that come before: a server starts together with the job that needs it, any other has to have ended. The
    servers among an actor's needs are its critic and its reward models, in this order."""
    held_out: str | None = None
    """One of the actor's needs: the server whose rewards are only reported (held_out_reward); null for none."""
    colocate: bool = False
    """Run the critic and the reward models that this actor needs in its own processes, without server jobs. Of their
    settings, only the models and how the critic learns count then."""
    nodes: int = Field(1, ge=1)
    """Number of machines."""
    ranks_per_node: int = Field(1, ge=1)
    """Processes on each machine, each with one GPU where there are GPUs."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of this job alone."""
    sbatch: SbatchOptions = Field(default_factory=dict)
    """Options of sbatch for this job alone, such as `constraint: h100`; "" for an option without a value, null to leave
    one out."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of the script, nested as in conf/ or with dots in the keys. Run directory, addresses and certificates
    are filled in. In an actor's `rewards`, {job: NAME, weight: 0.5, ...} stands for the reward model that one of its
    needs serves, with the settings of a source of reward; either none of these needs is named so, or each once."""

    @property
    def kind(self) -> JobKind:
        return KINDS[self.script]

    @property
    def serves(self) -> bool:
        return self.kind.serves is not None

    @property
    def serves_reward(self) -> bool:
        """Whether it serves a reward model, alone or beside the critic."""
        return self.kind.serves == "reward" or self.setting("reward_model") is not None

    @property
    def rewards_of_jobs(self) -> list[dict[str, Any]]:
        """Those of its `rewards` that name a job; usually none."""
        rewards = self.setting("rewards")
        return [own for own in rewards if isinstance(own, dict) and "job" in own] if isinstance(rewards, list) else []

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def setting(self, path: str) -> Any:
        """Return the value of a dotted key; None if it is not set."""
        return value_at(self.settings, path)


class InstalledConfig(Config):
    """What the jobs of a cluster run; the defaults fit the image of docker/Dockerfile."""

    code: PurePosixPath = PurePosixPath("/opt/nemo_eppo")
    """Path of this repository where the jobs run."""
    server_python: str = "/opt/servers/bin/python"
    """The Python there that has PyTriton and runs the servers."""

    def python(self, job: JobConfig) -> str:
        """Return the Python that runs a job's script."""
        return self.server_python if job.serves else "python"


class SlurmConfig(InstalledConfig):
    """How each stage of the run becomes a heterogeneous Slurm job, in pyxis containers or without any."""

    image: str | None = None
    """Container image of all jobs, registry#name:tag or a .sqsh file; needs pyxis. null runs them without containers,
    in an environment that `setup` makes on all nodes, and needs `code` and `server_python` as they are there."""
    setup: str = ""
    """Lines of shell that begin the batch script, such as `module load cuda` or `source /venv/bin/activate`; all
    ranks get the variables that they export, among them the PATH on which `python` is found."""
    mounts: tuple[str, ...] = ()
    """Directories of the cluster to mount in the containers, source:target."""
    sbatch: SbatchOptions = Field(default_factory=dict)
    """Options of sbatch for every component: account, partition, time, ...; null leaves one out that would be written,
    such as `gpus-per-node: null` where GPUs are asked for by `gres: "gpu:8"`, or where nodes have them anyway."""
    cpus_per_rank: int | None = Field(None, ge=1)
    """CPUs of each rank; null for as many as the cluster gives a task."""
    requeue_before_end: int = Field(300, ge=60)
    """Seconds before the time limit at which the run is told to save after its step, and is requeued to resume. If a
    step and its checkpoint take longer, it is ended before and resumes from the previous checkpoint."""

    @model_validator(mode="after")
    def _without_an_image_all_is_known(self) -> "SlurmConfig":
        if self.image is None:
            if missing := [name for name in ("code", "server_python") if name not in self.model_fields_set]:
                raise ValueError(f"{missing[0]}: required without image, expected its path on the nodes")
            if self.mounts:
                raise ValueError(f"mounts = {list(self.mounts)}: only containers have them, expected image too")
        return self


class KubernetesConfig(InstalledConfig):
    """How each stage of the run becomes an Indexed Job with a Service; a pod's index decides which job it runs."""

    image: str
    """Name of the container image."""

    namespace: str = "default"
    """Namespace of the Job and the Service."""
    volumes: dict[str, PurePosixPath] = Field(min_length=1)
    """PersistentVolumeClaims, shared by all pods, and their mount paths; one of them holds `output`."""
    secret: str | None = None
    """Kubernetes Secret with the files that `nemo-eppo certificates` makes; null only without servers."""
    shared_memory: str = "64Gi"
    """Size of /dev/shm, which NCCL and PyTriton use."""
    memory: str | None = None
    """Memory request and limit of a pod, such as 512Gi; null for none."""
    cpus: int | None = Field(None, ge=1)
    """CPUs that a pod requests; null for none."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes to use."""
    resources: dict[str, str | int] = Field(default_factory=dict)
    """Further resources that a pod requests, as its limit too: `vpc.amazonaws.com/efa: 32`, `rdma/hca: 1`, ..."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the Job and its pods, such as the queue of a scheduler that starts all pods of a Job or none."""
    annotations: dict[str, str] = Field(default_factory=dict)
    """Annotations of the pods, such as their networks."""
    pod: dict[str, Any] = Field(default_factory=dict)
    """What the pods' specification has beside: tolerations, securityContext, imagePullSecrets, hostNetwork, ... Entries
    of a list are merged by their names, if all have some; the ranks' container is called `ranks`."""
    restarts: int = Field(3, ge=0)
    """How often all pods may fail, and be replaced to resume, before the run fails."""

    @model_validator(mode="after")
    def _pod_is_ours_and_more(self) -> "KubernetesConfig":
        for name, field in _RESOURCES.items():
            if name in self.resources:
                raise ValueError(f"resources.{name} = {self.resources[name]!r}: expected {field} instead")
        containers = self.pod.get("containers", [])
        if not isinstance(containers, list) or not all(isinstance(c, dict) and "name" in c for c in containers):
            raise ValueError(f"pod.containers = {containers!r}: expected a list of mappings with a name each")
        written = [key for key in _POD_KEYS if key in self.pod]
        written += [
            f"containers.ranks.{k}" for c in containers if c["name"] == "ranks" for k in _CONTAINER_KEYS if k in c
        ]
        if written:
            raise ValueError(f"pod.{written[0]}: the launcher writes it, expected no such key")
        return self


class LaunchConfig(Config):
    """A launch file."""

    name: str
    """Name of the run: up to 40 lower case letters, digits and inner dashes; the first is a letter."""
    output: Path
    """Directory of the run: <output>/<job> is a job's run directory, <output>/logs holds the logs. Launched again
    with the same directory, the jobs resume from their checkpoints."""
    variables: dict[str, Any] = Field(default_factory=dict)
    """Values that several settings use, as ${variables.NAME}."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all jobs."""
    certificates: Path | None = None
    """Folder with the ca.pem, cert.pem and key.pem of all jobs; null for <output>/certificates, which is made with new
    ones. Only who has them can speak to the servers."""
    start_timeout: float = Field(1800.0, gt=0)
    """Seconds that a server may take to get ready."""
    jobs: dict[str, JobConfig] = Field(min_length=1)
    """Jobs by name."""
    slurm: SlurmConfig | None = None
    """Settings of --backend slurm, which needs them."""
    kubernetes: KubernetesConfig | None = None
    """Settings of --backend kubernetes, which needs them."""

    @field_validator("name")
    @classmethod
    def _is_plain(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
            raise ValueError("expected up to 40 lower case letters, digits and inner dashes, the first a letter")
        return name

    @model_validator(mode="after")
    def _jobs_fit_together(self) -> "LaunchConfig":
        for name, job in self.jobs.items():
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "logs":
                raise ValueError(f"jobs.{name}: expected a name of lower case letters, digits and _, other than logs")
            unknown = [need for need in job.needs if need not in self.jobs]
            if unknown:
                raise ValueError(f"jobs.{name}.needs: no job '{unknown[0]}' (jobs: {', '.join(self.jobs)})")
            if job.held_out is not None and job.held_out not in job.needs:
                raise ValueError(f"jobs.{name}.held_out = '{job.held_out}': expected one of its needs")
            self._check_rewards_of_jobs(name)
            port = job.setting("server.port")  # the launcher itself uses it, before a script sees it
            if port is not None and (type(port) is not int or not 0 <= port < 2**16):
                raise ValueError(f"jobs.{name}.settings.server.port = {port!r}: expected 0 (any) to 65535")
        try:
            self.order()
        except CycleError as error:
            raise ValueError(f"jobs need each other in a circle: {' -> '.join(error.args[1])}") from None
        return self

    def _check_rewards_of_jobs(self, actor: str) -> None:
        """Refuse `rewards` that name jobs, but not each that serves one, or one twice, or say where it is."""
        rewards, served = self.jobs[actor].rewards_of_jobs, self._reward_jobs(actor)
        named = list[Any]()
        for reward in rewards:
            name, server = reward["job"], reward.get("server", {})
            where = f"jobs.{actor}.settings.rewards: {{job: {name}}}:"
            if name not in served:
                known = f"{', '.join(served) or 'none does'}"
                raise ValueError(f"{where} expected one of its needs that serves a reward to train with: {known}")
            if name in named:
                raise ValueError(f"{where} this job is named twice")
            if not isinstance(server, dict) or (taken := _FILLED_IN & {*reward, *(f"server.{key}" for key in server)}):
                found = f"server = {server!r}" if not isinstance(server, dict) else min(taken)
                raise ValueError(f"{where} expected no {found}, the launcher says where it is")
            named.append(name)
        if rewards and (left := [name for name in served if name not in named]):
            raise ValueError(
                f"jobs.{actor}.settings.rewards: the job {left[0]} is left out, expected {{job: {left[0]}}}, or no job"
            )

    def _reward_jobs(self, actor: str) -> list[str]:
        job = self.jobs[actor]
        return [need for need in job.needs if self.jobs[need].serves_reward and need != job.held_out]

    @property
    def certificates_folder(self) -> Path:
        """Folder with the certificates, on this machine and under Slurm."""
        return self.certificates or self.output / "certificates"

    @property
    def servers(self) -> list[str]:
        """The jobs that are servers, in the order of the file."""
        return [name for name, job in self.jobs.items() if job.serves]

    def critics(self, actor: str) -> list[str]:
        """List the jobs among an actor's needs that serve a critic."""
        return [need for need in self.jobs[actor].needs if self.jobs[need].kind.serves == "critic"]

    def rewards(self, actor: str) -> list[str]:
        """List the jobs whose rewards an actor is trained with, in the order of its rewards, or else of its needs; its
        critic may be one of them."""
        return [own["job"] for own in self.jobs[actor].rewards_of_jobs] or self._reward_jobs(actor)

    def order(self) -> list[str]:
        """List the jobs, each after those that it needs, else in the order of the file; CycleError for a circle."""
        return list(TopologicalSorter({name: job.needs for name, job in self.jobs.items()}).static_order())

    def before(self, name: str) -> set[str]:
        """Return all jobs that a job needs, directly or indirectly."""
        direct = set(self.jobs[name].needs)
        return direct.union(*(self.before(need) for need in direct))


def read_launch(file: Path, overrides: Sequence[str] = ()) -> LaunchConfig:
    """Read a launch file; `overrides` are `key=value` with dotted keys, such as `jobs.actor.settings.ppo.epochs=2`.

    Raises:
        ConfigError: the file or an override cannot be read, or a key is unknown, missing or wrong (named).
    """
    if file.is_dir() or not file.exists():
        raise ConfigError(f"{file} {'is a directory' if file.is_dir() else 'does not exist'}, expected a launch file")
    changes = _parsed(overrides)
    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(file))
        if not isinstance(loaded, dict):
            raise ConfigError(f"{file}: expected a mapping with name, output and jobs")
        jobs = loaded.get("jobs")
        for name, job in jobs.items() if isinstance(jobs, dict) else ():
            if isinstance(job, dict) and isinstance(job.get("settings"), dict):
                job["settings"] = nested(job["settings"], f"{file}: jobs.{name}.settings.")
        merged = OmegaConf.create(loaded)
        for override, change in changes.items():
            try:
                merged.merge_with(change)
            except OmegaConfBaseException as error:
                raise ConfigError(f"{override}: {error}; a list is given whole, KEY=[A,B]") from None
        missing = OmegaConf.missing_keys(merged)
        if missing:
            raise ConfigError(f"{file}: required, but not set (???): {', '.join(sorted(missing))}")
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(yaml_fault(error, file)) from None
    except OmegaConfBaseException as error:
        where = f"{file}: {error.full_key}" if error.full_key else str(file)
        raise ConfigError(f"{where}: {str(error.msg).splitlines()[0]}") from None
    return load_config(LaunchConfig, values)


def _parsed(overrides: Sequence[str]) -> dict[str, DictConfig]:
    """Parse `key=value` arguments, each by itself.

    Raises:
        ConfigError: one is none, or a key is given twice; the message names the argument.
    """
    first: dict[str, str] = {}
    parsed = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override}: expected KEY=VALUE")
        if (earlier := first.setdefault(key, override)) is not override:
            raise ConfigError(f"{key} is given twice on the command line: {earlier} and {override}")
        try:
            parsed[override] = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"{override}: expected KEY=VALUE ({' '.join(str(error).split())})") from None
    return parsed
