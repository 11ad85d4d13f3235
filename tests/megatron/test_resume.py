"""Training that resumes from a checkpoint equals the training that was never interrupted."""

import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import MODEL, SP2, VPP2, Layout, build_runner, close, exported, random_batch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader

from nemo_eppo.config import ConfigError
from nemo_eppo.files import remove_incomplete, sha256
from nemo_eppo.megatron import checkpoint, runtime, specs
from nemo_eppo.megatron import optimizer as megatron_optimizer
from nemo_eppo.megatron.collectives import on_rank0
from nemo_eppo.megatron.norms import RMSNorm
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.saving import CheckpointSaver, tidy
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.model import ParallelConfig
from nemo_eppo.settings.training import CheckpointConfig, OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.01, eps=1e-4, weight_decay=0.1, schedule="linear")


def squares(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    real = torch.arange(output.size(1)) < rows["lengths"].unsqueeze(1)
    return torch.where(real.unsqueeze(-1), output, 0).square().sum() / 50, {}


def update(runner: ModelRunner, head: str) -> dict[str, float]:
    rows = random_batch()
    if head == "scalar":
        del rows["targets"]
    return runner.train_step(rows, squares)


def interrupted(
    layout: Layout, head: Any, precision: Any, directory: Path, optimizer: OptimizerConfig = OPTIMIZER
) -> dict[str, Tensor]:
    """One update, a checkpoint; what two further updates give."""
    runner = build_runner(layout, head=head, precision=precision, optimizer=optimizer)
    update(runner, head)
    manifest = checkpoint_files.Manifest(head=head, step=1, model=MODEL, optimizer=True)
    checkpoint.save(directory, runner, manifest)
    update(runner, head)
    update(runner, head)
    return exported(runner)


def resumed(
    layout: Layout, head: Any, precision: Any, directory: Path, optimizer: OptimizerConfig = OPTIMIZER
) -> dict[str, Tensor]:
    runner = build_runner(layout, head=head, precision=precision, optimizer=optimizer)
    checkpoint.load(directory, runner, optimizer=True)
    update(runner, head)
    update(runner, head)
    return exported(runner)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_training_is_the_same_bit_for_bit(head: str, precision: str, tmp_path: Path) -> None:
    case = (2, VPP2, head, precision, tmp_path / "step_1")
    expected = run_ranks(interrupted, *case)[0]
    for parameters in run_ranks(resumed, *case):
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)


SHARDED = OPTIMIZER.model_copy(update={"distributed": True, "overlap_grad_reduce": True})


def interrupted_and_resumed(head: Any, precision: Any, directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    case: tuple[Any, ...] = ({}, head, precision, directory, SHARDED)
    return {name: tensor.clone() for name, tensor in interrupted(*case).items()}, resumed(*case)


def resumed_and_interrupted(head: Any, precision: Any, directory: Path, again: Path) -> None:
    """One update after a checkpoint, and another checkpoint."""
    runner = build_runner({}, head=head, precision=precision, optimizer=SHARDED)
    manifest = checkpoint.load(directory, runner, optimizer=True)
    update(runner, head)
    checkpoint.save(again, runner, manifest)


def resumed_for_one_update(head: Any, precision: Any, directory: Path) -> dict[str, Tensor]:
    runner = build_runner(SP2, head=head, precision=precision, optimizer=SHARDED)
    checkpoint.load(directory, runner, optimizer=True)
    update(runner, head)
    return exported(runner)


@pytest.mark.parametrize(("head", "precision", "tolerance"), [("lm", "fp32", 1e-5), ("scalar", "bf16", 0.02)])
def test_sharded_optimizer_states_resume_bit_for_bit_and_under_other_layouts(
    head: str, precision: str, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = vars(megatron_optimizer)["DistributedDataParallelConfig"]
    several_buckets = partial(settings, bucket_size=4000)  # with padding between them
    monkeypatch.setattr(megatron_optimizer, "DistributedDataParallelConfig", several_buckets)
    for expected, parameters in run_ranks(interrupted_and_resumed, 2, head, precision, tmp_path / "step_1"):
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    run_ranks(resumed_and_interrupted, 1, head, precision, tmp_path / "step_1", tmp_path / "step_2")
    for parameters in run_ranks(resumed_for_one_update, 2, head, precision, tmp_path / "step_2"):
        close(f"{head} {precision}, from DP2 to DP1 to TP2+SP", parameters, expected, tolerance)


class AsksForExtraState(RMSNorm):
    """Stands for TransformerEngine 2's RMSNorm, which keeps a state of quantised training beside its weight."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        raise AssertionError("nothing of quantised training is stored")


def with_extra_state(work: Any, *arguments: Any) -> dict[str, Tensor]:
    vars(specs)["RMSNorm"] = AsksForExtraState
    result: dict[str, Tensor] = work(*arguments)
    return result


@pytest.mark.parametrize("written", ["on a CPU", "under TransformerEngine"])
def test_checkpoints_go_between_norms_with_and_without_an_extra_state(written: str, tmp_path: Path) -> None:
    case: tuple[Any, ...] = ({}, "lm", "bf16", tmp_path / "step_1")
    plain, extra = (interrupted, resumed), (partial(with_extra_state, interrupted), partial(with_extra_state, resumed))
    save, load = (plain[0], extra[1]) if written == "on a CPU" else (extra[0], plain[1])
    expected, found = run_ranks(save, 1, *case)[0], run_ranks(load, 1, *case)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stored = FileSystemReader(tmp_path / "step_1" / checkpoint_files.WEIGHTS).read_metadata().state_dict_metadata
    assert not [name for name in stored if "_extra_state" in name]


MOMENTS = ("exp_avg", "exp_avg_sq")


class CountsInGroups(torch.optim.Optimizer):
    """Stands for TransformerEngine's and Apex's FusedAdam, which count updates with each group of parameters."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **defaults: Any) -> None:
        assert adam_w_mode
        super().__init__(params, {"bias_correction": True, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert group["bias_correction"]
            corrections = [1 - beta ** group["step"] for beta in group["betas"]]
            for parameter in group["params"]:
                state = self.state[parameter]
                first, second = (state.setdefault(name, torch.zeros_like(parameter)) for name in MOMENTS)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                first.lerp_(parameter.grad, 1 - group["betas"][0])
                second.lerp_(parameter.grad.square(), 1 - group["betas"][1])
                size = (second / corrections[1]).sqrt() + group["eps"]
                parameter.sub_(group["lr"] * first / corrections[0] / size)

    def load_state_dict(self, state_dict: Any) -> None:
        for state in state_dict["state"].values():
            assert state.keys() == set(MOMENTS), "TransformerEngine's raises KeyError"
        super().load_state_dict(state_dict)


def with_another_adam(work: Any, *arguments: Any) -> dict[str, Tensor]:
    vars(sys.modules["megatron.core.optimizer"]).update(Adam=CountsInGroups, USING_PYTORCH_OPTIMIZER=False)
    flags = {"HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True}
    vars(sys.modules["megatron.core.optimizer.distrib_optimizer"]).update(Adam=CountsInGroups, **flags)
    result: dict[str, Tensor] = work(*arguments)
    return result


@pytest.mark.parametrize("optimizer", [OPTIMIZER, SHARDED], ids=["whole", "sharded"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("written", ["by torch's", "by another"])
def test_the_number_of_updates_goes_between_adams_that_count_in_other_places(
    written: str, precision: str, optimizer: OptimizerConfig, tmp_path: Path
) -> None:
    case: tuple[Any, ...] = ({}, "lm", precision, tmp_path / "step_1", optimizer)
    work: Any = (interrupted, partial(with_another_adam, resumed))
    if written == "by another":
        work = (partial(with_another_adam, interrupted), resumed)
    expected, found = (run_ranks(each, 1, *case)[0] for each in work)
    close(f"{precision}, written {written} Adam", found, expected, 2e-5 if precision == "fp32" else 0.004)


def test_replicas_share_the_writing_of_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(interrupted, 2, {}, "lm", "fp32", tmp_path / "step_1")
    files = list((tmp_path / "step_1" / checkpoint_files.WEIGHTS).glob("*.distcp"))
    written = [sum(file.stat().st_size for file in files if file.name.startswith(f"__{rank}_")) for rank in (0, 1)]
    assert sum(written) == sum(file.stat().st_size for file in files)
    assert max(written) < 1.5 * min(written)


def resumed_with(settings: OptimizerConfig, precision: Any, directory: Path) -> tuple[list[float], dict[str, Any]]:
    """The learning rates of updates 2 to 4 of 5, and what every group of parameters is told."""
    runner = build_runner({}, precision=precision, optimizer=settings, total_steps=5)
    checkpoint.load(directory, runner, optimizer=True)
    rates = [update(runner, "lm")["lr"] for _ in range(3)]
    groups = runner.optimizer.param_groups
    decays = sorted(group["weight_decay"] for group in groups)
    return rates, {"betas": [group["betas"] for group in groups], "eps": groups[0]["eps"], "decays": decays}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_with_the_settings_it_is_given_now(precision: str, tmp_path: Path) -> None:
    run_ranks(interrupted, 1, {}, "lm", precision, tmp_path / "step_1")  # lr 0.01, falling to 0 over 10 updates
    settings = OptimizerConfig(lr=0.02, min_lr=0.004, schedule="linear", betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    [(rates, told)] = run_ranks(resumed_with, 1, settings, precision, tmp_path / "step_1")
    assert rates == pytest.approx([0.02 - 0.016 * done / 5 for done in (1, 2, 3)])
    assert told == {"betas": [(0.8, 0.9)] * 2, "eps": 1e-3, "decays": [0.0, 0.2]}


def refusal(precision: Any, directory: Path, optimizer: OptimizerConfig = OPTIMIZER) -> str:
    try:
        resumed({}, "lm", precision, directory, optimizer)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("saved", "wanted"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_training_does_not_go_on_in_another_precision(saved: str, wanted: str, tmp_path: Path) -> None:
    run_ranks(interrupted, 1, {}, "lm", saved, tmp_path / "step_1")
    [said] = run_ranks(refusal, 1, wanted, tmp_path / "step_1")
    assert said.endswith(f"model.precision = {saved}; training cannot resume from it with {wanted}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_does_not_go_on_with_optimizer_states_of_another_kind(precision: str, tmp_path: Path) -> None:
    saved, now = tmp_path / "step_1", SHARDED if precision == "fp32" else OPTIMIZER
    run_ranks(interrupted, 1, {}, "lm", precision, saved, OPTIMIZER if now is SHARDED else SHARDED)
    [said] = run_ranks(refusal, 1, precision, saved, now)
    assert said.endswith(
        f"optimizer.distributed = {now is OPTIMIZER}; training cannot resume from it with {now is SHARDED}"
    )


def said_about(directory: Path) -> str:
    runtime.initialize(ParallelConfig(), seed=1)
    try:
        checkpoint.verify(directory)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_share_the_digests_of_a_checkpoint_and_all_name_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    def logged(path: Path) -> str:
        with log.open("a") as file:
            file.write(f"{os.environ['RANK']} {path.name}\n")
        return sha256(path)

    monkeypatch.setattr(checkpoint_files, "sha256", logged)
    run_ranks(interrupted, 2, SP2, "lm", "fp32", tmp_path / "step_1")
    by = {name: rank for rank, name in map(str.split, log.read_text().splitlines())}
    assert {rank for name, rank in by.items() if name.startswith("__1_")} == {"1"}
    assert {rank for name, rank in by.items() if not name.startswith("__1_")} == {"0"}
    log.unlink()
    files = checkpoint_files.read_manifest(tmp_path / "step_1").files
    found = {str(p.relative_to(tmp_path / "step_1")): p for p in (tmp_path / "step_1").rglob("*") if p.is_file()}
    assert {name: entry.sha256 for name, entry in files.items()} == {
        name: sha256(path) for name, path in found.items() if name != checkpoint_files.MANIFEST
    }
    assert run_ranks(said_about, 2, tmp_path / "step_1") == ["", ""]
    lines = log.read_text().splitlines()
    assert len(lines) == len(files)
    assert {line[0] for line in lines} == {"0", "1"}
    for name in sorted(files, key=lambda name: -files[name].size)[:2]:  # one for each rank
        content = bytearray(found[name].read_bytes())
        content[-1] ^= 1
        found[name].write_bytes(content)
        damage = f"{tmp_path / 'step_1'} is damaged: the content of {name} is not what its manifest says"
        assert run_ranks(said_about, 2, tmp_path / "step_1") == [damage, damage]
        content[-1] ^= 1
        found[name].write_bytes(content)


def saved_while_training(layout: Layout, folder: Path) -> tuple[list[bool], dict[str, Tensor], dict[str, Tensor]]:
    """Save after one update and train on: whether it was there at once and after a while, and both weights."""
    runner = build_runner(layout, optimizer=OPTIMIZER)
    update(runner, "lm")
    then = {name: tensor.clone() for name, tensor in exported(runner).items()}
    saver = CheckpointSaver(folder, None, asynchronous=True)
    saver.save(runner, checkpoint_files.Manifest(head="lm", step=1, model=MODEL, optimizer=True))
    there = [on_rank0(saver.path(1).exists)]  # not before the first poll
    update(runner, "lm")
    while not on_rank0(saver.path(1).exists):  # the ranks poll equally often
        saver.poll()
    saver.finish()
    checkpoint_files.verify(saver.path(1))
    there.append(saver.path(1).exists())
    checkpoint.load(saver.path(1), runner, optimizer=True)
    return there, then, exported(runner)


def test_a_checkpoint_written_while_training_goes_on_holds_the_weights_of_its_step(tmp_path: Path) -> None:
    for there, then, loaded in run_ranks(saved_while_training, 2, SP2, tmp_path):
        assert there == [False, True]
        assert all(torch.equal(loaded[name], then[name]) for name in then)


def saved_by_a_worker_that_is_killed(folder: Path) -> tuple[str, bool]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    FileSystemWriterAsync.write_preloaded_data = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
    runner = build_runner({}, optimizer=OPTIMIZER)
    saver = CheckpointSaver(folder, None, asynchronous=True)
    try:
        saver.save(runner, checkpoint_files.Manifest(head="lm", step=1, model=MODEL, optimizer=True))
        saver.finish()
    except CheckpointException as error:
        return str(error), saver.path(1).exists()
    return "", saver.path(1).exists()


def test_a_job_is_told_when_what_writes_its_checkpoint_is_killed(tmp_path: Path) -> None:
    [(said, exists)] = run_ranks(saved_by_a_worker_that_is_killed, 1, tmp_path, timeout=60)
    assert said
    assert not exists


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_resumes_in_another_layout(head: str, precision: str, tmp_path: Path) -> None:
    expected = run_ranks(interrupted, 2, SP2, head, precision, tmp_path / "step_1")[0]
    for parameters in run_ranks(resumed, 2, VPP2, head, precision, tmp_path / "step_1"):
        tolerance = 1e-5 if precision == "fp32" else 0.02
        close(f"{head} {precision}, from TP2+SP to PP2+VPP2", parameters, expected, tolerance)


def test_a_kill_while_old_checkpoints_are_removed_leaves_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        run_ranks(interrupted, 1, {}, "lm", "fp32", tmp_path / f"step_{step}")

    def begin(directory: Path) -> None:
        (directory / checkpoint_files.WEIGHTS / ".metadata").unlink()  # manifest.json may well be the last to go
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", begin)
    with pytest.raises(KeyboardInterrupt):
        tidy(tmp_path, CheckpointConfig(keep=1))
    monkeypatch.undo()
    assert checkpoint_files.complete_in(tmp_path) == [tmp_path / "step_2"]
    checkpoint_files.verify(tmp_path / "step_2")
    remove_incomplete(tmp_path, "step_*")  # as the next start does
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    names = ["step_999998", "step_999999", "step_1000000", "step_1000001"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint_files.MANIFEST).touch()
    assert [path.name for path in checkpoint_files.complete_in(tmp_path)] == names


def test_a_best_checkpoint_may_be_asked_for_later(tmp_path: Path) -> None:
    config = CheckpointConfig(keep=1, best="validation/reward")

    def after(step: int, metrics: dict[str, float]) -> list[str]:
        """Names in the folder after a checkpoint of this step."""
        manifest = checkpoint_files.Manifest(head="lm", step=step, model=MODEL, metrics=metrics)
        (tmp_path / f"step_{step}").mkdir()
        (tmp_path / f"step_{step}" / checkpoint_files.MANIFEST).write_text(manifest.model_dump_json())
        tidy(tmp_path, config)
        return sorted(path.name for path in tmp_path.iterdir())

    assert after(1, {}) == ["step_1"]  # saved before there was a validation
    assert after(2, {"validation/reward": 0.5}) == ["best", "step_2"]
    assert after(3, {"validation/reward": 0.25}) == ["best", "step_2", "step_3"]
    assert (tmp_path / "best").resolve().name == "step_2"
