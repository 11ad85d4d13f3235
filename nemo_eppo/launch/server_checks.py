"""Checks that running critic and reward servers answer and fit the actor."""

from collections.abc import Iterator
from pathlib import Path

from nemo_eppo.config import load_config
from nemo_eppo.launch.findings import Finding, error, ok
from nemo_eppo.launch.job import Job
from nemo_eppo.servers.client import ServerClient
from nemo_eppo.servers.protocol import PROTOCOL_VERSION
from nemo_eppo.servers.transport import ServerError
from nemo_eppo.settings.servers import ClientConfig


def examine_server(url: str, certificates: Path | None, actor: Job | None = None) -> Iterator[Finding]:
    """Compare a server's status with what the actor needs."""
    check = f"server {url}"
    client = ServerClient("server", load_config(ClientConfig, {"url": url, "certificates": certificates}))
    try:
        status = client.status()
    except ServerError as fault:
        yield error(check, str(fault), "start it, or give the folder of its certificates: --certificates FOLDER")
        return
    finally:
        client.close()
    if status["protocol"] != PROTOCOL_VERSION:
        yield error(
            check, f"protocol {status['protocol']}", f"expected {PROTOCOL_VERSION}: the same version on both sides"
        )
        return
    window = status["max_sequence_length"]
    yield ok(
        check,
        f"{status['job']}, protocol {status['protocol']}, {status['step']} updates, up to {window} tokens a sequence, "
        f"{status['vocab_size']} in the vocabulary",
    )
    if actor is None:
        return
    if actor.longest > window:
        yield error(check, f"takes {window} tokens, the actor sends {actor.longest}", "lower the actor's lengths")
    if actor.plan is not None and status["tokenizer"] != actor.plan.tokenizer.digest:
        yield error(check, "another tokenizer than the actor's", "serve a model of the same family")
