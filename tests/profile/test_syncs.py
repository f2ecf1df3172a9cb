"""Host syncs are counted on a CPU, and nothing of torch is replaced."""

import numpy as np
import torch

from camoxpert.profile.syncs import SyncCounter


def test_every_kind_of_sync_is_counted_where_it_is_caused() -> None:
    x = torch.arange(4.0)
    for read in (
        lambda: x.sum().item(), lambda: bool(x.sum() > 0), lambda: float(x[0]), lambda: x.tolist(),
        lambda: x.nonzero(), lambda: x[x > 1], lambda: x.long().bincount(), lambda: x.unique(),
        lambda: x.numpy(), lambda: np.array(x),
    ):  # fmt: skip
        with SyncCounter() as counter:
            read()
        assert counter.syncs == 1, counter.places
        assert "test_syncs.py" in next(iter(counter.places))
    with SyncCounter() as counter:
        _ = (x * 2).sum().sqrt()
    assert counter.syncs == 0


def test_nothing_is_counted_outside_of_the_block() -> None:
    x = torch.arange(4.0)
    with SyncCounter() as counter:
        x.tolist()
        operators = counter.operators
    x.tolist()
    x.sum().item()
    assert (counter.syncs, counter.operators) == (1, operators)
