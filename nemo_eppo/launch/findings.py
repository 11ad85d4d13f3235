"""The findings of an examination, and a guard so that a failed check does not stop the others."""

import functools
from collections.abc import Callable, Iterator
from typing import Literal, ParamSpec

from nemo_eppo.config import Config, ConfigError

Status = Literal["ok", "warning", "error"]
P = ParamSpec("P")


class Finding(Config):
    """One line of the report."""

    check: str
    """What was examined; for a job, `NAME: ...`."""
    status: Status
    """An error stops a launch, a warning does not."""
    found: str
    """What was found."""
    mend: str = ""
    """What was expected, or what to do; empty if ok."""

    @property
    def fault(self) -> str:
        """What was found, after the name of the job."""
        job, about_a_job, _ = self.check.partition(": ")
        return f"jobs.{job}: {self.found}" if about_a_job else self.found


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, status="ok", found=found)


def warning(check: str, found: str, mend: str) -> Finding:
    return Finding(check=check, status="warning", found=found, mend=mend)


def error(check: str, found: str, mend: str) -> Finding:
    return Finding(check=check, status="error", found=found, mend=mend)


def guarded(check: str, examine: Callable[P, Iterator[Finding]]) -> Callable[P, list[Finding]]:
    """Wrap `examine` so that it returns a list, in which an exception is the last finding, an error of `check`."""

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
