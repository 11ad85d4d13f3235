"""The settings of a job: Hydra composes them from YAML files and the command line, and the job's schema checks them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_eppo.config import Config, ConfigError, ConfigT, flat, load_config, yaml_fault


@dataclass(frozen=True)
class Source:
    """Where the settings of a job come from."""

    name: str
    """The YAML file, without its ending."""
    directories: Sequence[Path]
    """Directories that may hold this file and the files that it names; the first that has a file is taken."""
    overrides: Sequence[str]
    """The `key=value` arguments of the command line."""

    def compose(self) -> DictConfig:
        """Return the settings as Hydra composes them.

        Raises:
            ConfigError: a file or an argument cannot be read, or a key is given twice.
        """
        for directory in self.directories:
            if not directory.is_dir():
                raise ConfigError(
                    f"cannot read the settings {directory / self.name}.yaml: Primary config directory not found"
                )
        files = [directory / f"{self.name}.yaml" for directory in self.directories]
        if not any(map(Path.is_file, files)):  # Hydra would list its search path
            what = "is a directory, expected a file" if files[0].is_dir() else "no such file"
            raise ConfigError(f"cannot read the settings {files[0]}: {what}")
        first, *others = self.directories
        _OtherDirectories.directories = others
        Plugins.instance().register(_OtherDirectories)
        try:
            with initialize_config_dir(str(first), version_base="1.3"):
                return compose(self.name, self.hydra_overrides())
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
            file = next(filter(Path.is_file, files))
            if isinstance(error, yaml.YAMLError | UnicodeDecodeError):
                raise ConfigError(yaml_fault(error, file)) from None
            cause = f": {error.__cause__}" if error.__cause__ else ""
            reason = " ".join(str(error).partition("Config search path:")[0].split())
            raise ConfigError(f"cannot read the settings {file}: {reason}{cause}") from None

    def hydra_overrides(self) -> list[str]:
        """Return the overrides as Hydra needs them to set keys that the YAML file leaves out.

        The schema checks whether such a key exists; its message is better than Hydra's.
        """
        first: dict[str, str] = {}
        forced = []
        parser = OverridesParser.create()
        for given in self.overrides:
            if not given.partition("=")[0] or ("=" not in given and not given.startswith("~")):
                raise ConfigError(f"{given}: expected KEY=VALUE")
            try:
                override = parser.parse_override(given)
            except HydraException as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"{given}: expected KEY=VALUE; quote a value with signs of its own as \"KEY='VALUE'\" ({reason})"
                ) from None
            if override.is_sweep_override():
                raise ConfigError(f"{given}: expected one value; a list is {given.partition('=')[0]}=[A,B]")
            text, key = str(override.input_line), override.key_or_group
            if (earlier := first.setdefault(f"{key}@{override.package}", text)) is not text:
                raise ConfigError(f"{key} is given twice on the command line: {earlier} and {text}")
            chooses_file = key.startswith("hydra") or any((directory / key).is_dir() for directory in self.directories)
            changes = override.type is OverrideType.CHANGE
            if changes and chooses_file and not key.startswith("hydra") and not isinstance(override.value(), str):
                raise ConfigError(f"{given}: expected {key}=NAME, the name of a file in conf/{key}")
            force = changes and not chooses_file
            forced.append(f"++{text}" if force else text)
        return forced


class _OtherDirectories(SearchPathPlugin):
    """Tells Hydra, which composes from one directory, of the other directories, some with files of the same names."""

    directories: ClassVar[Sequence[Path]] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in self.directories:
            search_path.append("nemo_eppo", f"file://{directory}")


def read_settings(
    schema: type[ConfigT], directory: Path, name: str, overrides: Sequence[str], *, gpus: bool | None = None
) -> ConfigT:
    """Return the checked settings of a job that is started with these `key=value` arguments.

    Args:
        directory: holds the YAML file `name` (without its ending).
        gpus: whether it will run on GPUs; None if on this machine.

    Raises:
        ConfigError: as the job itself would report it.
    """
    return check(schema, Source(name, [directory], overrides).compose(), gpus)


def check(schema: type[ConfigT], composed: DictConfig, gpus: bool | None = None) -> ConfigT:
    """Return composed settings as an object of the schema; see `read_settings` for `gpus`.

    Raises:
        ConfigError: one line for each key that is missing, unknown or has a wrong value.
    """
    try:
        missing = OmegaConf.missing_keys(composed)
        OmegaConf.resolve(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    if not missing:
        return load_config(schema, plain(composed), gpus=gpus)
    message = ""
    try:  # report wrong keys in the same message: a misspelt key is often the one that is missing
        load_config(schema, _set_only(plain(composed)))
    except ConfigError as error:
        message = f"{error}\n"
    if left := [key for key in sorted(missing) if f"{key}: required" not in message]:
        message += f"required, but not set (??? in the YAML file): {', '.join(left)}"
    raise ConfigError(message.rstrip("\n"))


def plain(composed: DictConfig) -> dict[str, Any]:
    """Return composed settings as nested dicts and lists; `???` stands for a value that is required and not set."""
    return cast(dict[str, Any], OmegaConf.to_container(composed))


def nested(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Replace dotted keys by nested mappings, so that overrides find them.

    Raises:
        ConfigError: a key is given twice; the message has it after `where`.
    """
    keys = [key for key, _ in flat(settings)]
    for key in keys:
        if keys.count(key) > 1 or any(other.startswith(f"{key}.") for other in keys):
            raise ConfigError(f"{where}{key} is given twice")
    result = OmegaConf.create({})
    for key, value in settings.items():
        OmegaConf.update(result, str(key), nested(value) if isinstance(value, dict) else value, force_add=True)
    return plain(result)


def as_yaml(config: Config) -> str:
    """Return settings as the text of a YAML file that holds every key."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _set_only(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _set_only(value) if isinstance(value, dict) else value for key, value in values.items() if value != "???"
    }
