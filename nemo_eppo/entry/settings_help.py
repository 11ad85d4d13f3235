"""The text of `--help`: what a job does, and every setting with its value and its meaning."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nemo_eppo.config import Config, config_types

_USAGE = """\
usage: python {script} [KEY=VALUE ...] [--config-path DIR] [--config-name NAME] [--config-dir DIR] [--cfg job] [--help]

{about}

Any setting below can be given as KEY=VALUE. Examples:
  python {script} exp_manager.explicit_log_dir=runs/first
  torchrun --nproc-per-node 2 {script} exp_manager.explicit_log_dir=runs/second
  python {script} 'KEY=[a, b]' KEY=null                      a list, quoted for the shell; no value
  python {script} "KEY='a, b = c'"                           a text with signs that settings have a use for
  python {script} --config-dir settings --config-name mine   your own settings/mine.yaml; your files win over ours
  python {script} --cfg job                                  check the settings, print them and stop

Settings, with the values they have now (YAML file and command line; otherwise their defaults):
"""


def settings_help(script: str, about: str, schema: type[Config], values: Mapping[str, Any], width: int) -> str:
    """Describe a job's command line.

    Args:
        script: file name of the job's script.
        about: docstring of the script.
        schema: declares every key of the job.
        values: the settings from YAML file and command line, as plain nested containers.
        width: columns of the terminal.
    """
    usage = _USAGE.format(script=script, about=about)
    return usage + "\n".join(_section(schema, values, "", max(width, 60)))


def _section(schema: type[Config], values: Mapping[str, Any], path: str, width: int) -> Iterator[str]:
    # a section's own keys come first, so that every key stands under the title of its section
    subsections = []
    for name, field in schema.model_fields.items():
        value = values[name] if name in values else _default(field)
        if nested := config_types(field.annotation):
            subsections += [(kind, name, field, value) for kind in nested]
            if not isinstance(value, Mapping):
                yield from _setting(path + name, value, field, width)
        else:
            yield from _setting(path + name, value, field, width)
    for kind, name, field, value in subsections:
        inner = f"{path}{name}{_item(field.annotation)}."
        yield ""
        yield from _paragraph(f"[{inner[:-1]}] {_about(kind)}", "", width)
        yield from _section(kind, value if isinstance(value, Mapping) else {}, inner, width)


def _setting(key: str, value: Any, field: FieldInfo, width: int) -> Iterator[str]:
    yield f"  {key} = {_text(value)}"
    meaning = (field.description or "").replace("\n", " ")
    choices = _choices(field.annotation)
    yield from _paragraph(f"{meaning} One of: {', '.join(choices)}." if choices else meaning, "      ", width)


def _paragraph(text: str, indent: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, initial_indent=indent, subsequent_indent=indent or "    ")


def _about(kind: type[Config]) -> str:
    return (kind.__doc__ or "").split("\n\n")[0]


def _default(field: FieldInfo) -> Any:
    default = field.get_default(call_default_factory=True, validated_data={})
    return default.model_dump(mode="json") if isinstance(default, Config) else default


def _text(value: Any) -> str:
    if value is PydanticUndefined or value == "???":
        return "(required)"
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _item(annotation: Any) -> str:
    # the part of a key that stands for one item of a list or of a mapping of sections
    kinds = {get_origin(part) for part in (annotation, *get_args(annotation))}
    return ".<name>" if dict in kinds else ".<number>" if kinds & {list, tuple} else ""
