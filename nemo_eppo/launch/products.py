"""The checkpoints that the jobs of a launch will make, known from their settings before any of them has run.

A directory with manifest and tokenizer, but without weights, stands in for a checkpoint that an earlier job will make,
so that jobs which start from it can be examined as if it were there.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.job import Job
from nemo_eppo.launch.launch_file import LaunchConfig

if TYPE_CHECKING:
    from nemo_eppo.settings.model import Head
    from nemo_eppo.training.setup import Plan


class Product(NamedTuple):
    """A checkpoint, or a directory of checkpoints, that a job will make."""

    head: "Head"
    state: dict[str, Any]
    """State of a reward model's manifest, with stand-ins for its statistics."""


def maker(launch: LaunchConfig, path: Path) -> str | None:
    """Return the job in whose run directory a path lies; None if there is none."""
    folders = {name: (launch.output / name).absolute() for name in launch.jobs}
    return next((name for name, folder in folders.items() if path.absolute().is_relative_to(folder)), None)


def products(job: Job) -> dict[str, Product]:
    """Return the checkpoints that a job will make, by their path in its run directory."""
    from nemo_eppo.megatron.saving import CHECKPOINTS

    if job.setting("optimizer") is None:  # it trains nothing
        return {}
    if job.kind.head == "lm":
        made = {CHECKPOINTS: Product("lm", {})}
        if job.setting("critic.colocated") is not None:
            made[f"critic/{CHECKPOINTS}"] = Product("scalar", {})
        return made
    reward, ensemble = job.setting("reward"), job.setting("ensemble")
    if reward is None:
        return {CHECKPOINTS: Product("scalar", {})}

    from nemo_eppo.training.reward_ensemble import AVERAGE, averaged
    from nemo_eppo.training.reward_losses import LOSSES

    one = Product(LOSSES[reward.kind].head, reward.state(mean=0.0, std=1.0))
    made = {str(Path(folder, CHECKPOINTS)): one for folder in ensemble.folders}
    if ensemble.average:
        made[AVERAGE] = Product(one.head, averaged(one.state))
    return made


def product(launch: LaunchConfig, job: Job, path: Path, head: "Head | None" = None) -> Product:
    """Return what a job will have made at a path in its run directory.

    Args:
        head: expect a language model (lm) or a trained reward model (scalar); None for any model.

    Raises:
        ConfigError: it makes no checkpoint there, or that of another model.
    """
    from nemo_eppo.megatron.saving import BEST

    inside, made = path.absolute().relative_to((launch.output / job.name).absolute()), products(job)
    within = inside.parent if inside.name == BEST or inside.match("step_*") else inside
    found = made.get(str(inside)) or made.get(str(within))
    if found is None:
        expected = ", ".join(str(launch.output / job.name / folder) for folder in made) or "a checkpoint of another job"
        raise ConfigError(f"{path}: the job {job.name} makes no checkpoint there, expected {expected}")
    if head is not None and (found.head == "lm") != (head == "lm"):
        raise ConfigError(f"{path}: the job {job.name} makes a model with head '{found.head}', expected '{head}'")
    if head == "scalar" and not found.state:
        raise ConfigError(f"{path}: the job {job.name} makes a critic, expected a trained reward model")
    return found


def stand_in(product: Product, plan: "Plan", path: Path, root: Path) -> Path:
    """Return a directory that stands in for the checkpoint at `path`, below `root` where `path` is below `/`.

    Args:
        plan: that of the model which the checkpoint will hold.
    """
    from nemo_eppo.models import checkpoint_files

    directory = root / path.absolute().relative_to("/")
    if not directory.exists():
        directory.mkdir(parents=True)
        checkpoint_files.copy_tokenizer(plan.tokenizer_path, directory / checkpoint_files.TOKENIZER)
        manifest = checkpoint_files.Manifest(head=product.head, step=0, model=plan.model, state=product.state)
        (directory / checkpoint_files.MANIFEST).write_text(manifest.model_dump_json())
    return directory
