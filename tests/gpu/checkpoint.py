"""A checkpoint of weights and optimizer that goes from a CPU to the device and back is the same, bit for bit.

A process that sees no GPU trains and saves; this one loads that and saves it anew, while it works on; the other loads
it again.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from checks import PRECISIONS, TINY, passed
from networks import even_rows, mean_nll, our_runner
from pairs import Options, Row
from torch import Tensor

from nemo_eppo.megatron import device
from nemo_eppo.megatron.checkpoint import load, save
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.saving import CheckpointSaver
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.models.checkpoint_files import Manifest
from nemo_eppo.settings.model import Precision

MODEL = TINY
KINDS = tuple(product(PRECISIONS, (False, True)))
"""Precisions, and whether the optimizer is distributed."""
MANIFEST = Manifest(head="lm", step=2, model=MODEL, optimizer=True)
Digests = dict[str, str]


def measure(options: Options) -> Iterator[Row]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, folder]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdin is not None
            assert other.stdout is not None
            for precision, distributed in KINDS:
                saved: Digests = json.loads(other.stdout.readline())
                here = through(Path(folder) / f"{precision}_{distributed}", precision, distributed)
                other.stdin.write("\n")
                other.stdin.flush()
                again: Digests = json.loads(other.stdout.readline())
                for what, found in (("loaded from a CPU", here), ("saved here, loaded on a CPU", again)):
                    same = sum(found.get(name) == digest for name, digest in saved.items())
                    optimizer = {"precision": precision, "distributed optimizer": distributed}
                    row: Row = {"what": what, **optimizer, "device": str(device.device())}
                    ok = found == saved
                    yield passed({**row, "found": f"{same} tensors are the same"}, f"all {len(saved)}", ok)


def through(directory: Path, precision: Precision, distributed: bool) -> Digests:
    """Load a checkpoint on this process's device and save it again, beside."""
    runner = our_runner(MODEL, precision=precision, trained=True, distributed=distributed)
    load(directory, runner, optimizer=True)
    found = digests(runner)
    saver = CheckpointSaver(directory.with_suffix(".again"), None, asynchronous=True)
    saver.save(runner, MANIFEST)
    while not saver.path(MANIFEST.step).exists():
        torch.rand(1, device=device.device()).item()  # it takes pinned memory, as the writer's is
        saver.poll()
    saver.finish()
    return found


def digests(runner: ModelRunner) -> Digests:
    """Digests of all weights, and of the optimizer's own copies and states."""
    tensors = dict(export_tensors(runner.chunks, MODEL))
    for part in runner.optimizer.chained_optimizers:
        for group, members in enumerate(part.optimizer.param_groups):
            for place, parameter in enumerate(members["params"]):
                states = {"copy": parameter, **part.optimizer.state[parameter]}
                updates = states.get("step", members.get("step"))  # a fused Adam counts them with the group
                states["step"] = torch.tensor(float(updates))
                tensors |= {f"optimizer {group} {place} {key}": value for key, value in states.items()}
    return {name: digest(tensor) for name, tensor in tensors.items()}


def digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def on_a_cpu(folder: Path) -> None:
    """The other process: it prints digests of what it has saved and then, when told to go on, of what it has loaded."""
    assert not device.on_gpu()
    for precision, distributed in KINDS:
        build = partial(our_runner, MODEL, precision=precision, trained=True, distributed=distributed)
        runner = build()
        for _ in range(2):
            runner.train_step(even_rows(4, 16, MODEL.vocab_size), mean_nll)
        directory = folder / f"{precision}_{distributed}"
        save(directory, runner, MANIFEST)
        print(json.dumps(digests(runner)), flush=True)
        sys.stdin.readline()
        runner = build()
        load(directory.with_suffix(".again") / f"step_{MANIFEST.step:06d}", runner, optimizer=True)
        print(json.dumps(digests(runner)), flush=True)


if __name__ == "__main__":
    on_a_cpu(Path(sys.argv[1]))
