"""Starts a Triton whose first helper hangs, `hanging_triton.py folder`; prints how ready it is in the end."""

import logging
import sys
from pathlib import Path

import pytriton.triton

from nemo_eppo.servers import frontend
from nemo_eppo.servers.protocol import STATUS
from nemo_eppo.servers.transport import Transport


def main(folder: Path) -> None:
    helper = pytriton.triton.get_stub_path(f"{sys.version_info.major}.{sys.version_info.minor}")
    script = folder / "helper"
    script.write_text(
        f"#!/bin/sh\nif mkdir {folder}/hung 2>/dev/null; then echo $$ > {folder}/hung/pid; exec sleep 600; fi\n"
        f'exec {helper} "$@"\n'
    )
    script.chmod(0o755)
    pytriton.triton.get_stub_path = lambda version: script
    frontend.START_TIMEOUT_S = 20.0
    logging.basicConfig(format="%(name)s: %(message)s")
    with frontend.Frontend({"status": STATUS}, lambda name, arrays: {}, "127.0.0.1", 0, None).running() as url:
        print(Transport(url, None).server_ready(timeout=30))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
