"""The arguments of `nemo-eppo convert aligner-config`, the check of its output, and its report."""

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo_eppo.config import Config, ConfigError, load_config
from nemo_eppo.files import write_atomically
from nemo_eppo.tools.aligner_jobs import JOBS
from nemo_eppo.tools.aligner_rules import REQUIRED, Conversion

_ORDER = ("unknown", "conflict", "lost", "changed", "dropped", "default", "mapped")
_MEANING = {
    "unknown": "no keys of NeMo-Aligner",
    "conflict": "contradictions in the file",
    "lost": "CHANGE RESULTS: no counterpart",
    "changed": "mapped, with a difference",
    "dropped": "no counterpart, and no effect on results",
    "default": "not in the file: NeMo-Aligner's default was taken",
    "mapped": "the same here",
}


def add_aligner_config(ways: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = ways.add_parser(
        "aligner-config",
        help="translate a YAML file of NeMo-Aligner to the settings of a script of nemo_eppo",
        description="""\
Translate a settings file of NeMo-Aligner: its PPO actor, PPO critic, reward server, reward-model training or SFT.

Every key is mapped, or reported on standard error with the reason why not; interpolations are resolved; keys that the
file leaves out have NeMo-Aligner's defaults. The output starts with a list of things to do by hand; values to be filled
in are ???.""",
        epilog="""\
example:
  nemo-eppo convert aligner-config gpt_ppo_actor.yaml --output settings/actor.yaml
  cd examples/nlp/gpt && torchrun ... train_gpt_ppo_actor.py --config-dir $OLDPWD/settings --config-name actor""",
    )
    parser.add_argument("input", type=Path, metavar="FILE", help="YAML file of NeMo-Aligner to translate")
    parser.add_argument("--kind", choices=list(JOBS), help="job that the file is for (default: found by its keys)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="new file to write (default: standard output)")
    parser.add_argument("--strict", action="store_true", help="stop at a key that NeMo-Aligner does not have")
    parser.set_defaults(run=_aligner_config)


def _aligner_config(arguments: argparse.Namespace) -> None:
    from nemo_eppo.tools.aligner_config import as_yaml, convert

    if arguments.output is not None and arguments.output.exists():
        raise ConfigError(f"--output {arguments.output} exists already; nothing is ever overwritten")
    result = convert(arguments.input, arguments.kind)
    unknown = [row.key for row in result.rows if row.status == "unknown"]
    if arguments.strict and unknown:
        raise ConfigError(f"{arguments.input}: no keys of NeMo-Aligner: {', '.join(unknown)}")
    check(result)
    text = as_yaml(result, _header(result, arguments.input))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.output, text)
    else:
        print(text, end="")
    print(render_report(result, arguments.input), end="", file=sys.stderr)


def check(result: Conversion) -> Config:
    """Check the settings with the job's schema, with a placeholder for each value that the user has to fill in.

    Raises:
        ConfigError: the settings do not fit the schema.
    """
    from nemo_eppo.entry.settings import nested
    from nemo_eppo.settings.kinds import KINDS

    numbers = {"ppo.max_steps", "optimizer.decay_steps"}
    placeholders = {
        key: 10**6 if key in numbers else f"set-{key}" for key, value in result.values.items() if value == REQUIRED
    }
    try:
        return load_config(KINDS[JOBS[result.kind].script].schema, nested(result.values | placeholders))
    except ConfigError as error:
        raise ConfigError(f"the translated settings do not work together: {error}") from None


def _header(result: Conversion, source: Path) -> list[str]:
    get, script = result.source.get, f"{JOBS[result.kind].script}.py"
    ranks = f"--nnodes {get('trainer.num_nodes', 1)} --nproc_per_node {get('trainer.devices', 1)}"
    return [
        f"Settings of {script}, translated from {source.name} of NeMo-Aligner. Start it with",
        f"torchrun {ranks} {script} --config-dir DIRECTORY --config-name THIS_FILE",
        *(["method=eppo on the command line adds the energy-loss penalty"] if result.kind == "ppo-actor" else []),
    ]


def render_report(result: Conversion, source: Path) -> str:
    """Return, as text, the things to do by hand, and the status of every key, the worst first."""
    lines = [f"{source}: {result.kind}, {len(result.rows)} keys"]
    lines += ["", "to do by hand:", *(f"  - {line}" for line in result.todo)] if result.todo else []
    for status in _ORDER:
        rows = [row for row in result.rows if row.status == status]
        if rows:
            lines += ["", f"{status} ({_MEANING[status]}): {len(rows)}"]
        for row in rows:
            arrow = f" -> {row.target}" if row.target else ""
            note = f": {row.note}" if row.note and row.status != "default" else ""
            lines.append(f"  {row.key} = {_shown(row.value)}{arrow}{note}")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value if isinstance(value, str) and value.isprintable() else repr(value)
