"""`nemo-eppo launch`: its arguments and its help."""

import argparse
import sys
from pathlib import Path

_DESCRIPTION = """\
Run the jobs of a launch file, on this machine or on a cluster.

A launch file names jobs (scripts of examples/nlp/gpt), their ranks and settings, and the jobs that each needs: servers
start with it, and it waits for them; any other job has to have ended. Addresses, ports, run directories and
certificates are filled in. Everything is checked before anything starts. The same command resumes an interrupted run.

  local        starts the jobs, with a log each in <output>/logs, and shows their state. Ctrl-C, or the first job that
               fails, stops all of them; the exit status is that of the failed job.
  slurm        writes a batch script: a heterogeneous job, in pyxis containers or not, requeued before its time is over.
               Of several trainings, a script that submits a job for each, which waits for those before.
  kubernetes   writes manifests: an Indexed Job and a headless Service for each training and its servers, suspended
               until those before are complete."""

_EPILOG = """\
examples:
  nemo-eppo launch examples/launch/quickstart.yaml --dry-run
  nemo-eppo launch run.yaml jobs.actor.settings.ppo.max_steps=200
  nemo-eppo launch run.yaml jobs.actor.colocate=true  # critic and reward models inside the actor, no servers
  nemo-eppo launch run.yaml --sweep shaping.energy_penalty.eta=0,2,5
  nemo-eppo launch examples/launch/llama3_8b_2_nodes.yaml --backend slurm --output run.sbatch && sbatch run.sbatch"""


def add_launch(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "launch",
        help="start actor, critic and reward servers by one file: here, under Slurm or in Kubernetes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="launch file, see examples/launch")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the launch file, dotted keys")
    parser.add_argument("--backend", choices=["local", "slurm", "kubernetes"], default="local", help="where to run")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the batch script or the manifests go (default: printed)"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        metavar="KEY=V1,V2,...",
        help="run the actor, with a fresh critic, once for each value of a key of the actor's settings, or of the "
        "launch file if it changes these two jobs alone; reward servers and trainings run once. Results are in "
        "<output>/KEY=VALUE, and side by side in <output>/comparison.html; values that are complete are skipped",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be run, write nothing"
    )
    parser.set_defaults(run=_launch)


def _launch(arguments: argparse.Namespace) -> None:
    from nemo_eppo.config import ConfigError
    from nemo_eppo.files import write_atomically
    from nemo_eppo.launch.colocation import colocated
    from nemo_eppo.launch.kubernetes import manifests
    from nemo_eppo.launch.launch_file import read_launch
    from nemo_eppo.launch.local import LaunchError, commands, open_nursery, run_local
    from nemo_eppo.launch.slurm import batch_script

    local, actors = arguments.backend == "local", dict[str, Path]()
    if local and arguments.output:
        raise ConfigError("--output: nothing is written with --backend local; `output` of the launch file is meant?")
    if arguments.sweep is not None:
        if not local:
            raise ConfigError(f"--sweep runs on one machine, expected --backend local, got {arguments.backend}")
        if len(arguments.sweep) > 1:
            raise ConfigError(f"--sweep is given {len(arguments.sweep)} times, expected one key: {arguments.sweep}")
        from nemo_eppo.launch.sweep import swept, variants

        launch, actors = swept(variants(arguments.file, arguments.overrides, *arguments.sweep))
    else:
        launch = colocated(read_launch(arguments.file, arguments.overrides))
    nursery = open_nursery(launch) if local and not arguments.dry_run else None  # imports during the examination
    from nemo_eppo.launch.examination import check_launch  # brings torch, which a fault of the file need not wait for

    check_launch(launch, here=local)
    if not local:
        text = batch_script(launch) if arguments.backend == "slurm" else manifests(launch)
        if arguments.output and not arguments.dry_run:
            write_atomically(arguments.output, text)
            print(f"wrote {arguments.output}")
        else:
            print(text, end="")
        return
    if arguments.dry_run:
        print("\n\n".join(commands(launch)))
        return
    try:
        if not actors or any(job.kind.samples for job in launch.jobs.values()):  # else all values are complete
            run_local(launch, nursery)
    except LaunchError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.status) from None
    if actors:
        from nemo_eppo.observability.comparison import compare_runs

        print(compare_runs(actors, launch.output) + f"Comparison: {launch.output / 'comparison.html'}")
