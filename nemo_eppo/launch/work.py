"""The work of one rank in a forward pass, a backward pass, an update or a decoding step: FLOPs, bytes, messages.

With hidden size H, query width Q, key or value width K, MLP width F, vocabulary V, and b bytes for each number, a layer
has W = H (Q + 2 K) + Q H + 3 H F weights in its matrices, divided by the t tensor-parallel ranks as V, Q, K and F are.
For n tokens in rows of S, of which m have a target, one layer and the language model's head take

    products     2 n W, and 2 m H V for the head; a backward pass twice that, the head 3 times, because it projects anew
    attention    4 Q for each pair of a token and one that it sees, S (S + 1) / 2 pairs in a row without a window; a
                 backward pass 2.5 times that (5 products for 2, Dao et al., arXiv 2205.14135, algorithm 4)
    memory       b W, and b H V: weights are read once for each micro-batch; a decoding step reads its cache too
    activations  n b (10 H + 4 Q + 4 K + 5 F), and 4 m V for each time that the head touches its fp32 logits; tensors
                 that norms, additions, rotations and gates read and write, each counted once
    tensor links 2 sums of [n, H] forward and 2 backward (Shoeybi et al., arXiv 1909.08053, section 3); sequence
                 parallelism splits each into a gather and a scatter of the same bytes. A rank sends 2 (t - 1) / t of
                 what is summed, as in a ring.

Recomputation adds a forward pass of the layers to the backward pass. LoRA's backward pass has no products for weights;
those of adapters are not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from nemo_eppo.launch.memory import NUMBER_BYTES
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, Precision

_HEAD_TOUCHES, _HEAD_TOUCHES_BACKWARD, _SAMPLING_TOUCHES = 8, 14, 16
"""How often 4 bytes of each logit are read or written: softmax, log-prob and entropy; their gradient; sampling, some of
it in 8 bytes."""


@dataclass(frozen=True)
class Work:
    """Amounts of work of one rank; they can be added, and multiplied by a number."""

    products: float = 0.0
    """FLOPs of matrix products, 2 for a multiplication and an addition."""
    attention: float = 0.0
    """FLOPs of attention; those of a backward pass included."""
    memory: float = 0.0
    """Bytes of weights, caches and optimizer states that are read or written."""
    activations: float = 0.0
    """Bytes that other operations read or write."""
    decoded: float = 0.0
    """As `activations`, while decoding."""
    host: float = 0.0
    """Bytes moved between device and host memory."""
    tensor_bytes: float = 0.0
    """Bytes sent to tensor-parallel ranks."""
    tensor_messages: float = 0.0
    stage_bytes: float = 0.0
    """Bytes sent to other pipeline stages."""
    stage_messages: float = 0.0
    replica_bytes: float = 0.0
    """Bytes sent to data-parallel ranks."""
    replica_messages: float = 0.0
    outside_bytes: float = 0.0
    """Bytes sent to and from servers on other nodes."""
    outside_messages: float = 0.0
    # how often each of `Fixed` is paid
    layer: float = 0.0
    forward: float = 0.0
    layer_backward: float = 0.0
    backward: float = 0.0
    layer_update: float = 0.0
    update: float = 0.0
    layer_decode: float = 0.0
    decode: float = 0.0
    request: float = 0.0
    step: float = 0.0
    token: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * amount for amount in self))

    def __iter__(self) -> Iterator[float]:
        return (getattr(self, field.name) for field in fields(self))


def ring(ranks: int) -> float:
    """Share of a sum over ranks that each of them sends in a ring: half of it to scatter, half to gather."""
    return 2 * (ranks - 1) / ranks


@dataclass(frozen=True)
class Shape:
    """A model as one of its ranks has it.

    Methods take the `rows` of one micro-batch, a number that need not be whole, of `length` tokens each.
    """

    model: ModelConfig
    parallel: ParallelConfig
    precision: Precision
    language: bool
    """Whether it ends in logits; else in a scalar head, whose work is not counted."""
    adapters: bool = False
    """Whether LoRA trains it."""
    recompute: bool = False

    @property
    def bytes(self) -> int:
        return NUMBER_BYTES[self.precision]

    @property
    def stages(self) -> int:
        return self.parallel.pipeline_model_parallel_size

    @property
    def tensor_ranks(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @property
    def layers(self) -> int:
        """Layers of a stage."""
        return self.model.num_layers // self.stages

    @property
    def matrix(self) -> float:
        """W / t: weights of a layer's matrices on one rank."""
        model = self.model
        query, kv = model.num_attention_heads * model.head_width, model.kv_heads * model.head_width
        return model.hidden_size * (2 * query + 2 * kv + 3 * model.ffn_hidden_size) / self.tensor_ranks

    @property
    def head(self) -> float:
        """Weights of the output projection on one rank; 0 without one."""
        return self.model.hidden_size * self.model.vocab_size / self.tensor_ranks if self.language else 0.0

    @property
    def touched(self) -> float:
        """Numbers that a layer's operations beside products read and write for each token."""
        model = self.model
        width = model.head_width * (model.num_attention_heads + model.kv_heads)
        split = self.tensor_ranks if self.parallel.sequence_parallel else 1
        hidden = (14 if model.post_norms else 10) * model.hidden_size
        return hidden / split + (4 * width + 5 * model.ffn_hidden_size) / self.tensor_ranks

    def pairs(self, length: int) -> float:
        """Mean over layers of the pairs of a token and one that it sees, in a row of `length` tokens."""
        model, whole = self.model, length * (length + 1) / 2
        if model.sliding_window is None or model.sliding_window >= length:
            return whole
        beyond = length - model.sliding_window
        windowed = whole - beyond * (beyond + 1) / 2
        return (whole * len(model.global_layers) + windowed * (model.num_layers - len(model.global_layers))) / (
            model.num_layers
        )

    def attention(self, rows: float, length: int) -> float:
        """FLOPs of one layer's attention over whole rows."""
        width = self.model.num_attention_heads * self.model.head_width / self.tensor_ranks
        return 4 * width * rows * self.pairs(length)

    def sums(self, tokens: float, layers: float) -> Work:
        """Two sums over tensor-parallel ranks of [tokens, H] in each layer, forward or backward."""
        ranks = self.tensor_ranks
        if ranks == 1:
            return Work()
        size = tokens * self.model.hidden_size * self.bytes
        messages = 4 if self.parallel.sequence_parallel else 2
        return Work(tensor_bytes=2 * layers * ring(ranks) * size, tensor_messages=messages * layers)

    def passed_on(self, tokens: float) -> Work:
        """Hidden states sent to the next stage, or their gradients to the one before."""
        if self.stages == 1:
            return Work()
        split = self.tensor_ranks if self.parallel.sequence_parallel else 1
        return Work(stage_bytes=tokens * self.model.hidden_size * self.bytes / split, stage_messages=1)

    def layers_forward(self, rows: float, length: int) -> Work:
        """Forward pass of a stage's layers."""
        tokens, layers = rows * length, self.layers
        return self.sums(tokens, layers) + Work(
            products=2 * tokens * layers * self.matrix,
            attention=layers * self.attention(rows, length),
            memory=layers * self.matrix * self.bytes,
            activations=layers * tokens * self.touched * self.bytes,
            layer=layers,
        )

    def forward(self, rows: float, length: int, targets: float, *, last: bool = True) -> Work:
        """Forward pass of a stage, whose head, if it is the last, gives log-probs of `targets` tokens of each row."""
        own = self.layers_forward(rows, length) + self.passed_on(rows * length) + Work(forward=1)
        return own + self._projected(rows * targets, 1, _HEAD_TOUCHES) if last else own

    def backward(self, rows: float, length: int, targets: float, *, last: bool = True) -> Work:
        """Backward pass of a stage, with the forward pass of its layers if activations are recomputed."""
        tokens, layers = rows * length, self.layers
        own = (
            self.sums(tokens, layers)
            + self.passed_on(tokens)
            + Work(
                products=(1 if self.adapters else 2) * 2 * tokens * layers * self.matrix,
                attention=2.5 * layers * self.attention(rows, length),
                memory=2 * layers * self.matrix * self.bytes,
                activations=2 * layers * tokens * self.touched * self.bytes,
                layer_backward=layers,
                backward=1,
            )
        )
        if self.recompute:
            own += self.layers_forward(rows, length)
        if last:
            own += self._projected(rows * targets, 2 if self.adapters else 3, _HEAD_TOUCHES_BACKWARD)
        return own

    def decode(self, rows: float, context: float) -> Work:
        """One token for each row, on all stages, which wait for each other; a row sees `context` tokens."""
        model, layers, ranks = self.model, self.model.num_layers, self.tensor_ranks
        seen = min(context, model.sliding_window or context)
        cache = 2 * model.kv_heads * model.head_width / ranks * rows * context * self.bytes
        width = model.num_attention_heads * model.head_width / ranks
        work = self.sums(rows, layers) + Work(
            products=2 * rows * (layers * self.matrix + self.head),
            attention=4 * width * rows * seen * layers,
            memory=self.bytes * (layers * self.matrix + self.head) + layers * cache,
            decoded=rows * (layers * self.touched * self.bytes + 4 * _SAMPLING_TOUCHES * model.vocab_size),
            layer_decode=layers,
            decode=1,
        )
        if ranks > 1:  # logits are gathered
            work += Work(tensor_bytes=(ranks - 1) * rows * model.vocab_size / ranks * self.bytes, tensor_messages=1)
        return work + self.passed_on(rows) * (self.stages - 1) + Work(stage_messages=float(self.stages > 1))

    def prefill(self, rows: float, length: int) -> Work:
        """The prompts' pass through all stages before decoding; logits of their last tokens only."""
        work = self.layers_forward(rows, length) * self.stages
        head = Work(products=2 * rows * self.head, layer=-work.layer, layer_decode=work.layer, decode=1)
        return work + head + self.passed_on(rows * length) * (self.stages - 1)

    def _projected(self, targets: float, products: float, touches: int) -> Work:
        if not self.language:
            return Work()
        return Work(
            products=products * 2 * targets * self.head,
            memory=products * self.head * self.bytes,
            activations=4 * touches * targets * self.model.vocab_size / self.tensor_ranks,
        )


def update(trained: float, layers: int, replicas: int, distributed: bool, number_bytes: int) -> Work:
    """Sum gradients over replicas and update a rank's weights with AdamW.

    Args:
        trained: trained weights of a rank, of `number_bytes` bytes each.
        distributed: whether each replica updates its share and gathers those of the others.
    """
    share = trained / replicas if distributed else trained
    work = Work(
        # gradients: zeroed, normed, clipped; weight, gradient and two moments read, three of them written
        memory=trained * (4 + 4 + 8) + share * (16 + 12),
        layer_update=layers,
        update=1,
    )
    if replicas == 1:
        return work
    half = ring(replicas) / 2
    # fp32 gradients are scattered, then they or the weights gathered
    gathered = trained * number_bytes if distributed else 4 * trained
    return work + Work(replica_bytes=half * (4 * trained + gathered), replica_messages=2 if distributed else 1)
