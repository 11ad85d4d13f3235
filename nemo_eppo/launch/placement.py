"""A model on the ranks of a job: micro-batches, pipeline and links, and the seconds that they need for work."""

from dataclasses import dataclass
from typing import NamedTuple

from nemo_eppo.launch.cluster import Cluster, Fixed
from nemo_eppo.launch.work import Shape, Work, ring, update
from nemo_eppo.settings.model import ModelConfig, ModelSetup
from nemo_eppo.settings.training import OptimizerConfig

PARTS = ("compute", "memory", "launches", "links", "host")
"""Parts of a phase's time: FLOPs; bytes of the device's memory; launches and Python; bytes and messages between
ranks; bytes between device and host."""


class Passes(NamedTuple):
    """Work of a rank of the last pipeline stage, which has the most, and that of its neighbours while it waits."""

    own: Work
    waits: Work

    @property
    def path(self) -> Work:
        """All work on the critical path."""
        return self.own + self.waits


@dataclass(frozen=True)
class Placement:
    """A model as a job's ranks run it."""

    job: str
    model: ModelConfig
    setup: ModelSetup
    ranks: int
    ranks_per_node: int
    language: bool
    weights: float
    """Parameters of the rank that has most."""
    trained: float
    """Those of them that learn."""
    optimizer: OptimizerConfig | None = None

    @property
    def shape(self) -> Shape:
        setup = self.setup
        lora = setup.lora is not None
        return Shape(self.model, setup.parallel, setup.precision, self.language, lora, setup.recompute)

    @property
    def replicas(self) -> int:
        return self.setup.parallel.data_parallel_size(self.ranks)

    def forward(self, rows: int, length: int, targets: int) -> Passes:
        """Forward passes over a global batch of `rows` rows; outputs are gathered on all ranks."""
        count, each = self._micro_batches(rows, length)
        last, other = (self.shape.forward(each, length, targets, last=end) for end in (True, False))
        outputs = 8 * rows * length if self.language else 4 * rows * length  # bytes
        sent = Work()
        if self.shape.stages > 1:
            sent += Work(stage_bytes=outputs / self.replicas, stage_messages=1)
        if self.replicas > 1:
            sent += Work(replica_bytes=ring(self.replicas) * outputs, replica_messages=1)
        return Passes(last * count + sent, other * self._bubble)

    def train(self, rows: int, length: int, targets: int) -> Passes:
        """One update on a global mini-batch of `rows` rows."""
        assert self.optimizer is not None
        shape, (count, each) = self.shape, self._micro_batches(rows, length)
        last, other = (
            shape.forward(each, length, targets, last=end) + shape.backward(each, length, targets, last=end)
            for end in (True, False)
        )
        distributed, layers = self.optimizer.is_distributed(self.replicas), shape.layers
        step = update(self.trained, layers, self.replicas, distributed, shape.bytes)
        return Passes(last * count + step, other * self._bubble)

    def hidden(self, cluster: Cluster, rows: int, length: int, targets: int) -> float:
        """Seconds of an update in which gradients are summed while the last micro-batch's backward pass still runs."""
        assert self.optimizer is not None
        if not self.optimizer.overlap_grad_reduce:
            return 0.0
        _, each = self._micro_batches(rows, length)
        sums = self.train(rows, length, targets).own
        sums = Work(replica_bytes=sums.replica_bytes, replica_messages=sums.replica_messages)
        share = 0.5 if self.optimizer.is_distributed(self.replicas) else 1.0  # weights are gathered after the update
        backward = self.seconds(cluster, self.shape.backward(each, length, targets))
        return min(share * self.seconds(cluster, sums), backward)

    def generation(self, rows: int, prompt: int, new: int, at_once: int) -> Work:
        """Decoding of one response to each of `rows` prompts, as many rows at once as fit; see `Shape.decode`.

        While a batch passes through a stage, the other stages have batches of their own.
        """
        mine = -(-rows // self.replicas)
        batches = -(-mine // at_once)
        each, turns = mine / batches, -(-batches // self.shape.stages)
        return (self.shape.prefill(each, prompt) + self.shape.decode(each, prompt + new / 2) * new) * turns

    def parts(self, cluster: Cluster, work: Work) -> dict[str, float]:
        """Seconds of `work` by what they are spent on (PARTS), as if nothing overlapped."""
        fixed = sum(getattr(cluster.fixed, name) * getattr(work, name) for name in Fixed.model_fields)
        parallel, node = self.setup.parallel, self.ranks_per_node
        tp, links = parallel.tensor_model_parallel_size, 0.0
        # Megatron numbers tensor-parallel ranks first, then replicas, then stages
        spans = {"tensor": tp, "replica": tp * self.replicas, "stage": self.ranks, "outside": node + 1}
        for name, span in spans.items():
            link = cluster.inside if span <= node else cluster.between
            links += getattr(work, f"{name}_bytes") / link.bandwidth + getattr(work, f"{name}_messages") * link.latency
        return {
            "compute": work.products / cluster.products_of(self.setup.precision, self.job)
            + work.attention / cluster.attention,
            "memory": work.memory / cluster.memory
            + work.activations / cluster.activations
            + work.decoded / cluster.decoded,
            "launches": fixed,
            "links": links,
            "host": work.host / cluster.host,
        }

    def seconds(self, cluster: Cluster, work: Work) -> float:
        """Seconds of `work`, in which a device overlaps products with reads of weights, and both with launches."""
        parts = self.parts(cluster, work)
        if not cluster.overlaps:
            return sum(parts.values())
        products = work.products / cluster.products_of(self.setup.precision, self.job)
        device = parts["compute"] + parts["memory"] - min(products, work.memory / cluster.memory)
        return max(device, parts["launches"]) + parts["links"] + parts["host"]

    @property
    def _bubble(self) -> float:
        """Micro-batches that a stage waits for the others: fewer if its layers are interleaved."""
        parallel = self.setup.parallel
        return (self.shape.stages - 1) / (parallel.virtual_pipeline_model_parallel_size or 1)

    def _micro_batches(self, rows: int, length: int) -> tuple[int, float]:
        """Number of a replica's micro-batches, and rows of each."""
        mine, setup = rows / self.replicas, self.setup
        most = setup.micro_batch_size
        if setup.micro_batch_tokens is not None:
            most = max(1, setup.micro_batch_tokens // length)
        count = max(1, -int(-mine // most))
        return count, mine / count
