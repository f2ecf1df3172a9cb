"""The network: images in, logits, side logits and routing records out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from camoxpert.config import ModelConfig
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.models.backbone import STRIDES, Backbone
from camoxpert.models.decoder import Decoder
from camoxpert.models.guidance import Guidance, Reference
from camoxpert.models.modalities import Modalities, ModalityBranch
from camoxpert.models.moe import MoE
from camoxpert.models.peers import DILATED, PeerDecoder
from camoxpert.models.presence import PresenceHead
from camoxpert.models.router import Routing
from camoxpert.models.support import NOT_GUIDED, support_width


class ModelOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        logits_B1HW: logits of the object mask at the input's size; sigmoid gives probabilities.
        side_logits: logits of the four decoder levels, stride 32 first, each (B, 1, H/s, W/s);
            empty for a decoder that has none.
        routing: one record per decoder level, in the same order; empty without experts.
        presence_logit_B: logit of there being any object, float32, before calibration (see
            ``CamoXpert.presence_probability``); None for a model without the presence head.
    """

    logits_B1HW: Tensor
    side_logits: tuple[Tensor, ...]
    routing: tuple[Routing, ...]
    presence_logit_B: Tensor | None = None


class CamoXpert(nn.Module):
    """EdgeNeXt (or any timm pyramid) with a top-k mixture-of-experts decoder, or with one of the
    decoders that it is compared with.

    Nothing in it depends on the batch size, the device or a global setting.

    Args:
        config: backbone, decoder and experts.
        sides: sides of the images it will see, in pixels, that of evaluation first; some timm
            networks are built for one size.
        modalities: what it can be given beside photographs, by name.
    """

    mean: Tensor
    std: Tensor
    reference_D: Tensor | None

    def __init__(
        self, config: ModelConfig, sides: Sequence[int] = (), modalities: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.config = config
        peer = config.decoder != "moe"
        self.backbone = Backbone(
            config, sides, from_stride_2=peer, dilated=config.decoder in DILATED
        )
        self.decoder: Decoder | PeerDecoder
        if peer:
            self.decoder = PeerDecoder(self.backbone, config)
        else:
            self.decoder = Decoder(self.backbone.channels, config)
        # Saved with the weights: a checkpoint must carry the normalisation it was trained with.
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(self.backbone.std).view(1, 3, 1, 1))
        self.presence: PresenceHead | None = None
        if config.presence == "on":
            # Without moving the generator: everything else is drawn as it is without the head.
            with torch.random.fork_rng(devices=[]):
                self.presence = PresenceHead(self.backbone.channels[-1])
        # What all images are searched for until it is cleared: see search_for; never saved.
        self.register_buffer("reference_D", None, persistent=False)
        self.guidance = self._build_guidance(config) if config.support.encoder else None
        self.modalities = self._build_modalities(modalities) if modalities else None

    def forward(
        self,
        images_BCHW: Tensor,
        reference: Reference | None = None,
        modalities: Modalities | None = None,
    ) -> ModelOutput:
        """Segment a batch.

        Args:
            images_BCHW: RGB, uint8 in 0..255 or float in 0..1; H and W multiples of 32.
            reference: what each image is searched for; None: what ``search_for`` set, if
                anything.
            modalities: what other sensors saw of the images; None: nothing.
        """
        # Normalised in float32 even under autocast; the first convolution casts on its own.
        images = images_BCHW.float()
        if images_BCHW.dtype == torch.uint8:
            images = images / 255
        images = (images - self.mean) / self.std
        if modalities is not None:
            images = images * modalities.rgb_B[:, None, None, None]
        features = self.backbone(images)
        if reference is None and self.reference_D is not None:
            present_B = torch.ones(len(images), dtype=torch.bool, device=images.device)
            reference = Reference(self.reference_D.expand(len(images), -1), present_B)
        added: list[Tensor] = []
        if reference is not None and self.guidance is not None:
            features, added = self.guidance(features, reference)
        if modalities is not None and self.modalities is not None:
            features, added = self.modalities(features, modalities)
        given = (images, features, added) if added else (images, features)
        logits, side_logits, routing = self.decoder(*given)
        presence = None if self.presence is None else self.presence(features[-1], logits)
        return ModelOutput(logits, side_logits, routing, presence)

    def presence_probability(self, output: ModelOutput) -> Tensor | None:
        """Return the calibrated probabilities (B,), 0..1, that an image holds any object.

        None for a model without the presence head. Uncalibrated where its run set no images aside
        for it (``presence.calibration.is_fitted``).
        """
        if self.presence is None or output.presence_logit_B is None:
            return None
        probs_B: Tensor = self.presence.calibration(output.presence_logit_B)
        return probs_B

    def _build_guidance(self, config: ModelConfig) -> Guidance:
        # After all else and beside the random numbers of the run: the rest starts with the weights
        # that it has without guidance, and training draws what it draws without.
        with torch.random.fork_rng(devices=[]):
            return Guidance(
                support_width(config.support),
                config.width,
                self.backbone.channels,
                [level.router.hidden.out_features for level in self.moe_levels],
            )

    def _build_modalities(self, names: Sequence[str]) -> ModalityBranch:
        # As guidance: the rest starts and is trained with the same random numbers.
        with torch.random.fork_rng(devices=[]):
            return ModalityBranch(
                names,
                self.backbone.channels,
                [level.router.hidden.out_features for level in self.moe_levels],
            )

    @property
    def modality_names(self) -> tuple[str, ...]:
        """What it can be given beside photographs, in the order of its inputs."""
        return () if self.modalities is None else self.modalities.names

    def require_guidance(self) -> Guidance:
        """Return the part that references steer; raises ConfigError without one."""
        if self.guidance is None:
            raise ConfigError(NOT_GUIDED)
        return self.guidance

    def search_for(self, features_D: Tensor | None) -> None:
        """Search all images from now on for what references show; None: any hidden object.

        Args:
            features_D: of the references, as ``guidance.combine`` joins them.

        Raises:
            ConfigError: the model takes no references, or these are not of its encoder.
        """
        if features_D is not None:
            self.require_guidance().check(features_D)
            features_D = features_D.to(self.mean.device)
        self.reference_D = features_D

    def set_gradient_checkpointing(self, enabled: bool) -> str:
        """Recompute activations in the backward pass; returns what it covers, in words."""
        covered = self.backbone.set_gradient_checkpointing(enabled)
        levels = isinstance(self.decoder, Decoder)
        if isinstance(self.decoder, Decoder):
            self.decoder.checkpointing = enabled
        parts = [
            name
            for name, used in (("backbone blocks", covered), ("decoder levels", levels))
            if used and enabled
        ]
        return " and ".join(parts) or "nothing"

    def set_active_experts(self, count: int) -> None:
        """Let every image use its ``count`` most probable experts per level, 1 to all of them."""
        for level in self.moe_levels:
            if not 1 <= count <= len(level.experts):
                raise ValueError(f"{count} of {len(level.experts)} experts cannot be active.")
            level.router.top_k = count

    def set_expert_dropout(self, rate: float) -> None:
        """Hide one expert at random from this share of the images (regions) of every level, in
        training mode only and only where more experts are left than are active."""
        for level in self.moe_levels:
            level.router.dropout = rate

    @property
    def moe_levels(self) -> list[MoE]:
        """The mixture-of-experts blocks, stride 4 first."""
        return [module for module in self.decoder.modules() if isinstance(module, MoE)]

    @property
    def expert_kinds(self) -> tuple[str, ...]:
        """Kinds of the experts of a level; empty for a decoder without experts."""
        levels = self.moe_levels
        return tuple(levels[0].kinds) if levels else ()

    def describe_decoder(self) -> str:
        """Return the decoder in a few words."""
        if isinstance(self.decoder, PeerDecoder):
            return f"{self.decoder.title} decoder"
        experts, active = len(self.expert_kinds), self.moe_levels[0].router.top_k
        text = f"{experts} experts, top {active}, dispatch {self.moe_levels[0].dispatch}"
        grid = self.config.routing_grid
        return f"{text}, regions of up to {grid} x {grid} routed" if grid > 1 else text

    def level_names(self) -> tuple[str, ...]:
        """Name the routing records, in the order of ``ModelOutput.routing``."""
        return tuple(f"stride {stride}" for stride in reversed(STRIDES))


def require_fit(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    sides: Sequence[int] = (),
    modalities: Sequence[str] = (),
) -> None:
    """Raise CheckpointError unless weights have the shapes of a network's parameters; without
    building it, so that settings of a stranger cannot make it as large as they like.

    Args:
        config, sides, modalities: as ``CamoXpert`` takes them.
        weights: of a state dict.
    """
    # Each expert has tensors of its own, or a row of stacked ones: a list of millions is no model.
    for what, number in (
        ("model.num_experts", config.num_experts),
        ("the number of data.modalities", len(modalities)),
    ):
        if number > max(len(weights), 64):
            raise CheckpointError(
                f"{what} is {number}, and the weights are only {len(weights)} tensors."
            )
    with torch.device("meta"):
        network = CamoXpert(config, sides, modalities)
    # Not buffers, some of which grow as they are loaded: the classes that a guided model knows.
    for name, wanted in network.named_parameters():
        given = weights.get(name)
        if given is None or wanted.shape != given.shape:
            found = "missing" if given is None else str(tuple(given.shape))
            raise CheckpointError(
                f"Its settings describe another network: of {name} the weights are {found}, and "
                f"the settings want {tuple(wanted.shape)}."
            )


def build_model(
    config: ModelConfig, *, sides: Sequence[int] = (), modalities: Sequence[str] = ()
) -> CamoXpert:
    """Build the network; raises ConfigError or CheckpointError for a user's mistake.

    Args:
        config, sides, modalities: as ``CamoXpert`` takes them.
    """
    return CamoXpert(config, sides, modalities)
