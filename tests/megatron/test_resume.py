"""Training that resumes from a checkpoint equals the training that was never interrupted."""

import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from tiny import MODEL, PP2, SP2, VPP2, Layout, build_runner, close, exported, update
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load_state_dict

from nemo_eppo.config import ConfigError
from nemo_eppo.files import remove_incomplete, sha256
from nemo_eppo.megatron import checkpoint, runtime, specs
from nemo_eppo.megatron import optimizer as megatron_optimizer
from nemo_eppo.megatron.norms import RMSNorm
from nemo_eppo.megatron.saving import tidy
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.model import LoRAConfig, ParallelConfig
from nemo_eppo.settings.training import CheckpointConfig, OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.01, eps=1e-4, weight_decay=0.1, schedule="linear")
SHARDED = OPTIMIZER.model_copy(update={"distributed": True, "overlap_grad_reduce": True})
OPTIMIZERS = {"whole": OPTIMIZER, "sharded": SHARDED}


def interrupted(
    layout: Layout, head: Any, precision: Any, directory: Path, optimizer: OptimizerConfig = OPTIMIZER
) -> dict[str, Tensor]:
    """One update, a checkpoint; what two further updates give."""
    runner = build_runner(layout, head=head, precision=precision, optimizer=optimizer)
    update(runner, head)
    manifest = checkpoint_files.Manifest(head=head, step=1, model=MODEL, optimizer=True)
    for group in runner.optimizer.param_groups:
        group["fused"] = None  # as where another Adam wrote it, and as it was before there was a fused one
    checkpoint.save(directory, runner, manifest)
    for group in runner.optimizer.param_groups:
        group["fused"] = True
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


Written = Callable[[Any, str], tuple[Path, dict[str, Tensor]]]
"""Of a precision and a kind of optimizer: a checkpoint of one rank, and what two further updates gave."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Each is made once; who changes a checkpoint copies it."""

    @cache
    def write(precision: Any, kind: str) -> tuple[Path, dict[str, Tensor]]:
        directory = tmp_path_factory.mktemp("written") / "step_1"
        return directory, run_ranks(interrupted, 1, {}, "lm", precision, directory, OPTIMIZERS[kind])[0]

    return write


@pytest.mark.parametrize(("head", "precision"), [("lm", "fp32"), ("scalar", "bf16")])
def test_resumed_training_is_the_same_bit_for_bit(head: str, precision: str, tmp_path: Path) -> None:
    case = (2, VPP2, head, precision, tmp_path / "step_1")
    expected = run_ranks(interrupted, *case)[0]
    for parameters in run_ranks(resumed, *case):
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)


def gone_back(directory: Path, optimizer: OptimizerConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What two updates after a checkpoint give, and again in the same process, when it has been loaded."""
    expected = {name: tensor.clone() for name, tensor in interrupted({}, "lm", "fp32", directory, optimizer).items()}
    runner = build_runner({}, head="lm", precision="fp32", optimizer=optimizer)
    for _ in range(3):
        update(runner, "lm")
    checkpoint.load(directory, runner, optimizer=True)
    update(runner, "lm")
    update(runner, "lm")
    return expected, exported(runner)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_process_that_goes_back_to_a_checkpoint_has_its_learning_rate_too(kind: str, tmp_path: Path) -> None:
    [(expected, found)] = run_ranks(gone_back, 1, tmp_path / "step_1", OPTIMIZERS[kind])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


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


def continued(changes: dict[str, Any], directory: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after two updates, and after a checkpoint between them was loaded by another model."""
    build = partial(build_runner, precision="bf16", optimizer=SHARDED, **changes)
    runner = build()
    update(runner, "lm")
    checkpoint.save(
        directory, runner, checkpoint_files.Manifest(head="lm", step=1, model=changes["model"], optimizer=True)
    )
    update(runner, "lm")
    expected = {name: tensor.clone() for name, tensor in exported(runner).items()}
    again = build()
    checkpoint.load(directory, again, optimizer=True)
    update(again, "lm")
    return expected, exported(again)


TIED = {"layout": PP2, "model": MODEL.model_copy(update={"tie_embeddings": True})}
ADAPTERS = {"layout": VPP2, "model": MODEL, "lora": LoRAConfig(rank=2, alpha=4)}


@pytest.mark.parametrize("changes", [TIED, ADAPTERS], ids=["tied embeddings, DP2 PP2", "adapters, DP2 VPP2"])
def test_sharded_states_of_what_several_stages_or_no_weights_have_resume_too(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    for expected, found in run_ranks(continued, 4, changes, tmp_path / "step_1"):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


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


@pytest.mark.parametrize("where", ["on a CPU", "under TransformerEngine"])
def test_checkpoints_go_between_norms_with_and_without_an_extra_state(
    where: str, written: Written, tmp_path: Path
) -> None:
    load: Any = resumed
    if where == "on a CPU":
        (directory, expected), load = written("bf16", "whole"), partial(with_extra_state, resumed)
    else:
        directory = tmp_path / "step_1"
        expected = run_ranks(with_extra_state, 1, interrupted, {}, "lm", "bf16", directory)[0]
    found = run_ranks(load, 1, {}, "lm", "bf16", directory)[0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stored = FileSystemReader(directory / checkpoint_files.WEIGHTS).read_metadata().state_dict_metadata
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


@pytest.mark.parametrize(
    ("adam", "precision", "kind"),
    [
        ("torch's", "fp32", "whole"),
        ("torch's", "bf16", "sharded"),
        ("another", "fp32", "sharded"),
        ("another", "bf16", "whole"),
    ],
)
def test_the_number_of_updates_goes_between_adams_that_count_in_other_places(
    adam: str, precision: str, kind: str, written: Written, tmp_path: Path
) -> None:
    load: Any = resumed
    if adam == "torch's":
        (directory, expected), load = written(precision, kind), partial(with_another_adam, resumed)
    else:
        directory = tmp_path / "step_1"
        case: tuple[Any, ...] = ({}, "lm", precision, directory, OPTIMIZERS[kind])
        expected = run_ranks(with_another_adam, 1, interrupted, *case)[0]
    found = run_ranks(load, 1, {}, "lm", precision, directory, OPTIMIZERS[kind])[0]
    close(f"{precision}, written by {adam} Adam", found, expected, 2e-5 if precision == "fp32" else 0.004)


def test_replicas_share_the_writing_of_a_checkpoint(tmp_path: Path) -> None:
    run_ranks(interrupted, 2, {}, "lm", "fp32", tmp_path / "step_1")
    files = list((tmp_path / "step_1" / checkpoint_files.WEIGHTS).glob("*.distcp"))
    written = [sum(file.stat().st_size for file in files if file.name.startswith(f"__{rank}_")) for rank in (0, 1)]
    assert sum(written) == sum(file.stat().st_size for file in files)
    assert max(written) < 1.5 * min(written)


def loaded_and_saved(layout: Layout, optimizer: OptimizerConfig, directory: Path, again: Path) -> int:
    """How many numbers this rank read."""
    runner = build_runner(layout, precision="bf16", optimizer=optimizer)
    counts: list[int] = []
    read = FileSystemReader.read_data

    def counted(reader: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Any:
        counts.extend(item.lengths.numel() for item in plan.items)
        return read(reader, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_data", counted)
        manifest = checkpoint.load(directory, runner, optimizer=True)
    checkpoint.save(again, runner, manifest)
    return sum(counts)


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, as torch alone reads them."""
    entries = FileSystemReader(directory / checkpoint_files.WEIGHTS).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_state_dict(tensors, FileSystemReader(directory / checkpoint_files.WEIGHTS), no_dist=True)
    return tensors


@pytest.mark.parametrize(("kind", "layout", "ranks"), [("whole", {}, 2), ("sharded", SP2, 4)])
def test_replicas_share_the_reading_of_a_checkpoint_and_load_every_bit_of_it(
    kind: str, layout: Layout, ranks: int, written: Written, tmp_path: Path
) -> None:
    directory, _ = written("bf16", kind)
    counts = run_ranks(loaded_and_saved, ranks, layout, OPTIMIZERS[kind], directory, tmp_path / "again")
    expected, found = stored(directory), stored(tmp_path / "again")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name][: len(tensor)], tensor), name  # TP2 pads the vocabulary further
    once = sum(tensor.numel() for tensor in expected.values())
    assert once <= sum(counts) < 1.1 * once
    assert max(counts) < 1.5 * min(counts)


def resumed_with(settings: OptimizerConfig, precision: Any, directory: Path) -> tuple[list[float], dict[str, Any]]:
    """The learning rates of updates 2 to 4 of 5, and what every group of parameters is told."""
    runner = build_runner({}, precision=precision, optimizer=settings, total_steps=5)
    checkpoint.load(directory, runner, optimizer=True)
    rates = [update(runner, "lm")["lr"] for _ in range(3)]
    groups = runner.optimizer.param_groups
    decays, fused = sorted(group["weight_decay"] for group in groups), {group["fused"] for group in groups}
    told = {"betas": [group["betas"] for group in groups], "eps": groups[0]["eps"], "decays": decays, "fused": fused}
    return rates, told


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_with_the_settings_it_is_given_now(precision: str, written: Written) -> None:
    directory, _ = written(precision, "whole")  # lr 0.01, falling to 0 over 10 updates
    settings = OptimizerConfig(lr=0.02, min_lr=0.004, schedule="linear", betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    [(rates, told)] = run_ranks(resumed_with, 1, settings, precision, directory)
    assert rates == pytest.approx([0.02 - 0.016 * done / 5 for done in (1, 2, 3)])
    assert told == {"betas": [(0.8, 0.9)] * 2, "eps": 1e-3, "decays": [0.0, 0.2], "fused": {True}}


def refusal(precision: Any, directory: Path, optimizer: OptimizerConfig = OPTIMIZER) -> str:
    try:
        resumed({}, "lm", precision, directory, optimizer)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("saved", "wanted"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_training_does_not_go_on_in_another_precision(saved: str, wanted: str, written: Written) -> None:
    [said] = run_ranks(refusal, 1, wanted, written(saved, "whole")[0])
    assert said.endswith(f"model.precision = {saved}; training cannot resume from it with {wanted}")


@pytest.mark.parametrize(("precision", "saved", "now"), [("fp32", "whole", "sharded"), ("bf16", "sharded", "whole")])
def test_training_does_not_go_on_with_optimizer_states_of_another_kind(
    precision: str, saved: str, now: str, written: Written
) -> None:
    [said] = run_ranks(refusal, 1, precision, written(precision, saved)[0], OPTIMIZERS[now])
    assert said.endswith(
        f"optimizer.distributed = {saved == 'sharded'}; training cannot resume from it with {now == 'sharded'}"
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


@pytest.mark.parametrize(("head", "precision"), [("lm", "bf16"), ("scalar", "fp32")])
def test_training_resumes_in_another_layout(head: str, precision: str, tmp_path: Path) -> None:
    expected = run_ranks(interrupted, 2, SP2, head, precision, tmp_path / "step_1")[0]
    for parameters in run_ranks(resumed, 2, VPP2, head, precision, tmp_path / "step_1"):
        tolerance = 1e-5 if precision == "fp32" else 0.02
        close(f"{head} {precision}, from TP2+SP to PP2+VPP2", parameters, expected, tolerance)


def test_a_kill_while_old_checkpoints_are_removed_leaves_none_of_them(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        shutil.copytree(written("fp32", "whole")[0], tmp_path / f"step_{step}")

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
