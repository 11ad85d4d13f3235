"""The entry of every job script: settings from YAML and command line, run directory, logs, readable errors.

Global rank 0 goes through NeMo's `hydra_runner` and `exp_manager`. Importing NeMo costs 6 s and 240 MB a process, so
the other ranks compose the same settings with Hydra alone. Settings are checked before anything expensive is imported.
"""

import argparse
import contextlib
import functools
import inspect
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_eppo.config import Config, ConfigError, ConfigT, load_config
from nemo_eppo.entry.settings_help import settings_help
from nemo_eppo.files import write_atomically
from nemo_eppo.observability.metrics import MetricsSink
from nemo_eppo.observability.run import ExpManagerConfig, Run

_HEADER = "# settings of {}"  # first line of config.yaml: whose run directory it is
_PATIENCE = 5.0  # seconds that ranks other than 0 hold their message back: the launcher ends them when rank 0 has told


def job(
    schema: type[ConfigT], config_name: str, config_path: str = "../../../conf"
) -> Callable[[Callable[[ConfigT, Run], None]], Callable[[], None]]:
    """Turn `main(config, run)` of a script into its command line.

    A ConfigError, here or anywhere in `main`, ends the process with its message alone and exit status 2.

    Args:
        schema: every key that the job has; one of them is `exp_manager: ExpManagerConfig`.
        config_name: the YAML file with the job's values, without its ending.
        config_path: its directory, relative to the script.
    """
    if "exp_manager" not in schema.model_fields:
        raise TypeError(f"{schema.__name__} needs a field exp_manager: ExpManagerConfig")

    def decorate(main: Callable[[ConfigT, Run], None]) -> Callable[[], None]:
        script = Path(inspect.getfile(main)).resolve()

        @functools.wraps(main)
        def entry() -> None:
            rank = int(os.environ.get("RANK", "0"))
            with _config_errors_end_the_job(rank):
                arguments = _parse(script, config_name, config_path)
                composed = _compose(arguments.config_path, arguments.config_name, arguments.overrides)
                if arguments.help:
                    about = inspect.getdoc(sys.modules[main.__module__]) or ""
                    width = shutil.get_terminal_size().columns
                    print(settings_help(script.name, about, schema, _plain(composed), width))
                    return
                config = _check(schema, composed)
                if arguments.cfg:
                    print(_as_yaml(config), end="")
                elif rank == 0:
                    _refuse_foreign_run(_settings(config), script.name)
                    _run_through_nemo(schema, main, arguments, script.name)
                else:
                    main(config, _open_run(config, rank, script.name))

        return entry

    return decorate


@contextlib.contextmanager
def _config_errors_end_the_job(rank: int) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        if rank:  # most errors are the same on every rank, and one message is enough
            time.sleep(_PATIENCE)
        print(f"rank {rank}: {error}" if rank else error, file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _parse(script: Path, config_name: str, config_path: str) -> argparse.Namespace:
    # the part of Hydra's own command line that makes sense for a job of several processes
    parser = argparse.ArgumentParser(script.name, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-path", "-cp", default=config_path)
    parser.add_argument("--config-name", "-cn", default=config_name)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--help", "-h", action="store_true")
    arguments = parser.parse_intermixed_args()
    arguments.config_name = arguments.config_name.removesuffix(".yaml")
    directories = [(script.parent / arguments.config_path).resolve()]
    if arguments.config_dir:
        directories.append(Path(arguments.config_dir).resolve())
        # Hydra searches the second directory for parts of the configuration only, not for the file itself
        directories.sort(key=lambda directory: not (directory / f"{arguments.config_name}.yaml").exists())
    arguments.config_path = directories[0]
    arguments.overrides = [_force(override, directories) for override in arguments.overrides]
    arguments.overrides += [f"hydra.searchpath=['file://{directory}']" for directory in directories[1:]]
    return arguments


def _force(override: str, config_directories: list[Path]) -> str:
    # `key=value` may also set a key that the YAML file leaves out; whether there is such a key, the schema tells better
    key = override.partition("=")[0]
    if not key[:1].isalpha() or key.startswith("hydra.") or "=" not in override:
        return override
    is_group = any((directory / key.partition("@")[0]).is_dir() for directory in config_directories)
    return override if is_group else f"++{override}"


def _compose(directory: Path, name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(directory), version_base="1.3"):
            return compose(name, list(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        raise ConfigError(f"cannot read the settings {directory / name}.yaml: {error}{cause}") from None


def read_settings(schema: type[ConfigT], directory: Path, name: str, overrides: Sequence[str]) -> ConfigT:
    """The checked settings of a job that is started with these `key=value` arguments.

    Args:
        directory: holds the YAML file `name` (without its ending).

    Raises:
        ConfigError: as the job itself would report it.
    """
    return _check(schema, _compose(directory, name, [_force(override, [directory]) for override in overrides]))


def _plain(composed: DictConfig) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(composed))


def _check(schema: type[ConfigT], composed: DictConfig) -> ConfigT:
    try:
        missing = OmegaConf.missing_keys(composed)
        OmegaConf.resolve(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error.msg).splitlines()[0]}") from None
    if not missing:
        return load_config(schema, _plain(composed))
    message = "required, but not set (??? in the YAML file): " + ", ".join(sorted(missing))
    try:  # tell of wrong keys in the same breath: a misspelt one is often the very one that is missing
        load_config(schema, _set_only(_plain(composed)))
    except ConfigError as error:
        message = f"{error}\n{message}"
    raise ConfigError(message)


def _set_only(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _set_only(value) if isinstance(value, dict) else value for key, value in values.items() if value != "???"
    }


def _as_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _run_through_nemo(
    schema: type[ConfigT], main: Callable[[ConfigT, Run], None], arguments: argparse.Namespace, script: str
) -> None:
    def start(composed: DictConfig) -> None:
        logging.getLogger().handlers.clear()  # Hydra's, which would print every library's INFO lines
        with _config_errors_end_the_job(rank=0):  # before Hydra makes a stack trace of it
            config = _check(schema, composed)
            main(config, _open_run(config, 0, script))

    from nemo_eppo.megatron import device

    device.install()  # before NeMo imports megatron-core
    # NVIDIA's OneLogger, which comes with NeMo, tells on the console that it is not in use
    logging.getLogger("nv_one_logger").addHandler(logging.NullHandler())
    from nemo.core.config import hydra_runner

    sys.argv[1:] = [
        *("--config-path", str(arguments.config_path), "--config-name", arguments.config_name),
        *arguments.overrides,
    ]
    hydra_runner()(start)()


def _settings(config: Config) -> ExpManagerConfig:
    return cast(ExpManagerConfig, config.exp_manager)  # type: ignore[attr-defined]  # job() has seen to it


def _refuse_foreign_run(settings: ExpManagerConfig, script: str) -> None:
    file = settings.directory / "config.yaml"
    if not file.exists():
        return
    another = "choose another exp_manager.explicit_log_dir, name or version"
    if not settings.resume_if_exists:
        raise ConfigError(
            f"{settings.directory} holds a run already and exp_manager.resume_if_exists = false: set it to true to go "
            f"on with that run, or {another}"
        )
    first_line = file.read_text().partition("\n")[0]
    if first_line != _HEADER.format(script):
        raise ConfigError(f"{settings.directory} is the run directory of another job ({first_line[2:]}): {another}")


def _open_run(config: Config, rank: int, script: str) -> Run:
    settings = _settings(config)
    directory, wandb = settings.directory, None
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        wandb = _start_exp_manager(settings)
        write_atomically(directory / "config.yaml", f"{_HEADER.format(script)}\n{_as_yaml(config)}")
    return Run(directory, rank, _logger(directory, rank), settings, wandb)


def _start_exp_manager(settings: ExpManagerConfig) -> MetricsSink | None:
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager

    nemo_logging.remove_stream_handlers()  # its messages go to files
    lightning_logger = logging.getLogger("lightning.pytorch")
    lightning_logger.handlers = [h for h in lightning_logger.handlers if type(h) is not logging.StreamHandler]
    # exp_manager wants a trainer to hang loggers on; an explicit environment keeps it from asking Slurm or torchrun
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=1,
        logger=False,
        enable_checkpointing=False,
        plugins=[LightningEnvironment()],
    )
    exp_manager(
        trainer,
        {
            # At every start exp_manager moves all files of its directory out of the way: it gets one of its own.
            "explicit_log_dir": str(settings.directory / "nemo"),
            # MetricsLogger writes TensorBoard: NeMo's writer cannot drop the steps after the checkpoint on a resume.
            "create_tensorboard_logger": False,
            "create_wandb_logger": settings.create_wandb_logger,
            "wandb_logger_kwargs": settings.wandb_logger_kwargs,
            "create_checkpoint_callback": False,
            "log_step_timing": False,
            "log_global_rank_0_only": True,
        },
    )
    return trainer.logger


class _ConsoleHandler(logging.Handler):
    """Writes to what is standard error now: a progress bar replaces it while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _logger(directory: Path, rank: int) -> logging.Logger:
    logger = logging.getLogger("nemo_eppo")
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.handlers = [_ConsoleHandler()]
    if rank == 0:
        logger.addHandler(logging.FileHandler(directory / "log.txt"))
    origin = "" if rank == 0 else f"rank {rank}: "
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(f"%(asctime)s {origin}%(message)s", "%H:%M:%S"))
    return logger
