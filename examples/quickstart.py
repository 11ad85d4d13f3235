"""A whole EPPO run on a small task, on two CPU cores: what a real run does, in minutes.

1. Data: prompts of shuffled words; a good answer repeats the nouns in order and stops. A program knows how good an
   answer is (the gold reward). Preference labels come from it too, but half of them favour an answer that hedges.
2. A tiny Llama-style model is fine-tuned on imperfect demonstrations, and a reward model on the biased preferences.
3. The reward model and the critic start as PyTriton servers.
4. EPPO trains the policy on two tensor-parallel ranks against them, with the energy-loss penalty.
5. A report compares what the reward model says (proxy) with what is true (gold), before and after.

Everything is written to the output directory: report.html, summary.json, and the run directories and logs of every job.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from nemo_eppo.data.noun_task import write_noun_task
from nemo_eppo.observability.recorder import read_rows, recorded_steps
from nemo_eppo.observability.report import report_from_run, summary_table, validation_means, write_summary

SCRIPTS = Path(__file__).resolve().parent / "nlp" / "gpt"
GRACE_S = 30.0  # how long a job may take to stop before it is killed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MARK = ".quickstart"  # in every directory that this script made, and may therefore replace
TENSOR_PARALLEL = 2
MODEL = (
    "{num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 4, max_sequence_length: 48, "
    "rotary_base: 100, init_std: 0.05}"
)


class Jobs:
    """Processes of the quickstart, each with a log; leaving the `with` block ends every one of them."""

    def __init__(self, logs: Path) -> None:
        self._logs, self._running = logs, list[subprocess.Popen[str]]()
        logs.mkdir()

    def __enter__(self) -> "Jobs":
        # What a dead job leaves behind becomes a child of this process (PR_SET_CHILD_SUBREAPER), so `stop` finds it.
        ctypes.CDLL(None).prctl(36, 1)
        for number in STOP_SIGNALS:  # SIGINT too: a shell starts background processes with Ctrl-C ignored
            signal.signal(number, _interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
        self.stop()

    def run(self, name: str, script: str, settings: Sequence[str], ranks: int = 1) -> None:
        """Run a job to its end, showing its progress."""
        process = self._start(name, script, settings, ranks, stdout=subprocess.PIPE)
        shown, line = 0.0, ""
        assert process.stdout is not None
        with self._log(name).open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if "s/step" in line and time.monotonic() - shown > 5:
                    print("   ", line.rstrip(), flush=True)
                    shown = time.monotonic()
        if process.wait():
            self._fail(name, f"ended with exit status {process.returncode}")

    def serve(self, name: str, script: str, settings: Sequence[str], ready: Path) -> "Server":
        """Start a server job; its address is known once `ready` exists."""
        log = self._log(name).open("a")
        process = self._start(name, script, [*settings, "server.port=0", f"server.ready_file={ready}"], 1, stdout=log)
        return Server(self, name, process, ready)

    def stop(self) -> None:
        """End all jobs and whatever they started: first asked, then killed."""
        family = psutil.Process().children(recursive=True)
        for process in self._running:
            process.terminate()
        psutil.wait_procs(family, GRACE_S)
        for straggler in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                straggler.kill()
        self._running.clear()

    def _start(
        self, name: str, script: str, settings: Sequence[str], ranks: int, stdout: int | IO[str]
    ) -> subprocess.Popen[str]:
        launcher = [sys.executable, "-u"]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        process = subprocess.Popen(
            [*launcher, str(SCRIPTS / script), *settings],
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            # the jobs share the cores; a GPU would have to be two, one for each tensor-parallel rank
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C reaches this process, which then ends the jobs in good order
        )
        self._running.append(process)
        return process

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _fail(self, name: str, what: str) -> None:
        tail = "".join(self._log(name).read_text().splitlines(keepends=True)[-25:])
        raise SystemExit(f"\n{tail}\nquickstart: {name} {what}; its log is {self._log(name)}")


class Server:
    """A server job that is coming up or up."""

    def __init__(self, jobs: Jobs, name: str, process: subprocess.Popen[str], ready: Path) -> None:
        self._jobs, self._name, self._process, self._ready = jobs, name, process, ready

    def url(self) -> str:
        """Its address, as soon as it answers."""
        while not self._ready.exists():
            if self._process.poll() is not None:
                self._jobs._fail(self._name, "did not start")
            time.sleep(0.2)
        return str(json.loads(self._ready.read_text())["url"])


def _interrupted(number: int, _: object) -> None:
    print("\nquickstart: interrupted, stopping all jobs", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def main() -> None:
    options = parse()
    started = time.monotonic()
    out: Path = options.output.absolute()
    make_anew(out)
    steps = options.steps
    sizes = {"sft_examples": 40_000, "preference_pairs": 16_000, "prompts": 12_000, "validation_examples": 256}
    sft_steps, reward_steps = 1250, 1000
    if options.fast:
        sizes = {"sft_examples": 512, "preference_pairs": 256, "prompts": 256, "validation_examples": 32}
        sft_steps, reward_steps = 10, 5

    def stage(number: int, what: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {number}/5 {what}", flush=True)

    with Jobs(out / "logs") as jobs:
        stage(1, "generating the noun task")
        data = out / "data"
        write_noun_task(data, options.seed, **sizes)

        stage(2, "training the SFT model, then the reward model (about two minutes)")
        common = [f"seed={options.seed}", "exp_manager.create_tensorboard_logger=true"]
        jobs.run(
            "sft",
            "train_gpt_sft.py",
            [
                *common,
                f"exp_manager.explicit_log_dir={out}/sft",
                f"model.architecture={MODEL}",
                f"model.tokenizer={data}/tokenizer",
                "model.micro_batch_size=32",
                f"data.train={data}/sft.train.jsonl",
                f"data.validation={data}/sft.validation.jsonl",
                "sft.global_batch_size=32",
                f"sft.max_steps={sft_steps}",
                "optimizer.lr=4e-3",
                "optimizer.schedule=cosine",
                f"optimizer.warmup_steps={min(20, sft_steps // 2)}",
            ],
        )
        jobs.run(
            "reward_model",
            "train_reward_model.py",
            [
                *common,
                f"exp_manager.explicit_log_dir={out}/reward_model",
                f"model.restore_from_path={out}/sft/checkpoints",
                "model.micro_batch_size=32",
                f"data.train={data}/preferences.train.jsonl",
                f"data.validation={data}/preferences.validation.jsonl",
                "reward.score=sum",
                "reward.l2=0.001",
                "fit.epochs=2",
                "fit.global_batch_size=32",
                f"fit.max_steps={reward_steps}",
                "optimizer.lr=2e-3",
                "optimizer.schedule=cosine",
                f"optimizer.warmup_steps={min(20, reward_steps // 2)}",
            ],
        )

        stage(3, "starting the reward and critic servers")
        reward_model = f"model.restore_from_path={out}/reward_model/checkpoints"
        servers = [
            jobs.serve(
                "reward_server",
                "serve_reward_model.py",
                [f"exp_manager.explicit_log_dir={out}/reward_server", reward_model, "model.micro_batch_size=64"],
                out / "reward.json",
            ),
            jobs.serve(
                "critic_server",
                "serve_ppo_critic.py",
                [
                    *common,
                    f"exp_manager.explicit_log_dir={out}/critic",
                    reward_model,
                    "model.micro_batch_size=64",
                    "optimizer.lr=2e-4",
                ],
                out / "critic.json",
            ),
        ]
        reward_url, critic_url = (server.url() for server in servers)

        stage(4, f"EPPO: {steps} steps, the actor on {TENSOR_PARALLEL} tensor-parallel ranks")
        jobs.run(
            "actor",
            "train_gpt_ppo_actor.py",
            [
                *common,
                f"exp_manager.explicit_log_dir={out}/actor",
                f"model.restore_from_path={out}/sft/checkpoints",
                f"model.parallel.tensor_model_parallel_size={TENSOR_PARALLEL}",
                "model.micro_batch_size=64",
                f"data.train={data}/prompts.train.jsonl",
                f"data.validation={data}/prompts.validation.jsonl",
                "data.max_prompt_length=16",
                "generation.max_new_tokens=20",
                f"ppo.max_steps={steps}",
                "ppo.rollout_batch_size=64",
                "ppo.mini_batch_size=32",
                "ppo.epochs=2",
                f"ppo.energy.eta={options.eta}",
                "ppo.kl.coefficient=0.1",
                "ppo.missing_eos.penalty=2",
                "optimizer.lr=2e-4",
                f"servers.critic.url={critic_url}",
                f"servers.rewards=[{{url: '{reward_url}'}}]",
                "validation.max_prompts=256",
                "validation.interval=10",
                "gold_reward=nemo_eppo.data.noun_task:gold_reward",
            ],
            ranks=TENSOR_PARALLEL,
        )

    print(f"[{time.monotonic() - started:4.0f} s] 5/5 writing the report", flush=True)
    report = out / "report.html"
    report_from_run(out / "actor", report)
    before, after = before_and_after(out / "actor" / "validation")
    write_summary(out / "summary.json", before, after, steps, TENSOR_PARALLEL, time.monotonic() - started)
    print(summary_table(before, after))
    print(f"Report: {report}\nSummary: {out / 'summary.json'}")


def make_anew(directory: Path) -> None:
    """Replace what an earlier quickstart left, and nothing else."""
    if directory.exists() and not (directory / MARK).exists() and (directory.is_file() or any(directory.iterdir())):
        sys.exit(f"quickstart: {directory} was not made by a quickstart and is not replaced; choose another --output")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).touch()


def before_and_after(validation: Path) -> list[Any]:
    """Means over the validation prompts at the first and the last step."""
    files = recorded_steps(validation)
    return [validation_means(read_rows(files[step])) for step in (min(files), max(files))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="quickstart.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/quickstart"),
        help="directory that is made anew (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=50, help="PPO steps (default: %(default)s)")
    parser.add_argument(
        "--eta",
        type=float,
        default=5.0,
        help="weight of the energy penalty, 0 for plain PPO (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of data, models and sampling (default: %(default)s)")
    parser.add_argument(
        "--fast", action="store_true", help="hardly train anything: only to see whether everything runs"
    )
    options = parser.parse_args()
    for name, least in (("steps", 1), ("eta", 0), ("seed", 0)):
        if not getattr(options, name) >= least:  # so written, NaN is refused as well
            parser.error(f"--{name} {getattr(options, name)}: expected at least {least}")
    return options


if __name__ == "__main__":
    main()
