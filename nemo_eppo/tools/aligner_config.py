"""Translates NeMo-Aligner's YAML files into settings of our jobs; every key is mapped, or reported with a reason."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_eppo.config import ConfigError, flat, yaml_fault
from nemo_eppo.entry.settings import nested
from nemo_eppo.tools.aligner_jobs import JOBS
from nemo_eppo.tools.aligner_rules import REQUIRED, Changed, Conversion, Row, Rule
from nemo_eppo.tools.aligner_shared_keys import Rules

# NeMo-Aligner registers these interpolations for its files
_RESOLVERS = {
    "multiply": lambda x, y: x * y,
    "int_div": lambda x, y: x // y,
    "subtract": lambda x, y: x - y,
    "add": lambda *numbers: sum(numbers),
}
_SECTIONS = (
    "exp_manager",
    "seed",
    "model",
    "reward_model",
    "data",
    "generation",
    "ppo",
    "critic",
    "reward",
    "fit",
    "sft",
)
_FOREIGN = ("dpo", "kto", "spin", "rs", "reinforce", "generation", "knowledge_distillation", "self_rewarding", "grpo")


def convert(path: Path, kind: str | None = None) -> Conversion:
    """Translate a YAML file of NeMo-Aligner.

    Args:
        path: the file.
        kind: a key of JOBS; None to recognise it by the file's keys.

    Raises:
        ConfigError: the file cannot be read, is of no known kind, or has a value that cannot be translated.
    """
    leaves = read(path)
    kind = kind or kind_of(leaves, path)
    rules = JOBS[kind].rules
    defaults = {key: rule.default for key, rule in rules.items() if rule.default is not None and key not in leaves}
    result = Conversion(kind, defaults | leaves)
    for key, value in leaves.items():
        _apply(key, value, _rule(rules, key), result)
    for key, value in defaults.items():
        rule = rules[key]
        if not rule.joint:
            _put(key, value, rule, result)
        result.rows.append(Row(key, value, "default", rule.target, "NeMo-Aligner's default"))
    try:
        JOBS[kind].joint(result)
    except ConfigError:
        raise
    except KeyError as error:
        raise ConfigError(f"{path}: null where a value is needed, for {error}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: a value of another type than NeMo-Aligner has there: {error}") from None
    return result


def read(path: Path) -> dict[str, Any]:
    """Read a file as {dotted key: value}; interpolations are resolved where that is possible."""
    for name, function in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    try:
        loaded = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(yaml_fault(error, path)) from None
    except (OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected keys and values, found a list")
    return {key: _resolved(loaded, key, value) for key, value in flat(OmegaConf.to_container(loaded))}


def _resolved(config: DictConfig, key: str, value: Any) -> Any:
    if value == REQUIRED:
        return value
    try:
        resolved = OmegaConf.select(config, key)
        return OmegaConf.to_container(resolved, resolve=True) if OmegaConf.is_config(resolved) else resolved
    except (OmegaConfBaseException, TypeError):
        return value


def kind_of(leaves: Mapping[str, Any], path: Path) -> str:
    """Return the key of JOBS for a file's keys; ConfigError if it is of another kind."""

    def has(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in leaves)

    for name, job in JOBS.items():
        if has(*job.marks):
            return name
    other = next((f"it looks like one for {name}" for name in _FOREIGN if has(f"trainer.{name}.")), "")
    raise ConfigError(
        f"{path}: not recognised as a file of NeMo-Aligner's PPO actor, PPO critic, reward server, reward-model "
        f"training or SFT{', ' + other if other else ''}; --kind says which it is"
    )


def _rule(rules: Rules, key: str) -> Rule | None:
    if key in rules:
        return rules[key]
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) + ".*" for length in range(len(parts), 0, -1))
    return next((rules[prefix] for prefix in prefixes if prefix in rules), None)


def _apply(key: str, value: Any, rule: Rule | None, result: Conversion) -> None:
    if rule is not None and rule.target and isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key} = {value!r}: refers to a key or variable that neither file nor environment has")
    if rule is None:
        row = Row(key, value, "unknown", note="no key of NeMo-Aligner's files: nothing was done with it")
    elif rule.joint:
        row = Row(key, value, "mapped" if rule.target else "dropped", rule.target, rule.note)
    elif rule.target:
        row = _put(key, value, rule, result)
    elif rule.harmless is None or any(value == harmless for harmless in rule.harmless):
        row = Row(key, value, "dropped", note=rule.note)
    else:
        row = Row(key, value, "lost", note=rule.note)
    result.rows.append(row)


def _put(key: str, value: Any, rule: Rule, result: Conversion) -> Row:
    if value is None and rule.convert is None:
        return Row(key, value, "mapped", rule.target, "null: our default")
    try:
        result.put(rule.target, rule.convert(value) if rule.convert else value)
    except Changed as changed:
        result.put(rule.target, changed.value, str(changed))
        return Row(key, value, "changed", rule.target, str(changed))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{key} = {value!r}: {error}") from None
    return Row(key, value, "mapped", rule.target, rule.note)


def as_yaml(result: Conversion, header: list[str]) -> str:
    """Return the settings as YAML with their remarks, after `header` and the things to do by hand."""
    lines = [f"# {line}" for line in header]
    lines += [f"# TO DO: {line}" for line in result.todo]
    if result.kind == "ppo-actor":
        lines += ["defaults:", "  - _self_", "  - method: ppo"]
    tree = nested(result.values)
    ordered = {name: tree[name] for name in (*_SECTIONS, *tree) if name in tree}
    return "\n".join([*lines, *_dump(ordered, result.notes, "", "")]) + "\n"


def _dump(node: Mapping[str, Any], notes: Mapping[str, str], prefix: str, indent: str) -> Iterator[str]:
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key in notes:
            yield f"{indent}# {notes[key]}"
        if isinstance(value, dict) and value and not key.endswith("_kwargs"):
            yield f"{indent}{name}:"
            yield from _dump(value, notes, f"{key}.", indent + "  ")
        else:
            text = yaml.safe_dump({name: value}, sort_keys=False, width=1000, allow_unicode=True)
            yield from (indent + line for line in text.splitlines())
