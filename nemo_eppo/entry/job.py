"""The entry of every job script: it turns a function into a command with settings, a run directory, logs and errors.

Global rank 0 runs through NeMo's `hydra_runner` and `exp_manager`. Importing NeMo costs 6 s and 240 MB a process, so
the other ranks compose the same settings with Hydra alone. Settings are checked before anything expensive is imported.
"""

import argparse
import contextlib
import datetime
import functools
import gc
import importlib.metadata
import inspect
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nemo_eppo.config import NOT_FINISHED, Config, ConfigError, ConfigT, RunError, RunStopped
from nemo_eppo.entry.changes import check_changes
from nemo_eppo.entry.settings import Source, as_yaml, check, plain
from nemo_eppo.entry.settings_help import settings_help
from nemo_eppo.entry.torchrun import end_with_torchrun
from nemo_eppo.files import disk_trouble, write_atomically
from nemo_eppo.observability.metrics import MetricsSink
from nemo_eppo.observability.report_tables import START, VERSIONS
from nemo_eppo.observability.run import Run, hold, run_id
from nemo_eppo.settings.run import ExpManagerConfig

_HEADER = "# settings of {}"  # first line of config.yaml; it tells which script a run directory belongs to
_LAST_S = 1.0  # seconds by which rank 0 of an unfinished run ends after the others
_PATIENCE = 5.0  # seconds that other ranks hold their message back: the launcher ends them when rank 0 has ended


def job(
    schema: type[ConfigT], config_name: str, config_path: str = "../../../conf"
) -> Callable[[Callable[[ConfigT, Run], None]], Callable[[], None]]:
    """Turn `main(config, run)` of a script into its command line.

    Errors that are expected end the process with their message alone, see `errors_end_the_job`.

    Args:
        schema: every key that the job has; one of them is `exp_manager: ExpManagerConfig`.
        config_name: the YAML file with the job's values, without its ending.
        config_path: its directory, relative to the script.

    Raises:
        TypeError: the schema has no field `exp_manager`.
    """
    if "exp_manager" not in schema.model_fields:
        raise TypeError(f"{schema.__name__} needs a field exp_manager: ExpManagerConfig")

    def decorate(main: Callable[[ConfigT, Run], None]) -> Callable[[], None]:
        script = Path(inspect.getfile(main)).resolve()

        @functools.wraps(main)
        def entry() -> None:
            end_with_torchrun()
            rank = int(os.environ.get("RANK", "0"))
            with errors_end_the_job(rank):
                source, arguments = _parse(script, config_name, config_path)
                composed = source.compose()
                if arguments.help:  # Hydra's own help would show the values without their meaning
                    about = inspect.getdoc(sys.modules[main.__module__]) or ""
                    width = shutil.get_terminal_size().columns
                    print(settings_help(script.name, about, schema, plain(composed), width))
                    return
                config = check(schema, composed)
                if arguments.cfg:
                    print(as_yaml(config), end="")
                    return
                with errors_end_the_job(rank, _settings(config).directory):
                    if rank == 0:
                        hold(_settings(config).directory)
                        with _refused_settings_leave_no_trace(_settings(config).directory):
                            _refuse_foreign_run(_settings(config), script.name)
                            # before NeMo's import, which takes seconds
                            changed = check_changes(config, _settings(config))
                            _run_through_nemo(schema, main, source, script.name, changed)
                    else:
                        main(config, _open_run(config, rank, script.name))

        return entry

    return decorate


@contextlib.contextmanager
def errors_end_the_job(rank: int, directory: Path | None = None) -> Iterator[None]:
    """End the process with one message if the block fails with an expected error: with exit status 2 at a ConfigError,
    and 1 at a RunError or if a file cannot be written, where the same command may succeed later. A run that was told to
    end before its last step ends with NOT_FINISHED.

    Other errors keep their stack. Most errors are the same on every rank, or follow from one rank's, and one message
    is enough: rank 0 tells at once, other ranks wait until the launcher should have ended them, and ranks that only
    know of another rank's failure wait longer.

    Args:
        rank: global rank of this process.
        directory: the run directory, for errors of files that do not say which.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except RunStopped:  # its log says why
        if rank:
            raise SystemExit(0) from None
        time.sleep(_LAST_S)  # srun kills the ranks that are left, and would return the status of these
        raise SystemExit(NOT_FINISHED) from None
    except Exception as error:
        message = disk_trouble(error, directory) if isinstance(error, OSError) else str(error)
        lost_peer = "gloo/transport" in str(error)  # how a collective fails when another rank has ended
        elsewhere = lost_peer or (isinstance(error, RunError) and error.elsewhere)
        time.sleep(_PATIENCE * (2 if elsewhere else min(rank, 1)))
        if message is None or not isinstance(error, ConfigError | RunError | OSError):
            raise
        print(f"rank {rank}: {message}" if rank else message, file=sys.stderr, flush=True)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


@contextlib.contextmanager
def _refused_settings_leave_no_trace(directory: Path) -> Iterator[None]:
    """Restore a run's config.yaml if the new settings turn out not to work: the run keeps those that it had."""
    file = directory / "config.yaml"
    before = file.read_text() if file.exists() else None
    try:
        yield
    except ConfigError:
        if before is not None:
            write_atomically(file, before)
        raise


def _parse(script: Path, config_name: str, config_path: str) -> tuple[Source, argparse.Namespace]:
    # not Hydra's own command line: sweeps and the like make no sense for a job of several processes
    parser = argparse.ArgumentParser(script.name, add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn", default=config_name)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--cfg", "-c", choices=["job"])
    parser.add_argument("--help", "-h", action="store_true")
    arguments = parser.parse_intermixed_args()
    # the user's files come before the package's, which can still be named; paths are relative to what Hydra takes
    directories = [Path(arguments.config_dir)] if arguments.config_dir else []
    if arguments.config_path:
        directories.append(script.parent / arguments.config_path)
    if not directories or (script.parent / config_path).is_dir():
        directories.append(script.parent / config_path)
    name = arguments.config_name.removesuffix(".yaml")
    return Source(name, [directory.resolve() for directory in directories], arguments.overrides), arguments


def _run_through_nemo(
    schema: type[ConfigT], main: Callable[[ConfigT, Run], None], source: Source, script: str, changed: Sequence[str]
) -> None:
    failures: list[BaseException] = []

    def start(composed: DictConfig) -> None:
        sys.argv = command  # exp_manager writes it down
        logging.getLogger().handlers.clear()  # Hydra's, which would print every library's INFO lines
        try:
            config = check(schema, composed)
            gc.freeze()  # what is imported stays: PyTriton alone collects garbage 14 times when it ends, 0.5 s each
            main(config, _open_run(config, 0, script, changed))
        except BaseException as error:  # Hydra would print a shortened stack, the arguments and advice of its own
            failures.append(error)

    import_nemo()
    from nemo.core.config import hydra_runner

    command = sys.argv
    where = ["--config-path", str(source.directories[0]), "--config-name", source.name]
    sys.argv = [command[0], *where, *source.hydra_overrides()]  # the only thing that hydra_runner reads
    hydra_runner()(start)()
    if failures:
        raise failures[0]


def import_nemo() -> None:
    """Import what rank 0 needs of NeMo, which takes seconds."""
    from nemo_eppo.megatron import device

    device.install()  # before NeMo imports megatron-core
    # NVIDIA's OneLogger, which comes with NeMo, says on the console that it is not in use
    logging.getLogger("nv_one_logger").addHandler(logging.NullHandler())
    import nemo.core.config
    import nemo.utils.exp_manager  # noqa: F401


def _settings(config: Config) -> ExpManagerConfig:
    return cast(ExpManagerConfig, config.exp_manager)  # type: ignore[attr-defined]  # job() has checked it


def _refuse_foreign_run(settings: ExpManagerConfig, script: str) -> None:
    file = settings.directory / "config.yaml"
    if not file.exists():
        return
    another = "choose another exp_manager.explicit_log_dir, name or version"
    if not settings.resume_if_exists:
        raise ConfigError(
            f"{settings.directory} holds a run already and exp_manager.resume_if_exists = false: set it to true to "
            f"resume that run, or {another}"
        )
    first_line = file.read_text().partition("\n")[0]
    if first_line != _HEADER.format(script):
        raise ConfigError(f"{settings.directory} is the run directory of another job ({first_line[2:]}): {another}")


def _open_run(config: Config, rank: int, script: str, changed: Sequence[str] = ()) -> Run:
    settings = _settings(config)
    directory, wandb = settings.directory, None
    if rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        wandb = _start_exp_manager(config)
        start = f"{START}{json.dumps(_start())}"
        write_atomically(directory / "config.yaml", f"{_HEADER.format(script)}\n{start}\n{as_yaml(config)}")
    logger = _logger(directory, rank)
    for change in changed:
        logger.info("changed since the last start: %s", change)
    return Run(directory, rank, logger, settings, wandb)


def _start() -> dict[str, str]:
    """Return what this start of the run uses: chosen files, such as method=ppo_kl, versions, and the time."""
    chosen = HydraConfig.get().runtime.choices.items() if HydraConfig.initialized() else ()
    return {
        **{str(group): str(choice) for group, choice in chosen if not str(group).startswith("hydra/")},
        **{name: importlib.metadata.version(name) for name in VERSIONS},
        "time": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
    }


def _start_exp_manager(config: Config) -> MetricsSink | None:
    """Let NeMo's experiment manager record this start in <run directory>/nemo, and return its logger for W&B.

    It keeps the command line, the git commit and the uncommitted changes, NeMo's and Lightning's logs, and those of
    earlier starts in run_0, run_1 and so on. The rest of it is made for Lightning's training loop, which is not
    ours: it chooses directories by the clock, where all ranks and every restart need the same; its checkpoints know
    no Megatron layout; and its TensorBoard writer cannot drop the steps after the checkpoint of a resume.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager

    nemo_logging.remove_stream_handlers()  # its messages go to files
    lightning_logger = logging.getLogger("lightning.pytorch")
    lightning_logger.handlers = [h for h in lightning_logger.handlers if type(h) is not logging.StreamHandler]
    settings = _settings(config)
    wandb = dict(settings.wandb_logger_kwargs)
    if settings.create_wandb_logger:
        wandb.setdefault("id", str(run_id(settings.directory)))  # every start continues the same curves
    # exp_manager hangs its loggers on a trainer; an explicit environment keeps it from asking Slurm or torchrun
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, plugins=[LightningEnvironment()])
    exp_manager(
        trainer,
        {
            "explicit_log_dir": str(settings.directory / "nemo"),  # its own: it moves all older files out of the way
            "create_tensorboard_logger": False,
            "create_checkpoint_callback": False,
            "create_wandb_logger": settings.create_wandb_logger,
            "wandb_logger_kwargs": wandb,
        },
    )
    if trainer.logger is not None:
        trainer.logger.log_hyperparams(config.model_dump(mode="json"))
    return trainer.logger


class _ConsoleHandler(logging.Handler):
    """Writes to the current standard error, which a progress bar replaces while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _logger(directory: Path, rank: int) -> logging.Logger:
    logging.raiseExceptions = False  # a full disk would print a stack for every line of every log file
    logging.getLogger("megatron").addHandler(logging.NullHandler())  # it also raises what it logs
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
