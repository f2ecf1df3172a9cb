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


def test_copies_from_the_host_wait_unless_they_need_not() -> None:
    """The device of these tests is torch's `meta`, which has no values and takes any copy."""
    there = torch.empty(4, device="meta")
    for waits in (
        lambda: torch.zeros(4).to("meta"), lambda: torch.ones(4, dtype=torch.int64).to(there),
        lambda: torch.zeros(4).to(device="meta", dtype=torch.bool),
        lambda: there.copy_(torch.ones(4)),
    ):  # fmt: skip
        with SyncCounter() as counter:
            waits()
        assert counter.syncs == 1, counter.places
    for goes_on in (
        lambda: torch.zeros(4).to("meta", non_blocking=True),
        lambda: there.copy_(torch.ones(4), non_blocking=True),
        lambda: there.to(torch.bfloat16), lambda: there.copy_(there * 2),
        lambda: torch.zeros(4).long(),
    ):  # fmt: skip
        with SyncCounter() as counter:
            goes_on()
        assert counter.syncs == 0, counter.places


def test_nothing_is_counted_outside_of_the_block() -> None:
    x = torch.arange(4.0)
    with SyncCounter() as counter:
        x.tolist()
        operators = counter.operators
    x.tolist()
    x.sum().item()
    assert (counter.syncs, counter.operators) == (1, operators)
