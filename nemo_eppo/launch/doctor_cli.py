"""`nemo-eppo doctor`: its arguments, its table for people and its JSON for programs."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nemo_eppo.launch.cluster import Cluster
    from nemo_eppo.launch.findings import Finding
    from nemo_eppo.launch.job import Job
    from nemo_eppo.launch.launch_file import LaunchConfig
    from nemo_eppo.launch.step_time import StepEstimate

_DESCRIPTION = """\
Examine this machine, and the jobs of a launch file, before anything is started.

The machine: Python, package versions, GPUs, shared memory. The jobs: unknown keys, layouts, checkpoints, differing
tokenizers, data files row by row, windows, memory per rank, slow settings, disk, ports. Running servers: whether they
answer, their protocol and limits. A failed check does not stop others; the exit status is 1 if there is an error.

--estimate predicts a step of each actor from models, layout, batches and a cluster's figures: seconds of each phase
and what bounds it (compute, memory, launches, links, host), what servers do meanwhile, bytes sent, memory. Figures are
those of `h100` (datasheets and assumed shares, never compared with a GPU), of this machine (`here`, measured in about
half a minute), or of a YAML file with the fields of nemo_eppo.launch.cluster.Cluster. Prompts and responses count as
long as they may be: ask about shorter ones with generation.max_new_tokens."""

_EPILOG = """\
examples:
  nemo-eppo doctor
  nemo-eppo doctor run.yaml jobs.actor.settings.model.micro_batch_size=8
  nemo-eppo doctor run.yaml --server grpc://node7:5555 --certificates runs/eppo/certificates
  nemo-eppo doctor run.yaml --estimate h100
  nemo-eppo doctor run.yaml jobs.actor.settings.generation.max_new_tokens=300 --estimate here
  nemo-eppo doctor run.yaml --json | jq '.findings[] | select(.status == "error")'"""


def add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="examine the machine, and the jobs of a launch file, before anything is started",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="launch file; left out: the machine alone")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the launch file, dotted keys")
    parser.add_argument("--server", action="append", default=[], metavar="URL", help="a server that should be running")
    parser.add_argument("--certificates", type=Path, metavar="FOLDER", help="certificates of the --server's run")
    parser.add_argument(
        "--estimate", metavar="CLUSTER", help="predict a step's time on h100, here, or by figures in a file"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: findings (check, status, found, mend), errors, estimates"
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    estimates: list[StepEstimate] = []
    cluster: Cluster | None = None
    if arguments.estimate is not None:
        from nemo_eppo.config import ConfigError
        from nemo_eppo.launch.cluster import read_cluster

        cluster = read_cluster(arguments.estimate)  # reports a wrong figure at once
        if arguments.file is None:
            raise ConfigError(f"--estimate {arguments.estimate}: expected a launch file before it")
    findings = _examine(arguments, cluster, estimates)
    errors = sum(finding.status == "error" for finding in findings)
    if arguments.json:
        found = {"findings": [finding.model_dump() for finding in findings], "errors": errors}
        print(json.dumps(found | {"estimates": [estimate.model_dump() for estimate in estimates]}, indent=1))
    else:
        _print_table(findings, errors)
        if estimates:
            from nemo_eppo.launch.estimate_report import report

            print("", *map(report, estimates), sep="\n")
    if errors:
        raise SystemExit(1)


def _examine(
    arguments: argparse.Namespace, cluster: "Cluster | None", estimates: "list[StepEstimate]"
) -> "list[Finding]":
    """Examine machine, jobs and servers; add predictions for `cluster`, or for this machine if None, to `estimates`."""
    from nemo_eppo.launch import machine_checks
    from nemo_eppo.launch.findings import error, guarded

    findings = []
    for name in ("packages", "triton", "accelerators", "resources"):
        findings += guarded(name, getattr(machine_checks, name))()
    actor = None
    if arguments.file is not None:
        from nemo_eppo.config import ConfigError
        from nemo_eppo.launch.colocation import colocated
        from nemo_eppo.launch.examination import examine
        from nemo_eppo.launch.job_checks import examine_jobs
        from nemo_eppo.launch.launch_file import read_launch

        try:
            launch = colocated(read_launch(arguments.file, arguments.overrides))
        except (ConfigError, OSError) as fault:
            findings.append(error("launch file", str(fault), "see nemo-eppo launch --help"))
        else:
            here = launch.slurm is None and launch.kubernetes is None
            found, jobs = examine(launch, here=here, files=True, gpus=cluster.overlaps if cluster else None)
            findings += found + examine_jobs(launch, jobs, here=here)
            if arguments.estimate is not None:
                findings += guarded("estimate", _estimate)(arguments.estimate, cluster, launch, jobs, estimates)
            actor = next((job for job in jobs if job.kind.samples), None)
    if arguments.server:
        from nemo_eppo.launch.server_checks import examine_server

        for url in arguments.server:
            findings += guarded(f"server {url}", examine_server)(url, arguments.certificates, actor)
    return findings


def _estimate(
    name: str,
    cluster: "Cluster | None",
    launch: "LaunchConfig",
    jobs: "Sequence[Job]",
    estimates: "list[StepEstimate]",
) -> "Iterator[Finding]":
    """Predict a step of each actor, and add it to `estimates`."""
    from nemo_eppo.launch.calibration import measure_here
    from nemo_eppo.launch.findings import ok
    from nemo_eppo.launch.step_time import estimate_step

    cluster = cluster or measure_here({job.settings.model.precision for job in jobs})
    for actor in (job for job in jobs if job.kind.samples):
        estimates.append(estimate_step(launch, jobs, actor, cluster))
        yield ok(f"{actor.name}: estimate", f"{estimates[-1].seconds:.3g} s a step, predicted for {name}")


def _print_table(findings: "list[Finding]", errors: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("", "what", "found"):
        table.add_column(title, overflow="fold")
    marks = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}
    for finding in findings:
        found = finding.found if finding.status == "ok" else f"{finding.found}\n-> {finding.mend}"
        table.add_row(marks[finding.status], finding.check, found.replace("[", r"\["))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    warnings = sum(finding.status == "warning" for finding in findings)
    console.print(f"{len(findings)} findings, {errors} errors, {warnings} warnings")
