"""Writes a launch as a batch script: a heterogeneous Slurm job with one component for each job of the launch.

A launch of several stages becomes a script that submits one such batch script for each stage.
"""

import shlex

from nemo_eppo.config import NOT_FINISHED, ConfigError
from nemo_eppo.launch.command import MASTER_PORT, Address, environment, overrides, script, served_at
from nemo_eppo.launch.launch_file import JobConfig, LaunchConfig, SlurmConfig
from nemo_eppo.launch.stages import Stage, stages

_REQUEUE_S = 30  # seconds reserved to kill remaining processes and requeue

_HEAD = """\
#!/usr/bin/env bash
# {name}: made by `nemo-eppo launch --backend slurm`. Change the launch file rather than this one.
# Output goes to {output}; requeued or submitted again, the run resumes from its checkpoints there.
"""

_SETUP = """\
{setup}set -euo pipefail

logs={logs}
mkdir -p "$logs"
first_node() {{ scontrol show hostnames "$1" | sed -n 1p; }}
{hosts}
{container}{certificates}# torch.distributed's names for what srun tells each process
# shellcheck disable=SC2016
as_rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'

steps=()
"""

_CERTIFICATES = """\
# The run's certificates: only its jobs can speak to its servers, and what they send is encrypted.
certificates={folder}
if [[ ! -d $certificates ]]; then
    {srun} {python} -m nemo_eppo.cli certificates "$certificates"
fi

"""

_END = """
# The time is nearly over: {trainer} saves after its step and ends. Not TERM: at that, srun kills its ranks.
again=""
trap 'again=yes; kill -USR1 "${steps[-1]}" || :' TERM

# The first job that ends, ends all: {trainer} because it is done or its own time is up, any other because it failed.
status=0
wait -n "${steps[@]}" || status=$?
if [[ $again ]]; then
    timeout {patience} tail --pid="${steps[-1]}" -f /dev/null || echo "{trainer} did not end in {patience} s" >&2
elif kill -0 "${steps[-1]}" 2>/dev/null; then
    echo "a server that {trainer} needs ended with exit status $status" >&2
    status=1
fi
kill "${steps[@]}" 2>/dev/null || :
wait
if [[ $again ]] || ((status == {not_finished})); then
    exec scontrol requeue "$SLURM_JOB_ID"
elif ((status)); then
    tail -n 25 "$logs"/*.log >&2
fi
exit "$status"
"""


_SUBMIT = """\
#!/usr/bin/env bash
# {name}: made by `nemo-eppo launch --backend slurm`. Change the launch file rather than this one.
# Run it with bash, on a machine that has sbatch: it submits one job for each stage, which waits until those that it
# needs have succeeded, and is cancelled if one of them fails. Run again, stages that are complete end at once.
set -euo pipefail
"""


def batch_script(launch: LaunchConfig) -> str:
    """Return the script for sbatch or, of several stages, the script that submits them.

    Raises:
        ConfigError: the launch does not suit a cluster.
    """
    found = stages(launch)
    if len(found) == 1:
        return _script(found[0])
    return _SUBMIT.format(name=launch.name) + "".join(map(_submission, found))


def _submission(stage: Stage) -> str:
    """Return the lines that submit a stage. Its number is left in a variable, for the stages that wait for it."""
    sbatch = "sbatch --parsable"
    if stage.after:
        numbers = ":".join(f"${{job_{name}%;*}}" for name in stage.after)  # without the name of the cluster
        sbatch += f' --kill-on-invalid-dep=yes --dependency="afterok:{numbers}"'
    end = f"END_OF_{stage.trainer.upper()}"
    return (
        f"\njob_{stage.trainer}=$({sbatch} <<'{end}'\n{_script(stage)}{end}\n)\n"
        f'echo "{stage.trainer}: job ${{job_{stage.trainer}}}"\n'
    )


def _script(stage: Stage) -> str:
    launch, last = stage.launch, stage.trainer
    slurm = launch.slurm
    if slurm is None:
        raise ConfigError(
            "slurm: required with --backend slurm, but not set; expected options of sbatch, and the container image or "
            "where all is installed: slurm: {image: registry#name:tag, sbatch: {account: NAME, time: 12:00:00}}"
        )
    names = [*(name for name in launch.order() if name != last), last]
    if not launch.output.is_absolute():
        raise ConfigError(f"output = {launch.output}: expected an absolute path that all nodes see")
    hosts = {name: f"${{oc.env:{_host(name)}}}" for name in names}
    addresses = served_at(launch, hosts, launch.certificates_folder)
    parts = [_HEAD.format(name=launch.name, output=launch.output), _options(launch, slurm, names), "\n"]
    container = ""
    if slurm.image is not None:
        mounts = [f"--container-mounts={','.join(slurm.mounts)}"] if slurm.mounts else []
        container = f"container=({shlex.join([f'--container-image={slurm.image}', *mounts])})\n"
    parts.append(
        _SETUP.format(
            logs=shlex.quote(str(launch.output / "logs")),
            hosts="\n".join(_find_host(name, group, len(names)) for group, name in enumerate(names)),
            certificates=_make_certificates(launch, slurm, len(names)),
            container=container,
            # modules and virtual environments read variables that are not set
            setup=f"set -eo pipefail\n{slurm.setup.rstrip()}\n" if slurm.setup else "",
        )
    )
    patience = slurm.requeue_before_end - _REQUEUE_S
    parts += [_step(launch, slurm, name, group, len(names), addresses) for group, name in enumerate(names)]
    end = _END.replace("{trainer}", last).replace("{patience}", str(patience))
    return "".join(parts) + end.replace("{not_finished}", str(NOT_FINISHED))


def _options(launch: LaunchConfig, slurm: SlurmConfig, names: list[str]) -> str:
    """Return the #SBATCH lines; options of the whole job are in the first component, where Slurm reads them."""
    common: dict[str, str | int] = {
        "job-name": launch.name,
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": f"B:TERM@{slurm.requeue_before_end}",
    }
    components = []
    for group, name in enumerate(names):
        job: JobConfig = launch.jobs[name]
        size: dict[str, str | int] = {
            "nodes": job.nodes,
            "ntasks-per-node": job.ranks_per_node,
            "gpus-per-node": job.ranks_per_node,
            "exclusive": "",
        }
        if slurm.cpus_per_rank is not None:
            size["cpus-per-task"] = slurm.cpus_per_rank
        options = (common if group == 0 else {}) | size | slurm.sbatch | job.sbatch
        lines = [
            f"#SBATCH --{key}" + (f"={value}\n" if value != "" else "\n")
            for key, value in options.items()
            if value is not None
        ]
        components.append(f"# {name}\n" + "".join(lines))
    return "#SBATCH hetjob\n".join(components)


def _make_certificates(launch: LaunchConfig, slurm: SlurmConfig, groups: int) -> str:
    if not launch.servers:
        return ""
    srun = ["srun", *(["--het-group=0"] if groups > 1 else []), "--nodes=1", "--ntasks=1"]
    return _CERTIFICATES.format(
        folder=shlex.quote(str(launch.certificates_folder)),
        srun=shlex.join(srun) + _container(slurm),
        python=slurm.server_python,
    )


def _container(slurm: SlurmConfig) -> str:
    """Return the last of srun's options: those of the container, if there is one."""
    return "" if slurm.image is None else ' "${container[@]}"'


def _host(name: str) -> str:
    return f"{name.upper()}_HOST"


def _find_host(name: str, group: int, groups: int) -> str:
    nodes = f"SLURM_JOB_NODELIST_HET_GROUP_{group}" if groups > 1 else "SLURM_JOB_NODELIST"
    return f'{_host(name)}=$(first_node "${nodes}")\nexport {_host(name)}'


def _step(
    launch: LaunchConfig, slurm: SlurmConfig, name: str, group: int, groups: int, addresses: dict[str, Address]
) -> str:
    job = launch.jobs[name]
    srun = ["srun", *([f"--het-group={group}"] if groups > 1 else []), f"--job-name={name}"]
    srun += [f"--nodes={job.nodes}", f"--ntasks={job.ranks}", f"--ntasks-per-node={job.ranks_per_node}"]
    if slurm.cpus_per_rank is not None:
        srun.append(f"--cpus-per-task={slurm.cpus_per_rank}")  # srun does not take sbatch's (Slurm 22.05)
    variables = {
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_WORLD_SIZE": str(job.ranks_per_node),
        "MASTER_PORT": str(MASTER_PORT + group),
        **environment(launch, name),
    }
    lines = [
        shlex.join([*srun, "--kill-on-bad-exit=1"]),
        f'--open-mode=append --output="$logs/{name}.log"' + _container(slurm),
        f'env MASTER_ADDR="${_host(name)}" ' + shlex.join(f"{key}={value}" for key, value in variables.items()),
        'bash -c "$as_rank" rank ' + shlex.join([slurm.python(job), "-u", script(job, slurm.code)]),
        *(shlex.quote(override) for override in overrides(launch, name, addresses)),
    ]
    nodes = f"{job.nodes} {'node' if job.nodes == 1 else 'nodes'}"
    return (
        f"\n# {name}: {nodes}, {job.ranks} ranks\n# shellcheck disable=SC2016\n"
        + " \\\n    ".join(lines)
        + " &\nsteps+=($!)\n"
    )
