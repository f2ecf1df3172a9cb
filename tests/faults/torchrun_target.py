"""The program as torchrun starts it in a test; rank 1 dies once, in its sixth step."""

from __future__ import annotations

import os
import signal
import sys

import torch

from camoxpert.cli import main
from camoxpert.training import trainer

torch.set_num_threads(1)
honest = trainer.train_step
steps = []


def mortal(*arguments, **options):
    steps.append(1)
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first_life and os.environ["RANK"] == "1" and len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*arguments, **options)


trainer.train_step = mortal
sys.exit(main(sys.argv[1:]))
