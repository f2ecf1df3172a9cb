"""All families of timm networks, for tests that run over them."""

from __future__ import annotations

# Families without levels at strides 4, 8, 16 and 32: plain transformers, and pyramids that start
# at stride 8 or 16 or end at 16.
WITHOUT_PYRAMID = {
    *("beit", "cait", "convit", "convmixer", "crossvit", "csatv2", "deepseek_vit", "deit"),
    *("efficientvim", "efficientvit_msra", "eva", "gemma4_vit", "levit", "mlp_mixer", "naflexvit"),
    *("nest", "pit", "qwen3_vit", "sequencer", "shvit", "tnt", "vision_transformer"),
    *("vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam"),
    *("visformer", "vitamin", "volo", "xcit"),
}
# Families whose maps lack the border of the image.
WITHOUT_PADDING = {"inception_resnet_v2", "inception_v3", "inception_v4"}
# Families that take one size only, or need maps that their windows divide.
ONE_SIZE = {"efficientformer": 224, "byoanet": 256}
SMALL = ("test_", "atto", "femto", "pico", "nano", "xxs", "xx_small", "_s0", "_t0", "_b0", "tiny")


def families() -> dict[str, str]:
    """Return timm's file -> the name of a small network in it."""
    import timm

    members: dict[str, list[str]] = {}
    for name in timm.list_models():
        file = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        members.setdefault(file, []).append(name)

    def size(name: str) -> tuple[int, int]:
        return next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)

    return {file: min(names, key=size) for file, names in members.items()}
