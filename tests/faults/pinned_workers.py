"""A process whose pinned batches come from workers that are killed; it has to end by itself."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
from torch.utils.data._utils import pin_memory

from camoxpert.config import DataConfig
from camoxpert.data import supervise
from camoxpert.data.files.manifest import load_train
from camoxpert.data.loader import LoaderPlan, build_loader
from camoxpert.errors import DataError

# torch's own thread for pinned memory, without a device.
torch.accelerator.is_available = lambda: True
torch.accelerator.current_accelerator = lambda *_, **__: torch.device("cpu")
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.set_device_index = lambda *_: None
pin_memory.pin_memory = lambda data, *_: data
supervise.POLL_SECONDS = 0.5


def main() -> None:
    data = DataConfig(img_size=32, start_method="fork")
    plan = LoaderPlan(2, pin_memory=True)
    loader = build_loader(load_train([Path(sys.argv[1])]), data, plan, batch_size=2, seed=1)
    seen: list[object] = []
    try:
        for _ in loader:
            (iterator,) = loader.running
            if iterator in seen:
                continue
            if seen:
                # Once with messages of the dead unread, once with all of them read.
                time.sleep(1)
            seen.append(iterator)
            assert hasattr(iterator, "_pin_memory_thread")
            # As if the worker had been killed in the middle of a message.
            assert iterator._worker_result_queue._wlock.acquire(timeout=10)
            os.kill(iterator._workers[0].pid, signal.SIGKILL)
            # A step: torch's thread then waits at other moments than ours.
            time.sleep(1.5)
    except DataError as error:
        print(type(error).__name__, flush=True)
        raise SystemExit(error.exit_code) from None


main()
