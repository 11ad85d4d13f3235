"""What a launch file hands on to Slurm and Kubernetes, which clusters differ in."""

from typing import Any

import kubernetes_validate
import pytest
import yaml

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.launch.kubernetes import manifests
from nemo_eppo.launch.launch_file import LaunchConfig
from nemo_eppo.launch.slurm import batch_script

JOBS = {"actor": {"script": "train_gpt_ppo_actor", "nodes": 2, "ranks_per_node": 8}}


def launch(jobs: dict[str, Any] = JOBS, **backends: dict[str, Any]) -> LaunchConfig:
    kubernetes = {"image": "x", "volumes": {"data": "/data"}} | backends.get("kubernetes", {})
    slurm = {"image": "x"} | backends.get("slurm", {})
    values = {"name": "run", "output": "/data/out", "jobs": jobs, "kubernetes": kubernetes, "slurm": slurm}
    return load_config(LaunchConfig, values)


def options(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH --")}


def test_pods_get_the_clusters_network_devices_and_permissions() -> None:
    pod = {
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "schedulerName": "gang",
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
        "securityContext": {"fsGroup": 1000},
        "containers": [
            {
                "name": "ranks",
                "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
            },
            {"name": "monitor", "image": "dcgm"},
        ],
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }
    fields = {
        "resources": {"vpc.amazonaws.com/efa": 32, "hugepages-2Mi": "5120Mi"},
        "memory": "512Gi",
        "labels": {"kueue.x-k8s.io/queue-name": "gpus", "app.kubernetes.io/name": "other"},
        "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
        "pod": pod,
    }
    service, job = yaml.safe_load_all(manifests(launch(kubernetes=fields)))
    for manifest in (service, job):
        kubernetes_validate.validate(manifest, "1.33", strict=True)
    plain_service, plain_job = yaml.safe_load_all(manifests(launch()))
    assert service == plain_service
    template, plain = job["spec"]["template"], plain_job["spec"]["template"]
    queue = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert job["metadata"]["labels"] == plain_job["metadata"]["labels"] | queue
    assert template["metadata"]["labels"] == plain["metadata"]["labels"] | queue, "the service finds them by the others"
    assert template["metadata"]["annotations"] == {"k8s.v1.cni.cncf.io/networks": "rdma"}
    found, before = template["spec"], plain["spec"]
    for key in ("hostNetwork", "dnsPolicy", "schedulerName", "tolerations", "imagePullSecrets", "securityContext"):
        assert found[key] == pod[key]
    (ranks, monitor), [plain_ranks] = found["containers"], before["containers"]
    assert monitor == {"name": "monitor", "image": "dcgm"}
    assert ranks["command"] == plain_ranks["command"]
    assert ranks["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert ranks["volumeMounts"] == [*plain_ranks["volumeMounts"], {"name": "scratch", "mountPath": "/scratch"}]
    assert found["volumes"] == [*before["volumes"], {"name": "scratch", "emptyDir": {}}]
    asked = {"nvidia.com/gpu": "8", "memory": "512Gi", "vpc.amazonaws.com/efa": "32", "hugepages-2Mi": "5120Mi"}
    assert ranks["resources"] == {"limits": asked, "requests": asked}


def test_the_pod_that_starts_the_stages_can_pull_its_image_and_kueue_does_not_start_them_itself() -> None:
    stages = {"sft": {"script": "train_gpt_sft"}, "actor": {"script": "train_gpt_ppo_actor", "needs": ["sft"]}}
    pod = {"imagePullSecrets": [{"name": "registry"}], "securityContext": {"fsGroup": 1000}}
    *_, starter = yaml.safe_load_all(manifests(launch(stages, kubernetes={"pod": pod})))
    assert starter["spec"]["template"]["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    kubernetes_validate.validate(starter, "1.33", strict=True)
    with pytest.raises(ConfigError, match=r"= 'gpus': Kueue would start all of the stages sft, actor at once"):
        manifests(launch(stages, kubernetes={"labels": {"kueue.x-k8s.io/queue-name": "gpus"}}))


def test_slurm_is_asked_for_gpus_as_the_cluster_wants_it_and_for_cpus() -> None:
    assert {"gpus-per-node=8", "exclusive"} <= options(batch_script(launch()))
    sbatch = {"gpus-per-node": None, "gres": "gpu:8", "exclusive": None}
    script = batch_script(launch(slurm={"sbatch": sbatch, "cpus_per_rank": 12}))
    asked = options(script)
    assert {"gres=gpu:8", "nodes=2", "ntasks-per-node=8", "cpus-per-task=12"} <= asked
    assert not any(option.startswith(("gpus-per-node", "exclusive")) for option in asked)
    assert " --ntasks-per-node=8 --cpus-per-task=12 " in script
    own = {"actor": JOBS["actor"] | {"sbatch": {"gpus-per-node": "h100:8"}}}
    assert "gpus-per-node=h100:8" in options(batch_script(launch(own, slurm={"sbatch": {"gpus-per-node": None}})))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"kubernetes": {"resources": {"nvidia.com/gpu": 4}}},
            r"kubernetes: resources\.nvidia\.com/gpu = 4: expected the jobs' ranks_per_node instead",
        ),
        ({"kubernetes": {"pod": {"subdomain": "x"}}}, r"pod\.subdomain: the launcher writes it, expected no such key"),
        (
            {"kubernetes": {"pod": {"containers": [{"name": "ranks", "command": ["sh"]}]}}},
            r"pod\.containers\.ranks\.command: the launcher writes it",
        ),
        ({"kubernetes": {"pod": {"containers": [{"image": "x"}]}}}, "expected a list of mappings with a name each"),
        ({"slurm": {"sbatch": {"nodes": 4}}}, r"slurm\.sbatch.*nodes = 4: expected the job's nodes instead"),
        ({"slurm": {"cpus_per_rank": 0}}, r"slurm\.cpus_per_rank = 0"),
        ({"slurm": {"image": None}}, r"slurm: code: required without image, expected its path on the nodes"),
        (
            {"slurm": {"image": None, "code": "/x"}},
            r"slurm: server_python: required without image, expected its path on the nodes",
        ),
        (
            {"slurm": {"image": None, "code": "/x", "server_python": "python", "mounts": ["/a:/a"]}},
            r"slurm: mounts = \['/a:/a'\]: only containers have them, expected image too",
        ),
    ],
)
def test_what_a_run_relies_on_is_not_handed_on(where: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(**where)
