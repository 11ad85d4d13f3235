"""Gives each job its own GPUs of this machine, so that jobs which run together do not share one."""

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.launch_file import JobConfig, LaunchConfig
from nemo_eppo.machine import VISIBLE, visible_gpus


class Gpus:
    """Hands out GPUs; it does nothing if there are none, or for jobs with CUDA_VISIBLE_DEVICES in the launch file.

    Args:
        visible: identifiers of the machine's GPUs.

    Raises:
        ConfigError: jobs that run at the same time have more ranks than there are GPUs.
    """

    def __init__(self, launch: LaunchConfig, visible: list[str]) -> None:
        self._free = visible
        self._managed = {
            name
            for name, job in launch.jobs.items()
            if visible and VISIBLE not in launch.environment and VISIBLE not in job.environment
        }
        self._held: dict[str, list[str]] = {}
        servers = self._managed.intersection(launch.servers)

        def needed_by(server: str) -> set[str]:
            return {other for other, job in launch.jobs.items() if server in job.needs}

        for name in self._managed:
            # servers start early and stay as long as jobs need them: all but the servers that wait for this job, and
            # those that only earlier jobs need, may run beside it
            before = launch.before(name)
            over = {server for server in servers if (by := needed_by(server)) and by <= before}
            beside = {server for server in servers - over if name not in launch.before(server)} | {name}
            ranks = sum(launch.jobs[job].ranks for job in beside)
            if ranks > len(visible):
                raise ConfigError(
                    f"jobs.{name}.ranks_per_node: {', '.join(sorted(beside))} run together on {ranks} ranks, but "
                    f"there are {len(visible)} GPUs; set {VISIBLE} in `environment` to share them"
                )

    def take(self, name: str, job: JobConfig) -> dict[str, str] | None:
        """Return environment variables that give a job its GPUs; None if too few are free yet."""
        if name not in self._managed:
            return {}
        if job.ranks > len(self._free):
            return None
        self._held[name], self._free = self._free[: job.ranks], self._free[job.ranks :]
        return {VISIBLE: ",".join(self._held[name])}

    def give_back(self, name: str) -> None:
        """Take back the GPUs of a job that has ended."""
        self._free = self._free + self._held.pop(name, [])


def on_gpus(launch: LaunchConfig, name: str) -> bool:
    """Tell whether a job that runs on this machine does so on GPUs, which the launch may hide from it."""
    environment = launch.environment | launch.jobs[name].environment
    return bool(visible_gpus()) and environment.get(VISIBLE) != ""
