"""What jobs import, for processes that are forked: see `nursery.py`. It starts no thread and computes nothing."""

import gc
import importlib
import os

from setproctitle import setproctitle

setproctitle("nemo-eppo launch: nursery of jobs")  # before anything changes the environment, which is room for titles
os.setsid()  # early: a signal to the launcher's group is not for this process, which knows how jobs have ended
for _job in ("sft", "reward_model", "critic", "ppo_loop"):
    importlib.import_module(f"nemo_eppo.training.{_job}")
importlib.import_module("nemo_eppo.entry.job").import_nemo()
gc.freeze()  # jobs share these objects as long as no garbage collection writes to them
