"""`nemo-eppo certificates`: its arguments and its help."""

import argparse
from pathlib import Path

_DESCRIPTION = """\
Make the certificates by which the servers and clients of a run recognise each other (mutual TLS).

`nemo-eppo launch` makes them by itself, except for Kubernetes. Every job that is started by hand gets the folder: as
server.certificates, critic.server.certificates, and in each rewards[].server. Keep it as you would keep a password."""

_EPILOG = """\
examples:
  nemo-eppo certificates certificates
  kubectl create secret generic nemo-eppo-certificates --from-file=certificates"""


def add_certificates(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "certificates",
        help="make the certificates of a run whose jobs are started by hand or in Kubernetes",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where ca.pem, cert.pem and key.pem are written")
    parser.set_defaults(run=_certificates)


def _certificates(arguments: argparse.Namespace) -> None:
    from nemo_eppo.config import ConfigError
    from nemo_eppo.servers.certificates import create

    if arguments.folder.exists():
        raise ConfigError(f"{arguments.folder} exists already: expected a folder to be made")
    create(arguments.folder)
    print(f"wrote ca.pem, cert.pem and key.pem to {arguments.folder}")
