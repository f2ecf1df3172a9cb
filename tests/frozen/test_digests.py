"""What a run learns stays, to the last bit: losses, scores, weights and their names.

Bit for bit where this machine is like one that the golden file knows; elsewhere (skipped tests say
so) the losses are compared to a thousandth.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from frozen import digests, store

CASES = [(family, variant) for family in digests.FAMILIES for variant in digests.VARIANTS]


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return store.plain(digests.measure(tmp_path_factory.mktemp("digests")))


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_bit_for_bit(now: dict[str, Any], family: str, variant: str) -> None:
    known, here = store.read("digests"), digests.environment()
    if here not in known:
        pytest.skip(
            f"only the losses are compared, to 1e-3: the golden file knows {' and '.join(known)}, "
            f"this is {here}"
        )
    golden = known[here][family][variant]
    message = store.differences(golden, now[family][variant], "digests")
    assert not message, message


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_losses_and_names_anywhere(now: dict[str, Any], family: str, variant: str) -> None:
    for golden in store.read("digests").values():
        frozen, fresh = golden[family][variant], now[family][variant]
        assert fresh["losses"] == pytest.approx(frozen["losses"], rel=1e-3)
        assert fresh["names"] == frozen["names"]


@pytest.mark.parametrize("family", digests.FAMILIES)
@pytest.mark.parametrize("variant", ["one process", "two processes"])
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    now: dict[str, Any], family: str, variant: str
) -> None:
    assert now[family][f"{variant}, stopped"] == now[family][variant]


def test_the_control_is_another_seed(now: dict[str, Any]) -> None:
    family = digests.FAMILIES[0]
    here, other = now[family]["one process"], now[family][digests.OTHER_SEED]
    assert here["names"] == other["names"]
    for part in ("losses", "scores", "best", "last"):
        assert here[part] != other[part]
    assert other["losses"] != pytest.approx(here["losses"], rel=1e-3)


def test_the_control_is_one_bit() -> None:
    state = {"b": torch.ones(2), "a": torch.zeros(1, dtype=torch.int64)}
    turned = {"a": state["a"], "b": torch.nextafter(state["b"], torch.zeros(2))}
    assert digests.weights_digest(state) == digests.weights_digest(dict(reversed(state.items())))
    assert digests.weights_digest(state) != digests.weights_digest(turned)
    assert digests.names_digest(state) == digests.names_digest(turned)
    assert digests.names_digest(state) != digests.names_digest({"c": state["b"], "a": state["a"]})
