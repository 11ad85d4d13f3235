"""What an examination finds, and how one check is kept from hiding the others."""

import functools
from collections.abc import Callable, Iterator
from typing import Literal, ParamSpec

from nemo_eppo.config import Config, ConfigError

Status = Literal["ok", "warning", "error"]
P = ParamSpec("P")


class Finding(Config):
    """One line of the report."""

    check: str
    """What was looked at; for a job, `NAME: ...`."""
    status: Status
    found: str
    mend: str = ""
    """What was expected, or what to do."""

    @property
    def fault(self) -> str:
        """What was found, with the job that it is about in front."""
        job, about_a_job, _ = self.check.partition(": ")
        return f"jobs.{job}: {self.found}" if about_a_job else self.found


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, mend: str) -> Finding:
    return Finding(check=check, status="warning", found=found, mend=mend)


def error(check: str, found: str, mend: str) -> Finding:
    return Finding(check=check, status="error", found=found, mend=mend)


def guarded(check: str, examine: Callable[P, Iterator[Finding]]) -> Callable[P, list[Finding]]:
    """`examine`, with whatever it raises as a finding under the name `check` after those it had made."""

    @functools.wraps(examine)
    def run(*args: P.args, **kwargs: P.kwargs) -> list[Finding]:
        findings = []
        try:
            for finding in examine(*args, **kwargs):
                findings.append(finding)  # noqa: PERF402  # one by one: what came before an exception stays
        except ConfigError as fault:
            findings.append(error(check, str(fault), "see the message"))
        except Exception as fault:  # a check that breaks says so; it must not keep others from running
            findings.append(error(check, f"{type(fault).__name__}: {fault}", "this could not be examined"))
        return findings

    return run
