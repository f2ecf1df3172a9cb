"""Guidance: what the references show steers the maps of the two coarsest levels and the routers.

Every part starts at zero, so that a model that was never shown a reference, and one that is shown
none, compute what the same model without guidance computes, bit for bit.

Shape letters: B batch, C channels, H height, W width; D features of the support encoder, N
references, K classes, R hidden features of a router.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from camoxpert.errors import ConfigError
from camoxpert.models.layers import LayerNorm2d, pointwise
from camoxpert.text import did_you_mean

GUIDED_LEVELS = 2
"""Levels whose maps are steered, from the coarsest on: strides 32 and 16."""
RESIZED = ("prototypes_KD", "class_text")
"""Buffers that have the size of what was saved."""


class Reference(NamedTuple):
    """What each image of a batch is searched for.

    Attributes:
        features_BD: see ``combine``, float32; any values where there is none.
        present_B: bool, False for images without a reference.
    """

    features_BD: Tensor
    present_B: Tensor


def combine(features_ND: Tensor) -> Tensor:
    """Return the features of N references as one of length 1, (D,).

    Each counts the same, and their order changes nothing, not even a rounding: the values of every
    feature are added in ascending order.
    """
    ordered = F.normalize(features_ND.float(), dim=1).sort(0).values
    return F.normalize(ordered.mean(0), dim=0)


class Steering(nn.Module):
    """Feature-wise scale and shift of one level's map, and how much each of its pixels resembles
    the reference.

    Sources: FiLM, Perez et al., AAAI 2018; cosine prior, Zhang et al., Referring Camouflaged Object
    Detection, 2023.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.key = pointwise(channels, width)
        self.query = nn.Linear(width, width)
        self.film = nn.Linear(width, 2 * channels)
        self.prior = pointwise(1, channels)
        for layer in (self.film, self.prior):
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x_BCHW: Tensor, reference_BW: Tensor) -> Tensor:
        """Return the steered map (B, C, H, W)."""
        keys = F.normalize(self.key(self.norm(x_BCHW)).float(), dim=1)
        queries = F.normalize(self.query(reference_BW).float(), dim=1)
        likeness_B1HW = (keys * queries[:, :, None, None]).sum(1, keepdim=True)
        scale_BC, shift_BC = self.film(reference_BW).chunk(2, 1)
        steered = x_BCHW * (1 + scale_BC[:, :, None, None]) + shift_BC[:, :, None, None]
        steered = steered + self.prior(likeness_B1HW)
        return steered.to(x_BCHW.dtype)


class Guidance(nn.Module):
    """Steers maps and routers by references, and remembers what the classes of its training look
    like.

    Args:
        features: number of features D of the support encoder.
        width: channels that references and maps are compared in.
        channels: of the backbone's levels, stride 4 first.
        hidden: hidden features R of the levels' routers, stride 4 first; empty without experts.
    """

    prototypes_KD: Tensor
    class_text: Tensor
    encoder_sha256: Tensor
    centre_D: Tensor
    spread_D: Tensor

    def __init__(
        self, features: int, width: int, channels: Sequence[int], hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.features = features
        self.enter = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.steering = nn.ModuleList(Steering(c, width) for c in channels[-GUIDED_LEVELS:])
        routers = [nn.Linear(width, size) for size in hidden]
        for router in routers:
            nn.init.zeros_(router.weight)
            nn.init.zeros_(router.bias)
        self.routers = nn.ModuleList(routers)
        # The class memory, and the encoder whose features all of this understands; saved with the
        # weights, because a checkpoint must carry what it was trained with.
        self.register_buffer("prototypes_KD", torch.zeros(0, features))
        self.register_buffer("class_text", torch.zeros(0, dtype=torch.uint8))
        # What all objects have in common is most of what an encoder says about any of them.
        self.register_buffer("centre_D", torch.zeros(features))
        self.register_buffer("spread_D", torch.ones(features))
        self.register_buffer("encoder_sha256", torch.zeros(32, dtype=torch.uint8))

    def forward(
        self, features: Sequence[Tensor], reference: Reference
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Steer.

        Args:
            features: maps of the backbone (B, C, H, W), the coarsest last.
            reference: of every image.

        Returns:
            The maps, and what is added to the hidden features of every router, (B, R) each, zero
            for images without a reference; empty without experts.
        """
        present_B1 = reference.present_B[:, None]
        # Absent features may be anything: what they give is not used, its gradient is zero.
        features_BD = (reference.features_BD.float() - self.centre_D) / self.spread_D
        reference_BW = self.enter(features_BD.where(present_B1, 0.0))
        maps = list(features)
        first = len(maps) - GUIDED_LEVELS
        for level, steering in enumerate(self.steering, start=first):
            steered = steering(maps[level], reference_BW)
            maps[level] = torch.where(present_B1[:, :, None, None], steered, maps[level])
        added = [router(reference_BW).float() for router in self.routers]
        return maps, [context.where(present_B1, 0.0) for context in added]

    def check(self, features_D: Tensor) -> None:
        """Raise ConfigError for features that are not of the support encoder, joined."""
        if features_D.shape != (self.features,):
            raise ConfigError(
                f"What references show has {self.features} features, joined, in this model; got "
                f"{tuple(features_D.shape)}."
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes it remembers."""
        text = bytes(self.class_text.tolist()).decode()
        return tuple(json.loads(text)) if text else ()

    @property
    def encoder_digest(self) -> str:
        """Digest of the support encoder it was trained with, hexadecimal; "" before."""
        return bytes(self.encoder_sha256.tolist()).hex() if self.encoder_sha256.any() else ""

    @torch.no_grad()
    def remember(self, features: Mapping[str, Tensor], digest: str) -> None:
        """Set the class memory: the mean of all references of each class.

        The encoder is frozen, so the mean is exact; a moving average would only follow it.

        Args:
            features: class -> features (N, D) of its references in training.
            digest: of the support encoder, hexadecimal.
        """
        device, names = self.centre_D.device, sorted(features)
        text = list(json.dumps(names).encode())
        self.class_text = torch.tensor(text, dtype=torch.uint8, device=device)
        self.prototypes_KD = torch.stack([combine(features[name]) for name in names]).to(device)
        self.encoder_sha256.copy_(torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8))

    @torch.no_grad()
    def standardise(self, features: Mapping[str, Tensor]) -> None:
        """Subtract from now on what all references have in common; before training only.

        Args:
            features: class -> features (N, D) of its references.
        """
        every = F.normalize(torch.cat([features[name] for name in sorted(features)]).float(), dim=1)
        spread_D = every.std(0, correction=0)
        self.centre_D.copy_(every.mean(0))
        # A feature that hardly differs between these references must not outweigh all others.
        self.spread_D.copy_(spread_D.clamp_min(max(0.1 * float(spread_D.mean()), 1e-6)))

    def trial(self, batch_size: int) -> Reference:
        """Return made-up references for a step whose cost is to be measured."""
        device = self.centre_D.device
        present_B = torch.ones(batch_size, dtype=torch.bool, device=device)
        return Reference(torch.zeros(batch_size, self.features, device=device), present_B)

    def prototype(self, name: str) -> Tensor:
        """Return the features (D,) of a class it remembers.

        Raises:
            ConfigError: it does not know the class.
        """
        known = self.classes
        if name not in known:
            raise ConfigError(
                f"This model remembers no class {name!r}.{did_you_mean(name, known)} It knows "
                f"{len(known)}: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}. Show it "
                f"references of any other."
            )
        return self.prototypes_KD[known.index(name)]

    def recall(self, names: Sequence[str]) -> Reference:
        """Return what it remembers of classes, one for each image; nothing of unknown ones."""
        rows = {name: row for row, name in enumerate(self.classes)}
        known = [rows.get(name, -1) for name in names]
        # Row -1 is another class, which is not used.
        place = torch.tensor(known, device=self.prototypes_KD.device)
        return Reference(self.prototypes_KD[place], place >= 0)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in RESIZED:
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape[1:] == getattr(self, name).shape[1:]:
                setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
