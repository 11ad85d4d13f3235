"""Speeds of a cluster's ranks and links, from which the time of a step is estimated."""

from pathlib import Path

from pydantic import Field

from nemo_eppo.config import Config, ConfigError, load_config, read_yaml
from nemo_eppo.settings.model import Precision


class Link(Config):
    """A link between two ranks, as one of them sees it."""

    bandwidth: float = Field(gt=0)
    """Bytes per second that a rank sends while it receives as many."""
    latency: float = Field(ge=0)
    """Seconds that a message, or a collective of few bytes, takes."""


class Fixed(Config):
    """Seconds of the host for each pass, however small: launches and Python."""

    layer: float = Field(ge=0)
    """Forward pass of one layer."""
    forward: float = Field(ge=0)
    """Forward pass of a micro-batch, beside its layers."""
    layer_backward: float = Field(ge=0)
    """Backward pass of one layer."""
    backward: float = Field(ge=0)
    """Backward pass of a micro-batch, beside its layers: its loss included."""
    layer_update: float = Field(ge=0)
    """Update of one layer's weights."""
    update: float = Field(ge=0)
    """An update, beside its layers and micro-batches."""
    layer_decode: float = Field(ge=0)
    """One layer of a decoding step."""
    decode: float = Field(ge=0)
    """A decoding step, beside its layers: sampling included."""
    request: float = Field(ge=0)
    """A request to a server and its answer."""
    step: float = Field(ge=0)
    """A step of PPO: rewards, advantages, mini-batches."""
    token: float = Field(ge=0)
    """Each token of the rollout batch in a step, padding included: lists, tensors and rewards on the host."""


class Cluster(Config):
    """Figures of one rank, which has a GPU or, on CPUs, a core of its own, and of the links between ranks."""

    products: dict[Precision, float] = Field(min_length=1)
    """FLOP/s that matrix products reach, by precision; 2 FLOPs are a multiplication and an addition."""
    attention: float = Field(gt=0)
    """FLOP/s that attention reaches in a forward pass, counting what a token sees: half of the square if causal."""
    memory: float = Field(gt=0)
    """Bytes per second at which weights, caches and optimizer states are read and written."""
    activations: float = Field(gt=0)
    """Bytes per second at which operations between matrix products (norms, gates, softmax) read and write."""
    decoded: float = Field(gt=0)
    """As `activations`, while the Megatron engine decodes, where tensors are small."""
    host: float = Field(gt=0)
    """Bytes per second between a device and the host's memory, where the reference waits."""
    overlaps: bool
    """Whether launches and reads of weights go on during matrix products, so that the longest counts (GPUs), or each
    waits for the others, so that all add up (CPUs)."""
    cores: int | None = Field(None, ge=1)
    """Cores that the ranks of all jobs share; null where each has a device of its own."""
    inside: Link
    """Between ranks of one node."""
    between: Link
    """Between ranks of different nodes."""
    fixed: Fixed

    def products_of(self, precision: Precision, job: str) -> float:
        """Return the FLOP/s of matrix products; ConfigError if they are not known in the precision of `job`."""
        if precision not in self.products:
            raise ConfigError(
                f"products has no figure for jobs.{job}.settings.model.precision = {precision}, only for "
                f"{', '.join(self.products)}"
            )
        return self.products[precision]


H100 = Cluster(
    products={"bf16": 0.65 * 989e12, "fp32": 0.65 * 67e12},
    attention=0.35 * 989e12,
    memory=0.8 * 3.35e12,
    activations=0.8 * 3.35e12,
    decoded=0.8 * 3.35e12,
    host=0.8 * 64e9,
    overlaps=True,
    inside=Link(bandwidth=0.8 * 450e9, latency=10e-6),
    between=Link(bandwidth=0.8 * 50e9, latency=30e-6),
    fixed=Fixed(
        layer=300e-6,
        forward=2e-3,
        layer_backward=400e-6,
        backward=2e-3,
        layer_update=20e-6,
        update=5e-3,
        layer_decode=200e-6,
        decode=300e-6,
        request=15e-3,
        step=2e-3,
        token=1e-6,
    ),
)
"""H100 SXM5 with NVLink 4 and one 400 Gb/s InfiniBand port for each GPU. Nothing here was measured.

NVIDIA's datasheet of the H100 SXM gives 989 TFLOP/s in bf16 without sparsity, 67 in fp32, 3.35 TB/s of memory, 900
GB/s of NVLink (450 each way) and 128 GB/s of PCIe 5 (64 each way); ConnectX-7's gives 400 Gb/s. Assumed is what is
reached of them: 65% by matrix products, 35% by attention (FlashAttention-2, as arXiv 2407.08608 found on this GPU), 80%
by memory and links. Latencies are assumed, and so are the seconds of launches: 30 to 50 operations of a layer at 5 to
10 microseconds each, without CUDA graphs. `request` and `token` are those of tests/benchmarks/results, on a CPU.
"""


def read_cluster(name: str) -> Cluster | None:
    """Read the argument of `--estimate`: h100, or a YAML file with the figures of Cluster; None for `here`.

    Raises:
        ConfigError: there is no such file, or a figure is unknown, missing or wrong (named).
    """
    if name == "here":
        return None
    if name == "h100":
        return H100
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--estimate = {name!r}: expected h100, here, or a YAML file with figures of a cluster")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping with the figures {', '.join(Cluster.model_fields)}")
    try:
        return load_config(Cluster, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
