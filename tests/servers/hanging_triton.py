"""Starts a Triton whose first helper hangs, `hanging_triton.py folder`; prints how ready it is in the end."""

import logging
import sys
import urllib.request
from pathlib import Path

import pytriton.client.client
import pytriton.triton

from nemo_eppo.servers.frontend import Frontend
from nemo_eppo.servers.protocol import STATUS


def main(folder: Path) -> None:
    helper = pytriton.triton.get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}")
    script = folder / "helper"
    script.write_text(
        f"#!/bin/sh\nif mkdir {folder}/hung 2>/dev/null; then echo $$ > {folder}/hung/pid; exec sleep 600; fi\n"
        f'exec {helper} "$@"\n'
    )
    script.chmod(0o755)
    pytriton.triton.get_stub_path = lambda version: script
    pytriton.client.client.DEFAULT_INFERENCE_TIMEOUT_S = 15.0  # the time that an endpoint has to be loaded; else 60 s
    logging.basicConfig(format="%(name)s: %(message)s")
    with (
        Frontend({"status": STATUS}, lambda name, arrays: {}, "127.0.0.1", 0).running() as url,
        urllib.request.urlopen(f"{url}/v2/health/ready", timeout=30) as ready,
    ):
        print(ready.status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
