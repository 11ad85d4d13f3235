"""Adapters compute and learn what LoRA is in plain torch, in every layout; nothing else is learnt.

Adam's epsilon is 1, so that an update is nearly proportional to the gradient: a gradient of the wrong size cannot hide
behind Adam's normalisation.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from distributed import run_ranks
from plain_lora import HIDDEN, LAYERS, LORA, OPTIMIZER, SCALE, UPDATES, WIDTHS, Adapters, plain_lora
from reference_eppo import rms_norm
from tiny import (
    MODEL,
    PP2,
    SP2,
    TP2,
    VPP2,
    Layout,
    build_runner,
    close,
    exported,
    random_batch,
    random_weights,
)
from torch import Tensor

from nemo_eppo.config import ConfigError
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron import checkpoint, lora
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import LoRAConfig
from nemo_eppo.settings.training import OptimizerConfig


class Case(NamedTuple):
    layout: Layout
    ranks: int
    head: Any = "lm"
    tied: bool = False
    recompute: bool = False


CASES = {
    "TP1": Case({}, 1),
    "TP2": Case(TP2, 2),
    "TP2+SP, recomputed": Case(SP2, 2, recompute=True),
    "PP2": Case(PP2, 2),
    "DP2": Case({}, 2),
    "PP2+VPP2, tied, recomputed": Case(VPP2, 2, tied=True, recompute=True),
    "critic, TP2+SP": Case(SP2, 2, head="scalar"),
}


def mini_batch(head: str) -> Rows:
    """A batch, and what each output is multiplied with in the loss."""
    rows = random_batch()
    real = rows["targets"] != IGNORE
    if head == "scalar":
        del rows["targets"]
        real = torch.arange(real.size(1)) < rows["lengths"][:, None]
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(13))
    rows["coefficients"] = torch.where(real, noise, 0) / 4
    return rows


def loss_function(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    return (output[..., 0] * rows["coefficients"]).sum(), {}


# ---------------------------------------------------------------------------------------------------------- Megatron


def local_adapters(runner: ModelRunner) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """A and B of this rank's layers, numbered over the whole model."""
    found: dict[tuple[int, str, str], Tensor] = {}
    for chunk in runner.chunks:
        for name, parameter in unwrap(chunk).named_parameters():
            if lora.SUFFIX in name:
                _, _, index, _, module, factor = name.split(".")
                layer = unwrap(chunk).decoder.layers[int(index)].layer_number - 1
                found[layer, module.removesuffix(lora.SUFFIX), factor] = parameter.detach().clone()
    return {(i, target): (found[i, target, "a"], found[i, target, "b"]) for i, target, _ in found}


def generated_against_inferred(runner: ModelRunner) -> float:
    """Largest difference between log-probs of sampled tokens and those of the log-prob pass."""
    limits = EngineLimits(eos_id=0, pad_id=1, max_batch_size=4, max_sequence_length=MODEL.max_sequence_length)
    engine = MegatronEngine(runner.chunks, limits)
    prompts = [[5, 6, 7], [8, 9]]
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=9), [1, 2])
    worst = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt + completion.token_ids])
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
        inferred, _ = runner.infer(tokens, torch.tensor([tokens.size(1)]), targets, outputs=2)
        difference = inferred[0, len(prompt) - 1 : -1, 0] - torch.tensor(completion.logprobs)
        worst = max(worst, float(difference.abs().max()))
    return worst


def everything(case: Case, directory: Path | None) -> dict[str, Any]:
    model = MODEL.model_copy(update={"tie_embeddings": case.tied})
    rows, outputs = mini_batch(case.head), 1 if case.head == "scalar" else 2
    probe = EnergyProbeConfig(preset="mlp_linears", layers=(-1, 0))

    def infer(runner: ModelRunner) -> tuple[Tensor, Tensor]:
        out, energies = runner.infer(
            rows["tokens"], rows["lengths"], rows.get("targets"), outputs=outputs, energies=True
        )
        assert energies is not None
        return out, energies

    def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))

    settings: Any = {"head": case.head, "recompute": case.recompute, "probe": probe}
    base = infer(build_runner(case.layout, model, **settings))
    runner = build_runner(case.layout, model, optimizer=OPTIMIZER, lora=LORA, **settings)
    frozen = {name: p.detach().clone() for name, p in named_parameters(runner) if not p.requires_grad}
    result: dict[str, Any] = {"initial": local_adapters(runner), "unchanged": same(infer(runner), base)}
    result["norms"] = torch.tensor([runner.train_step(rows, loss_function)["grad_norm"] for _ in range(UPDATES)])
    after = infer(runner)
    reference = AdaptersOff(runner.chunks)
    with reference.active():
        result["reference"] = same(infer(runner), base) or case.head == "scalar"  # whose head has learnt
        off = exported(runner, model)
        unlike = generated_against_inferred(runner) if case.head == "lm" else 0.0
    result |= {
        "after": after[0][..., 0],
        "energies": after[1],
        "moved": not same(after, base) and same(infer(runner), after),
        "off": off,
        "merged": exported(runner, model),
        "adapters": local_adapters(runner),
        "base is frozen": all(torch.equal(p, frozen[name]) for name, p in named_parameters(runner) if name in frozen),
        "trainable": sum(p.numel() for _, p in named_parameters(runner) if p.requires_grad),
        "gradients": sum(b.grad_data.numel() for chunk in runner.chunks for b in chunk.buffers),
        "states": sum(s["exp_avg"].numel() for part in states(runner) for s in part.values()),
        "all": sum(p.numel() for _, p in named_parameters(runner)),
        "mismatch": max(unlike, generated_against_inferred(runner)) if case.head == "lm" else 0.0,
    }
    if directory is not None:
        manifest = checkpoint_files.Manifest(head=case.head, step=UPDATES, model=model, optimizer=True)
        checkpoint.save(directory, runner, manifest)
    runner.train_step(rows, loss_function)
    result["one more"] = exported(runner, model)
    return result


def named_parameters(runner: ModelRunner) -> list[tuple[str, torch.nn.Parameter]]:
    return [
        (f"{index}.{name}", parameter)
        for index, chunk in enumerate(runner.chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    ]


def states(runner: ModelRunner) -> list[Any]:
    return [part.optimizer.state for part in runner.optimizer.chained_optimizers]


def whole(shards: list[tuple[Tensor, Tensor]], target: str) -> tuple[Tensor, Tensor]:
    """A and B of a linear from those of its tensor-parallel ranks."""
    a, b = ([shard[part] for shard in shards] for part in (0, 1))
    if target in ("linear_qkv", "linear_fc1"):
        assert all(torch.equal(a[0], other) for other in a)
        rows = [shard.unflatten(0, (2 if target == "linear_fc1" else 1, -1)) for shard in b]
        return a[0], torch.cat(rows, dim=1).flatten(0, 1)
    assert all(torch.equal(b[0], other) for other in b)
    return torch.cat(a, dim=1), b[0]


def gathered(case: Case, results: list[dict[str, Any]], what: str) -> tuple[Adapters, Adapters]:
    keys, parts = {key for result in results for key in result[what]}, case.layout.get("tensor_model_parallel_size", 1)
    pairs = {key: whole([r[what][key] for r in results if key in r[what]][:parts], key[1]) for key in sorted(keys)}
    assert len(pairs) == LAYERS * len(WIDTHS)
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("lora")
    return {
        name: run_ranks(everything, case.ranks, case, directory / "saved" if name == "TP2+SP, recomputed" else None)
        for name, case in CASES.items()
    } | {"saved": directory / "saved"}


@pytest.mark.parametrize("name", CASES)
def test_three_updates_are_those_of_plain_lora(name: str, results: dict[str, Any]) -> None:
    case, ranks = CASES[name], results[name]
    initial, zeros = gathered(case, ranks, "initial")
    one_rank, _ = gathered(CASES["TP1"], results["TP1"], "initial")
    for key, fresh in initial.items():
        assert torch.equal(fresh, one_rank[key]), "a fresh A does not depend on the layout"
        assert fresh.shape == (3, WIDTHS[key[1]][0])
        assert not zeros[key].any()
    expected = plain_lora(initial, mini_batch(case.head), case.head, case.tied)
    a, b = gathered(case, ranks, "adapters")
    for key in a:
        close(f"{name}, A of {key}", a[key], expected["a"][key])
        close(f"{name}, B of {key}", b[key], expected["b"][key])
        assert float((a[key] - initial[key]).abs().max()) > 1e-4
        assert float(b[key].abs().max()) > 1e-3
    # fp32 rounds a critic's values, which may be large, in proportion; log-probs and entropies are of the order of 1
    scale = max(1.0, float(expected["after"].abs().max()))
    for result in ranks:
        computed = torch.where(result["after"] != 0, expected["after"], 0)
        close(f"{name}, outputs of up to {scale:.1f}", result["after"] / scale, computed / scale)
        relative = result["norms"] / expected["norms"]
        close(f"{name}, gradient norms (relative)", relative, torch.ones(UPDATES))
        close(f"{name}, merged weights", result["merged"], expected["merged"])
        if not case.tied and case.head == "lm":
            close(f"{name}, energies", result["energies"], results["TP1"][0]["energies"])


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_frozen_and_is_the_reference(name: str, results: dict[str, Any]) -> None:
    start = random_weights(MODEL.model_copy(update={"tie_embeddings": CASES[name].tied}))
    for result in results[name]:
        assert result["unchanged"], "fresh adapters change an output or an energy"
        assert result["moved"]
        assert result["reference"]
        assert result["base is frozen"]
        assert all(torch.equal(weight, start[key]) for key, weight in result["off"].items() if "score" not in key)
        assert result["mismatch"] < 1e-5, "generation is not the policy that is trained"


def test_only_adapters_have_gradients_and_optimizer_states(results: dict[str, Any]) -> None:
    (one,) = results["TP1"]
    adapters = LAYERS * sum(3 * (inputs + outputs) for inputs, outputs in WIDTHS.values())
    assert one["trainable"] == one["states"] == adapters
    assert adapters <= one["gradients"] < adapters + 2048  # Megatron pads its buffers
    padding = 2 * MODEL.hidden_size * (MODEL.padded_vocab_size(1) - MODEL.vocab_size)
    weights = sum(weight.numel() for name, weight in random_weights(MODEL).items() if "score" not in name)
    assert one["all"] == adapters + weights + padding


# ------------------------------------------------------------------------------------------------------- checkpoints


def resumed(layout: Layout, directory: Path) -> dict[str, Tensor]:
    runner = build_runner(layout, optimizer=OPTIMIZER, lora=LORA)
    checkpoint.load(directory, runner, optimizer=True)
    runner.train_step(mini_batch("lm"), loss_function)
    return exported(runner)


@pytest.mark.parametrize("layout", [SP2, PP2], ids=["the same layout", "PP2"])
def test_training_goes_on_with_its_adapters(layout: Layout, results: dict[str, Any]) -> None:
    expected = results["TP2+SP, recomputed"][0]["one more"]
    for parameters in run_ranks(resumed, 2, layout, results["saved"]):
        close(f"resumed in {layout}", parameters, expected, 0 if layout == SP2 else 1e-5)


def read_without_adapters(directory: Path) -> dict[str, Any]:
    runner = build_runner({})
    checkpoint.load(directory, runner)
    assert lora.attached(runner.chunks) is None
    merged = exported(runner)
    trained = build_runner({}, optimizer=OPTIMIZER)
    other = build_runner({}, optimizer=OPTIMIZER, lora=LoRAConfig(rank=2))
    errors = []
    for wrong in (trained, other):
        with pytest.raises(ConfigError, match=r"was saved with model.lora = rank=3") as error:
            checkpoint.load(directory, wrong, optimizer=True)
        errors.append(str(error.value))
    plain = directory.with_name("plain")
    checkpoint.save(plain, runner, checkpoint_files.Manifest(head="lm", step=0, model=MODEL))
    return {
        "merged": merged,
        "names": [name for name, _ in named_parameters(runner)],
        "errors": errors,
        "recorded": (checkpoint_files.read_manifest(directory).lora, checkpoint_files.read_manifest(plain).lora),
    }


def test_who_reads_the_weights_alone_gets_them_merged(results: dict[str, Any]) -> None:
    (read,) = run_ranks(read_without_adapters, 1, results["saved"])
    close("merged on load", read["merged"], results["TP2+SP, recomputed"][0]["merged"], 0)
    assert not [name for name in read["names"] if lora.SUFFIX in name]
    assert read["recorded"] == (LORA, None)
    assert read["errors"][0].endswith("with None")
    assert "rank=2" in read["errors"][1]


def bf16_run(directory: Path) -> tuple[bool, bool, float]:
    """Adapters of a bf16 critic: updates are kept in fp32, resumed bit for bit, and move the outputs."""
    rows = mini_batch("scalar")
    small, some = OptimizerConfig(lr=1e-3), LoRAConfig(rank=3, targets=("linear_qkv", "linear_fc2"))

    def critic() -> ModelRunner:
        return build_runner(SP2, head="scalar", precision="bf16", optimizer=small, lora=some)

    runner = critic()
    before, _ = runner.infer(rows["tokens"], rows["lengths"], outputs=1)
    runner.train_step(rows, loss_function)
    checkpoint.save(directory, runner, checkpoint_files.Manifest(head="scalar", step=1, model=MODEL, optimizer=True))
    runner.train_step(rows, loss_function)
    after, _ = runner.infer(rows["tokens"], rows["lengths"], outputs=1)
    again = critic()
    checkpoint.load(directory, again, optimizer=True)
    again.train_step(rows, loss_function)
    pairs = zip(named_parameters(runner), named_parameters(again), strict=True)
    trainable: list[Any] = [p for _, p in named_parameters(runner) if p.requires_grad]
    masters = all(p.main_param.dtype == torch.float32 for p in trainable)
    return masters, all(torch.equal(one[1], other[1]) for one, other in pairs), float((after - before).abs().max())


def test_bf16_adapters_have_fp32_masters_and_resume_bit_for_bit(tmp_path: Path) -> None:
    for masters, same, moved in run_ranks(bf16_run, 2, tmp_path / "step_1"):
        assert masters
        assert same
        assert moved > 1e-3


def fused_norm() -> tuple[Tensor, Tensor]:
    """The adapter of a linear that has its norm inside, as TransformerEngine's have, and what it should add."""
    runner = build_runner({})
    layer = unwrap(runner.chunks[0]).decoder.layers[0]
    linear = layer.mlp.linear_fc1
    lora.attach(runner.chunks, LORA)
    adapter = layer.mlp.linear_fc1_lora
    torch.nn.init.normal_(adapter.a)
    torch.nn.init.normal_(adapter.b)
    x = torch.randn(5, 2, HIDDEN)
    without = linear.weight.detach() @ x[..., None]
    linear.layer_norm_weight = torch.rand(HIDDEN) + 0.5  # the stand-in itself does not norm
    added = linear(x)[0].detach() - without[..., 0]
    normed = rms_norm(x, linear.layer_norm_weight, 1e-5)
    return added, (SCALE * adapter.b @ adapter.a).detach().matmul(normed[..., None])[..., 0]


def test_an_adapter_sees_what_a_fused_norm_gives_its_linear() -> None:
    added, expected = run_ranks(fused_norm, 1)[0]
    close("fused norm", added, expected, 1e-4)
