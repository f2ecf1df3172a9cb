"""Use of the experts: counts of a step, shares of an epoch, and an alarm when few are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from camoxpert.config import Config
from camoxpert.models.balance import expert_counts
from camoxpert.models.experts import expert_names
from camoxpert.models.router import Routing
from camoxpert.runs.checkpoint import RoutingValues
from camoxpert.runs.records import LevelRouting


class StepCounts:
    """Counts the choices of one optimizer step over its micro-batches and all ranks, on the device.

    A micro-batch's balance loss sees the choices of the step so far: the whole step's cannot be
    known before the first backward pass.

    Args:
        total: adds up counts over the processes.
    """

    def __init__(self, total: Callable[[Tensor], Tensor] = lambda counts: counts) -> None:
        self.total = total
        self.counts_LE: Tensor | None = None

    def start(self) -> None:
        """Begin an optimizer step."""
        self.counts_LE = None

    @torch.no_grad()
    def add(self, routing: Sequence[Routing]) -> Tensor | None:
        """Add a micro-batch; return the counts so far, (levels, E), or None without routing."""
        if not routing:
            return None
        counts = torch.stack([expert_counts(r.experts_BK, r.probs_BE.shape[1]) for r in routing])
        counts = self.total(counts)
        self.counts_LE = counts if self.counts_LE is None else self.counts_LE + counts
        return self.counts_LE


ALARM_UNITS = 100
"""Images, or regions of images, needed to judge a router: of 100 images that choose 2 of 7 experts
at random, twice the fair number use the same one once in a hundred million epochs."""
LOW_ENTROPY, HIGH_VIOLATION, LOW_SHARE = 0.9, 1.0, 0.1


class RoutingMeter:
    """Counts, per decoder level, which experts were chosen and how much gate mass they got.

    Args:
        levels: names of the levels, in the order of the model's routing records.
        experts: kind of every expert; repeated kinds get a number.

    Attributes:
        units: routing units counted at each level: images, or regions of images.
        ill: the last judged epoch favoured few experts.
        alarmed: the user was warned of that.
    """

    def __init__(self, levels: Sequence[str], experts: Sequence[str]) -> None:
        self.levels = tuple(levels)
        self.experts = expert_names(experts)
        self.ill = self.alarmed = False
        self.reset()

    def reset(self) -> None:
        """Forget everything counted."""
        self.chosen: Tensor | None = None
        self.mass: Tensor | None = None
        self.units = [0] * len(self.levels)

    def state_dict(self) -> RoutingValues:
        """Return what was counted so far, for a run that stops in the middle of an epoch."""
        return {"chosen": self.chosen, "mass": self.mass, "units": self.units}

    def load_state_dict(self, state: RoutingValues, device: torch.device) -> None:
        """Continue counting from what ``state_dict`` returned."""
        # The first versions counted images, the units of all levels.
        self.units = list(state.get("units") or [int(state["images"])] * len(self.levels))
        chosen, mass = state["chosen"], state["mass"]
        self.chosen = None if chosen is None else chosen.to(device)
        self.mass = None if mass is None else mass.to(device)

    def merge(self, total: Callable[[Tensor], Tensor], *, first: bool) -> None:
        """Move the counts of all ranks to rank 0; every rank calls this.

        Args:
            total: adds up a tensor over the processes.
            first: whether this is rank 0.
        """
        if self.chosen is None or self.mass is None:
            return
        units = torch.tensor(self.units, dtype=torch.float64, device=self.chosen.device)
        self.chosen, self.mass = total(self.chosen.clone()), total(self.mass.clone())
        self.units = [int(number) for number in total(units).tolist()]
        if not first:
            self.chosen, self.mass = self.chosen * 0, self.mass * 0
            self.units = [0] * len(self.levels)

    @torch.no_grad()
    def update(self, routing: Sequence[Routing]) -> None:
        """Add a batch's records; nothing is read back to the host."""
        if not routing:
            return
        count = len(self.experts)
        chosen = torch.stack([expert_counts(r.experts_BK, count) for r in routing])
        mass = torch.stack([r.probs_BE.detach().sum(0) for r in routing])
        self.chosen = chosen if self.chosen is None else self.chosen + chosen
        self.mass = mass if self.mass is None else self.mass + mass
        counted = (record.probs_BE.shape[0] for record in routing)
        self.units = [old + new for old, new in zip(self.units, counted, strict=True)]

    def summary(self) -> dict[str, LevelRouting]:
        """Return the health of every level.

        Level -> usage (share of choices), gate (share of probability), entropy of the usage over
        log(experts) (1 is uniform, 0 a single expert), and max_violation: by how much the busiest
        expert exceeds its fair share, as a multiple of it (0 is uniform); units.
        """
        if self.chosen is None or self.mass is None:
            return {}
        both = torch.stack([self.chosen, self.mass])
        both = both / both.sum(-1, keepdim=True).clamp_min(1e-12)
        shares, gates = both.tolist()
        result: dict[str, LevelRouting] = {}
        for name, usage, gate, units in zip(self.levels, shares, gates, self.units, strict=True):
            entropy = -sum(p * math.log(p) for p in usage if p > 0)
            scale = math.log(len(usage)) if len(usage) > 1 else 1.0
            result[name] = {
                "usage": usage,
                "gate": gate,
                "entropy": entropy / scale,
                "max_violation": max(usage) * len(usage) - 1,
                "units": units,
            }
        return result


def collapse_alarm(
    levels: Mapping[str, LevelRouting], experts: Sequence[str], *, top_k: int
) -> str:
    """Return a warning about the routing with advice, or "".

    Judges only levels with enough units, and only if experts can be left out. A level is unhealthy
    if the entropy of its usage is under 0.9, its busiest expert has more than twice the fair share,
    or an expert has under a tenth of it.

    Args:
        levels: from ``RoutingMeter.summary``.
        experts: names.
        top_k: experts per image.
    """
    count = len(experts)
    if top_k >= count:
        return ""
    ill = []
    for name, level in levels.items():
        if level["units"] < ALARM_UNITS:
            continue
        idle = [
            expert
            for expert, usage in zip(experts, level["usage"], strict=True)
            if usage < LOW_SHARE / count
        ]
        # With k of E experts an expert's share of the choices is 1 / k at most.
        ceiling = count / top_k - 1
        if idle:
            ill.append(f"{name}: {', '.join(idle)} hardly used")
        elif level["entropy"] < LOW_ENTROPY or level["max_violation"] > min(
            HIGH_VIOLATION, 0.9 * ceiling
        ):
            busiest = experts[max(range(count), key=lambda i: level["usage"][i])]
            ill.append(f"{name}: {busiest} has {max(level['usage']):.0%} of the choices")
    if not ill:
        return ""
    return (
        f"the router favours few experts ({'; '.join(ill)}). What helps, in this order: "
        "--router-norm batch, optim.router_bias_rate=0.001, a larger loss.balance (0.1 to 1), "
        "--router-warmup 3, fewer --num-experts. They even out the choices; on a few hundred "
        "images they were not seen to improve masks."
    )


def active_experts(config: Config, epoch: int) -> int:
    """Return how many experts an image uses in an epoch: all of them during router warm-up.

    The evaluated weights (the EMA's copy of the model) are always routed as they will ship.
    """
    warm = epoch < config.train.router_warmup
    return config.model.num_experts if warm else config.model.top_k
