"""The model, its log-probs and its energies against transformers, on the same weights, one unpadded row at a time."""

from typing import Any

import pytest
import torch
from distributed import run_ranks
from features import DYNAMIC, GEMMA2, LLAMA3, MISTRAL, PHI3, QWEN3, YARN
from tiny import (
    MODEL,
    PP2,
    PRESETS,
    SP2,
    TP2,
    Layout,
    build_runner,
    close,
    exported,
    inputs,
    random_batch,
    random_weights,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.models.hf_config import hf_config, model_config_from_hf
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.model import ModelConfig
from nemo_eppo.settings.training import OptimizerConfig

LAYERS = (-1, 1)
FAMILIES = {
    "Llama": MODEL,
    "Llama tied": MODEL.model_copy(update={"tie_embeddings": True}),
    "Llama 3.1": MODEL.model_copy(update={"rope_scaling": LLAMA3}),
    "Mistral": MODEL.model_copy(
        update={"family": "Mistral", "num_query_groups": None, "norm_epsilon": 1e-6, "rope_scaling": DYNAMIC}
    ),
    "Mistral windowed": MODEL.model_copy(update=MISTRAL),
    "Qwen2": MODEL.model_copy(update={"qkv_bias": True, "rotary_base": 1e6, "rope_scaling": YARN}),
    "Qwen2 tied": MODEL.model_copy(update={"qkv_bias": True, "tie_embeddings": True}),
    "Qwen3": MODEL.model_copy(update={"qk_norm": True, "head_dim": 12}),
    "Qwen3 tied": MODEL.model_copy(update={"qk_norm": True, "tie_embeddings": True}),
    "Qwen3 windowed": MODEL.model_copy(update=QWEN3),
    "Gemma2": MODEL.model_copy(update=GEMMA2),
    "Phi3": MODEL.model_copy(update=PHI3),
}


def transformers_model(family: str, model: ModelConfig) -> Any:
    settings = hf_config(model, family.split()[0] + "ForCausalLM")
    config = AutoConfig.for_model(**settings, pad_token_id=None)
    network = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    weights = random_weights(model)
    missing, _ = network.load_state_dict({n: w for n, w in weights.items() if "score" not in n}, strict=False)
    assert set(missing) <= ({"lm_head.weight"} if model.tie_embeddings else set())
    network.tie_weights()
    assert model_config_from_hf(settings) == model
    return network


def transformers_logprobs(network: Any) -> Tensor:
    """Log-prob and entropy [N, S, 2] of `random_batch`, 0 where there is no target."""
    batch = random_batch()
    outputs = torch.zeros(*batch["tokens"].shape, 2)
    for row, length in enumerate(batch["lengths"].tolist()):
        tokens = batch["tokens"][row, :length]
        logp = network(tokens[None]).logits[0, :-1].log_softmax(-1)
        outputs[row, : length - 1, 0] = logp.gather(-1, tokens[1:, None])[:, 0]
        outputs[row, : length - 1, 1] = -(logp.exp() * logp).sum(-1)
    return outputs


def model_width(network: Any) -> int:
    """Width of the MLP between its projections."""
    width: int = network.config.intermediate_size
    return width


@torch.no_grad()
def transformers_l1_norms(network: Any) -> dict[tuple[int, str], tuple[Tensor, Tensor, int, int]]:
    """L1 norms [N, S] of what enters and leaves each module of each layer in LAYERS, and the two widths."""
    batch = random_batch()
    seen: dict[Any, tuple[Tensor, Tensor]] = {}
    modules: dict[tuple[int, str], Any] = {}
    halves = {"gate_proj": slice(0, model_width(network)), "up_proj": slice(model_width(network), None)}
    for layer in LAYERS:
        block = network.model.layers[layer]
        names = {"layer": block, "mlp": block.mlp}
        fused = getattr(block.mlp, "gate_up_proj", None)
        names |= {name: fused or getattr(block.mlp, name) for name in halves} | {"down_proj": block.mlp.down_proj}
        modules |= {(layer, name): module for name, module in names.items()}

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        seen[module] = (entered[0], (output[0] if isinstance(output, tuple) else output)[0])

    for module in modules.values():
        module.register_forward_hook(hook, with_kwargs=True)
    norms: dict[tuple[int, str], tuple[Tensor, Tensor, int, int]] = {}
    for row, length in enumerate(batch["lengths"].tolist()):
        network(batch["tokens"][row : row + 1, :length])
        for key, module in modules.items():
            entered, left = seen[module]
            if key[1] in halves and left.size(-1) > model_width(network):  # one linear is both
                left = left[..., halves[key[1]]]
            shape = batch["tokens"].shape
            widths = (entered.size(-1), left.size(-1))
            e_in, e_out, *_ = norms.setdefault(key, (torch.zeros(shape), torch.zeros(shape), *widths))
            e_in[row, :length], e_out[row, :length] = entered.abs().sum(-1), left.abs().sum(-1)
    return norms


def expected_energies(norms: dict[Any, Any], config: EnergyProbeConfig) -> Tensor:
    """METHODS of EPPO: the per-token values of each preset, [N, S, E]."""
    linears = ("gate_proj", "up_proj", "down_proj")
    modules = {"paper": ("layer",), "mlp_block": ("mlp",), "down_proj": ("down_proj",)}.get(config.preset, linears)
    columns = []
    for layer in config.layers:
        for module in modules:
            entered, left, width_in, width_out = norms[layer, module]
            if config.norm:
                entered, left = entered / width_in, left / width_out
            columns.append(left if config.preset == "mlp_linears_out" else entered - left)
    return torch.stack(columns, dim=-1)


def megatron_logprobs(layout: Layout, micro_batch_tokens: int | None) -> dict[str, Tensor]:
    """Of all families, in one process group."""
    return {
        family: build_runner(layout, model, micro_batch_tokens=micro_batch_tokens).infer(*inputs(), outputs=2)[0]
        for family, model in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def scored() -> dict[str, list[dict[str, Tensor]]]:
    cases: tuple[tuple[Layout, int, int | None], ...] = (({}, 1, None), ({}, 1, 25), (TP2, 2, None), (PP2, 2, 25))
    return {
        f"{layout}, packed {packed}": run_ranks(megatron_logprobs, ranks, layout, packed)
        for layout, ranks, packed in cases
    }


def megatron_energies(layout: Layout, model: ModelConfig, configs: list[EnergyProbeConfig]) -> list[Tensor]:
    runner = build_runner(layout, model)
    energies = []
    for config in configs:
        runner.probe = EnergyProbe(config, runner.chunks, model.num_layers)
        _, read = runner.infer(*inputs(), outputs=2, energies=True)
        assert read is not None
        energies.append(read)
    return energies


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropies_are_those_of_transformers(
    family: str, scored: dict[str, list[dict[str, Tensor]]]
) -> None:
    expected = transformers_logprobs(transformers_model(family, FAMILIES[family])).detach()
    for case, ranks in scored.items():
        for rank in ranks:
            close(f"{family}, {case}, log-prob", rank[family][..., 0], expected[..., 0])
            close(f"{family}, {case}, entropy", rank[family][..., 1], expected[..., 1])


def weighted_batch() -> Rows:
    """`random_batch`, with a weight of its own for every log-prob and every entropy: 0 where there is no target."""
    rows = random_batch()
    targets = rows["targets"].unsqueeze(-1).expand(-1, -1, 2)
    weights = torch.linspace(0.05, 0.15, targets.numel()).view(targets.shape)
    return rows | {"weights": torch.where(targets == IGNORE, 0, weights)}


def weighted_sum(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    return (rows["weights"] * output).sum(), {}


def megatron_gradients(layout: Layout, families: list[str], micro_batch_tokens: int | None) -> list[dict[str, Tensor]]:
    """Gradients of `weighted_sum`, as whole tensors under their Hugging Face names."""
    gradients = []
    for family in families:
        model = FAMILIES[family]
        optimizer = OptimizerConfig(lr=0.1, clip_grad=0.0)
        runner = build_runner(layout, model, optimizer=optimizer, micro_batch_tokens=micro_batch_tokens)
        runner.train_step(weighted_batch(), weighted_sum)
        for chunk in runner.chunks:
            for parameter in chunk.parameters():
                parameter.data.copy_(parameter.main_grad)
        gradients.append(exported(runner, model))
    return gradients


def transformers_gradients(family: str, model: ModelConfig) -> dict[str, Tensor]:
    network = transformers_model(family, model)
    outputs = transformers_logprobs(network)
    weighted_sum(outputs, weighted_batch())[0].backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize(("layout", "ranks", "packed"), [({}, 1, 25), (SP2, 2, None), (PP2, 2, 25)])
def test_gradients_are_those_of_transformers(layout: Layout, ranks: int, packed: int | None) -> None:
    families = ["Llama 3.1", "Mistral windowed", "Qwen3 windowed", "Gemma2"]
    for gradients in run_ranks(megatron_gradients, ranks, layout, families, packed):
        for family, got in zip(families, gradients, strict=True):
            expected = transformers_gradients(family, FAMILIES[family])
            assert min(float(tensor.abs().max()) for tensor in expected.values()) > 1e-3
            close(f"{family}, {layout}, gradient", got, expected)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3", "Mistral windowed"])
def test_energies_are_those_of_hooks_on_transformers(family: str) -> None:
    model = FAMILIES[family]
    configs = [EnergyProbeConfig(preset=p, layers=LAYERS, norm=norm) for p in PRESETS for norm in (True, False)]
    configs += [EnergyProbeConfig(layers=(layer,)) for layer in LAYERS]
    norms = transformers_l1_norms(transformers_model(family, model))
    for config, energies in zip(configs, run_ranks(megatron_energies, 1, {}, model, configs)[0], strict=True):
        expected = expected_energies(norms, config)
        assert float(expected.abs().max()) > 0.1
        # sums over the width, and with them their rounding, are as much larger than means
        tolerance = 1e-5 if config.norm else 1e-5 * MODEL.ffn_hidden_size
        close(f"{config.preset} {config.layers} norm={config.norm}", energies, expected, tolerance)
