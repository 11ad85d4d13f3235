"""The `nemo-eppo` command. The commands import large packages only when they run, so that `--help` answers at once."""

import argparse
import atexit
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from nemo_eppo.config import ConfigError, RunError
from nemo_eppo.evaluation.detect_cli import add_detect
from nemo_eppo.evaluation.energy_report_cli import add_energy_report
from nemo_eppo.evaluation.evaluate_cli import add_evaluate
from nemo_eppo.evaluation.generate_cli import add_generate
from nemo_eppo.evaluation.judge_cli import add_judge
from nemo_eppo.evaluation.latents_cli import add_latents
from nemo_eppo.evaluation.report_cli import add_report
from nemo_eppo.evaluation.score_cli import add_score
from nemo_eppo.files import disk_trouble
from nemo_eppo.launch.certificates_cli import add_certificates
from nemo_eppo.launch.doctor_cli import add_doctor
from nemo_eppo.launch.launch_cli import add_launch
from nemo_eppo.tools.convert_cli import add_convert
from nemo_eppo.tools.prepare_cli import add_prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 130 after Ctrl-C, or 2 with one message on stderr for bad input."""
    atexit.register(gc.freeze)  # else Python looks for garbage in all imported modules, for more than a second
    logging.basicConfig(format="%(levelname)s: %(message)s")
    is_rank0 = os.environ.get("RANK", "0") == "0"  # other ranks of a command with --tp log warnings only
    logging.getLogger("nemo_eppo").setLevel(logging.INFO if is_rank0 else logging.WARNING)
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # KEY=VALUE after an option, which argparse does not take
        arguments.overrides += rest
    arguments.command_line = list(sys.argv[1:] if argv is None else argv)
    try:
        arguments.run(arguments)
    except (ConfigError, RunError, OSError) as error:
        trouble = disk_trouble(error, getattr(arguments, "output", None)) if isinstance(error, OSError) else None
        print(f"nemo-eppo: error: {trouble or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nemo-eppo: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of descriptions and shows every default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        shows_default = action.default is not False and action.default not in (None, [], ())  # 0 == False, but is shown
        return super()._get_help_string(action) if shows_default else action.help


class _Parser(argparse.ArgumentParser):
    """A parser with this formatter, which argparse also uses for the commands' parsers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, **settings)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="nemo-eppo",
        description="PPO at Megatron scale with an energy-loss penalty: everything around the training jobs.",
        epilog="Start with:  nemo-eppo prepare --help",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_prepare(commands)
    add_convert(commands)
    add_generate(commands)
    add_evaluate(commands)
    add_score(commands)
    add_energy_report(commands)
    add_detect(commands)
    add_judge(commands)
    add_latents(commands)
    add_report(commands)
    add_launch(commands)
    add_doctor(commands)
    add_certificates(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
