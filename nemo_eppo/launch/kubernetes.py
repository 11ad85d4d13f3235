"""Writes a launch as Kubernetes manifests: an Indexed Job, whose pods are the nodes of all jobs, and a Service.

It is one Job, because its success policy then ends the servers when the training has succeeded, and its failure ends
them otherwise; this needs only core Kubernetes (1.33). A launch of several stages becomes several such Jobs. Kubernetes
knows no order of Jobs: all but the first are suspended, and one more Job, a pod without GPUs, starts each when those
before are complete. (A stage that waited in its own pods would hold their GPUs, which an earlier one may need.)
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.command import MASTER_PORT, environment, overrides, script, served_at, torchrun
from nemo_eppo.launch.launch_file import KubernetesConfig, LaunchConfig
from nemo_eppo.launch.stages import Stage, stages

_HEAD = """\
# {name}: made by `nemo-eppo launch --backend kubernetes`. Change the launch file rather than this one.
# Output goes to {output}; deleted and applied again, the run resumes from its checkpoints there.
"""
_SECRET = """\
# The run's certificates have to be there, without which nobody can speak to its servers:
#   nemo-eppo certificates certificates
#   kubectl create secret generic {secret} --namespace {namespace} --from-file=certificates
"""
_SECRET_MOUNT = PurePosixPath("/etc/nemo_eppo/certificates")
_CERTIFICATES = PurePosixPath("/tmp/nemo_eppo_certificates")
# A Secret's files belong to root; the container's user needs its own, that nobody else can read.
_COPY = f"install -d -m 700 {_CERTIFICATES}\ninstall -m 600 {_SECRET_MOUNT}/*.pem {_CERTIFICATES}\n"
_KUEUE = "kueue.x-k8s.io/queue-name"  # Kueue starts suspended Jobs that have it
GRACE_S = 120  # seconds that a pod has to stop


def manifests(launch: LaunchConfig) -> str:
    """Return the YAML for kubectl apply; ConfigError if the launch does not suit a cluster."""
    kubernetes = launch.kubernetes
    if kubernetes is None:
        raise ConfigError(
            "kubernetes: required with --backend kubernetes, but not set; expected the container image, the shared "
            "volumes and, with servers, a Secret: kubernetes: {image: NAME, volumes: {CLAIM: /shared}, secret: NAME}"
        )
    if launch.servers and kubernetes.secret is None:
        raise ConfigError(f"kubernetes.secret: required for the servers {', '.join(launch.servers)}, but not set")
    found = stages(launch)
    objects = [manifest for stage in found for manifest in _stage(stage, kubernetes)]
    if len(found) > 1:
        if _KUEUE in kubernetes.labels:
            raise ConfigError(
                f"kubernetes.labels.{_KUEUE} = {kubernetes.labels[_KUEUE]!r}: Kueue would start all of the stages "
                f"{', '.join(stage.trainer for stage in found)} at once; expected a launch of one stage"
            )
        objects += _starter(launch, kubernetes, found)
    if not any(launch.output.is_relative_to(path) for path in kubernetes.volumes.values()):
        raise ConfigError(f"output = {launch.output}: expected a directory on one of kubernetes.volumes")
    head = _HEAD + (_SECRET if launch.servers else "")
    values = {"name": launch.name, "output": launch.output, **kubernetes.model_dump(include={"secret", "namespace"})}
    return head.format_map(values) + "---\n".join(
        yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000) for manifest in objects
    )


def _metadata(name: str, kubernetes: KubernetesConfig) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "nemo-eppo", "app.kubernetes.io/instance": name}
    return {"name": name, "namespace": kubernetes.namespace, "labels": labels}


def _stage(stage: Stage, kubernetes: KubernetesConfig) -> list[dict[str, Any]]:
    """Return the Service and the Job of a stage, which is suspended if others come before."""
    launch, last = stage.launch, stage.trainer
    sizes = {name: job.ranks_per_node for name, job in launch.jobs.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(
            f"ranks_per_node: the pods are of one template, expected one number for all jobs, got {sizes}"
        )
    metadata = _metadata(launch.name, kubernetes)
    labels = metadata["labels"]
    annotations = {"annotations": dict(kubernetes.annotations)} if kubernetes.annotations else {}
    first, pods = dict[str, int](), 0  # index of each job's first pod
    for name in launch.order():
        first[name], pods = pods, pods + launch.jobs[name].nodes
    start, end = first[last], first[last] + launch.jobs[last].nodes - 1
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        # the ranks of a job have to find each other before any of them is ready
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": labels},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata | {"labels": kubernetes.labels | labels},
        "spec": {
            **({"suspend": True} if stage.after else {}),
            "completionMode": "Indexed",
            "completions": pods,
            "parallelism": pods,
            "backoffLimit": kubernetes.restarts * pods,  # when one pod fails, the pods that work with it fail too
            "successPolicy": {"rules": [{"succeededIndexes": f"{start}-{end}" if start < end else str(end)}]},
            "template": {
                "metadata": {"labels": kubernetes.labels | labels, **annotations},
                "spec": _merged(_pod(launch, kubernetes, _commands(launch, kubernetes, first)), kubernetes.pod),
            },
        },
    }
    return [service, job]


def _starter(launch: LaunchConfig, kubernetes: KubernetesConfig, found: list[Stage]) -> list[dict[str, Any]]:
    """Return the Job that starts the stages, and an account that may read and start these stages and nothing else."""
    name_of = {stage.trainer: stage.launch.name for stage in found}
    needs = {stage.launch.name: [name_of[other] for other in stage.after] for stage in found}
    metadata = _metadata(f"{launch.name}-stages", kubernetes)
    name, group = metadata["name"], "rbac.authorization.k8s.io"
    rule = {
        "apiGroups": ["batch"],
        "resources": ["jobs"],
        "resourceNames": list(name_of.values()),
        "verbs": ["get", "patch"],
    }
    command = ["python", "-u", "-m", "nemo_eppo.launch.stage_starter", json.dumps(needs)]
    pod: dict[str, Any] = {
        "serviceAccountName": name,
        "restartPolicy": "Never",
        **{key: kubernetes.pod[key] for key in ("imagePullSecrets", "tolerations") if key in kubernetes.pod},
        "containers": [{"name": "starter", "image": kubernetes.image, "command": command}],
    }
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": metadata, "rules": [rule]},
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": kubernetes.namespace}],
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "backoffLimit": kubernetes.restarts,
                "template": {"metadata": {"labels": metadata["labels"]}, "spec": pod},
            },
        },
    ]


def _pod(launch: LaunchConfig, kubernetes: KubernetesConfig, commands: str) -> dict[str, Any]:
    gpus = next(iter(launch.jobs.values())).ranks_per_node
    memory = {"memory": kubernetes.memory} if kubernetes.memory else {}
    cpus = {"cpu": str(kubernetes.cpus)} if kubernetes.cpus else {}
    limits = {"nvidia.com/gpu": str(gpus), **memory, **{name: str(size) for name, size in kubernetes.resources.items()}}
    volumes = kubernetes.volumes.items()
    mounts: list[dict[str, Any]] = [{"name": claim, "mountPath": str(path)} for claim, path in volumes]
    secrets = []
    if launch.servers:
        mounts.append({"name": "certificates", "mountPath": str(_SECRET_MOUNT), "readOnly": True})
        secrets.append({"name": "certificates", "secret": {"secretName": kubernetes.secret}})
    shared_memory = {"emptyDir": {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}}
    return {
        "subdomain": launch.name,  # with the Service: pods are called NAME-INDEX.NAME
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        **({"nodeSelector": dict(kubernetes.node_selector)} if kubernetes.node_selector else {}),
        "containers": [
            {
                "name": "ranks",
                "image": kubernetes.image,
                "command": ["bash", "-c", commands],
                "resources": {"limits": limits, "requests": limits | cpus},
                "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts],
            }
        ],
        "volumes": [
            {"name": "shared-memory", **shared_memory},
            *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim, _ in volumes),
            *secrets,
        ],
    }


def _merged(base: Any, more: Any) -> Any:
    """Merge a specification into another, in which it wins; entries of a list of named mappings are found by name."""
    if isinstance(base, dict) and isinstance(more, dict):
        return base | {key: _merged(base[key], value) if key in base else value for key, value in more.items()}
    if (
        isinstance(base, list)
        and isinstance(more, list)
        and all(isinstance(x, dict) and "name" in x for x in base + more)
    ):
        by_name = _merged({entry["name"]: entry for entry in base}, {entry["name"]: entry for entry in more})
        return list(by_name.values())
    return more


def _commands(launch: LaunchConfig, kubernetes: KubernetesConfig, first: Mapping[str, int]) -> str:
    """Write the shell script of all pods; the pod's index decides which job it runs."""
    hosts = {name: f"{launch.name}-{index}.{launch.name}" for name, index in first.items()}
    addresses = served_at(launch, hosts, _CERTIFICATES)
    text = f"set -euo pipefail\n{_COPY if launch.servers else ''}case $JOB_COMPLETION_INDEX in\n"
    for name, index in first.items():
        job = launch.jobs[name]
        exports = " ".join(shlex.quote(f"{key}={value}") for key, value in environment(launch, name).items())
        rendezvous = ["--nnodes", str(job.nodes), "--master_addr", hosts[name], "--master_port", str(MASTER_PORT)]
        start = shlex.join(torchrun(job, rendezvous if job.nodes > 1 else (), kubernetes.python(job)))
        if job.nodes > 1:
            start += f' \\\n    --node_rank "$((JOB_COMPLETION_INDEX - {index}))"'
        arguments = [shlex.quote(override) for override in overrides(launch, name, addresses)]
        text += f"{'|'.join(str(index + node) for node in range(job.nodes))}) # {name}\n  export {exports}\n  exec "
        text += " \\\n    ".join([start, script(job, kubernetes.code), *arguments]) + "\n  ;;\n"
    return text + "esac\n"


class _Dumper(yaml.SafeDumper):
    """Writes scripts as block literals, and repeated parts in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
