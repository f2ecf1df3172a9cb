"""Every backbone of the table in one test class, and the contracts of the whole network."""

import copy
from pathlib import Path

import pytest
import torch

from camoxpert.config import build_config
from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.losses import total_loss
from camoxpert.models.backbone import BACKBONES
from camoxpert.models.camoxpert import CamoXpert, build_model

PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def small(**settings: object) -> CamoXpert:
    torch.manual_seed(0)
    values = {
        "model.backbone": "tiny_test",
        "model.pretrained": False,
        "model.width": 16,
        "model.num_experts": 3,
        "model.detail_width": 8,
    }
    values |= {f"model.{name}": value for name, value in settings.items()}
    return build_model(build_config(values).model)


@pytest.mark.parametrize("backbone", BACKBONES)
class TestEveryBackbone:
    """Each builds, keeps the output contract, trains a step and has gradients in all levels."""

    def test_trains_a_step(self, backbone: str) -> None:
        model = small(backbone=backbone).train()
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        output = model(images)
        assert output.logits_B1HW.shape == (2, 1, 64, 64)
        assert [s.shape[-1] for s in output.side_logits] == [2, 4, 8, 16]
        assert len(output.routing) == 4
        loss, _ = total_loss(output, torch.rand(2, 1, 64, 64) > 0.5, build_config({}).loss)
        loss.backward()
        without = [n for n, p in model.named_parameters() if p.grad is None]
        assert not without
        levels = model.backbone.parameter_levels()
        assert sum(len(level) for level in levels) == len(list(model.backbone.parameters()))
        assert all(any(p.grad.abs().sum() > 0 for p in level) for level in levels)
        checked = copy.deepcopy(model)
        checked.load_state_dict(model.state_dict())


def test_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean edgenext_small"):
        small(backbone="edgenext_smal")


def test_a_backbone_without_the_pyramid_is_refused() -> None:
    with pytest.raises(ConfigError, match="vit_tiny_patch16_224"):
        small(backbone="vit_tiny_patch16_224")


def test_one_image_is_the_same_alone_and_in_a_batch() -> None:
    model = small().eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    together = model(images).logits_B1HW[1:2]
    torch.testing.assert_close(model(images[1:2]).logits_B1HW, together, rtol=1e-4, atol=1e-5)


def test_uint8_and_float_images_are_the_same() -> None:
    model = small().eval()
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    torch.testing.assert_close(model(images / 255).logits_B1HW, model(images).logits_B1HW)


@pytest.mark.parametrize("detail", [0, 8])
def test_detail_branch_is_optional(detail: int) -> None:
    model = small(detail_width=detail)
    assert model(torch.rand(1, 3, 32, 32)).logits_B1HW.shape == (1, 1, 32, 32)
    assert (model.decoder.detail is None) == (detail == 0)


def test_checkpointing_changes_no_gradient() -> None:
    images = torch.rand(2, 3, 64, 64)
    gradients = []
    for enabled in (False, True):
        model = small(backbone="edgenext_xx_small").train()
        covered = model.set_gradient_checkpointing(enabled)
        assert covered == ("backbone blocks and decoder levels" if enabled else "nothing")
        model(images).logits_B1HW.square().mean().backward()
        gradients.append(
            [p.grad if p.grad is not None else torch.zeros(1) for p in model.parameters()]
        )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_keys_stay_clean_under_compile() -> None:
    model = small()
    keys = list(model.state_dict())
    model.backbone.compile(backend="eager", dynamic=False)
    model(torch.rand(1, 3, 32, 32))
    assert list(model.state_dict()) == keys
    assert not any("_orig_mod" in key or "module." in key for key in keys)


def test_keys_stay_clean_and_idle_experts_reduce_under_ddp(tmp_path: Path) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small(num_experts=7, top_k=1)
        keys = list(model.state_dict())
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        mask = torch.ones(1, 1, 32, 32)
        # Twice: a parameter without a gradient makes the second pass fail.
        for deep in (True, False):
            config = build_config({"loss.deep_supervision": deep}).loss
            total_loss(wrapped(torch.rand(1, 3, 32, 32)), mask, config)[0].backward()
        wrapped(torch.rand(1, 3, 32, 32))
        assert list(model.state_dict()) == keys
        assert {k.removeprefix("module.") for k in wrapped.state_dict()} == set(keys)
    finally:
        dist.destroy_process_group()


def test_layer_scale_starts_useful_from_scratch_and_stays_with_timm_when_asked() -> None:
    scratch = small(backbone="edgenext_xx_small")
    gammas = [p for n, p in scratch.named_parameters() if n.endswith("gamma")]
    assert gammas and all(float(g.detach().min()) == pytest.approx(0.1) for g in gammas)
    asked = small(backbone="edgenext_xx_small", layer_scale_init=0.5)
    assert any(
        float(p.detach().min()) == 0.5 for n, p in asked.named_parameters() if n.endswith("gamma")
    )


class TestWeights:
    """``--weights FILE``: strict, from several spellings, and never running code."""

    def test_timm_names_load(self, tmp_path: Path) -> None:
        import timm
        from safetensors.torch import save_file

        torch.manual_seed(5)
        source = timm.create_model("edgenext_xx_small", pretrained=False)
        save_file(source.state_dict(), str(tmp_path / "w.safetensors"))
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}},
            tmp_path / "w.pth",
        )
        for name in ("w.safetensors", "w.pth"):
            model = small(backbone="edgenext_xx_small", weights=str(tmp_path / name))
            wanted = dict(source.named_parameters())["stages.2.blocks.0.mlp.fc1.weight"]
            loaded = dict(model.backbone.net.named_parameters())["stages_2.blocks.0.mlp.fc1.weight"]
            assert torch.equal(wanted, loaded)

    def test_own_checkpoint_loads(self, tmp_path: Path) -> None:
        model = small()
        torch.save({"model": model.state_dict()}, tmp_path / "w.pt")
        with torch.no_grad():
            again = small(weights=str(tmp_path / "w.pt"))
        key = "backbone.net.blocks.2.0.weight"
        assert torch.equal(again.state_dict()[key], model.state_dict()[key])

    def test_another_backbone_is_refused(self, tmp_path: Path) -> None:
        torch.save(small().backbone.net.state_dict(), tmp_path / "w.pt")
        with pytest.raises(CheckpointError, match="does not fit this backbone"):
            small(backbone="resnet18", weights=str(tmp_path / "w.pt"))

    def test_missing_and_damaged_files(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="There is no file"):
            small(weights=str(tmp_path / "none.pt"))
        (tmp_path / "bad.pt").write_bytes(b"not weights")
        with pytest.raises(CheckpointError, match="cannot be read"):
            small(weights=str(tmp_path / "bad.pt"))

    def test_code_in_a_pickle_does_not_run(self, tmp_path: Path) -> None:
        touched = tmp_path / "touched"

        class Payload:
            def __reduce__(self):
                return Path.touch, (touched,)

        torch.save({"model": Payload()}, tmp_path / "evil.pt")
        with pytest.raises(CheckpointError, match="cannot be read"):
            small(weights=str(tmp_path / "evil.pt"))
        assert not touched.exists()


@pytest.mark.parametrize(
    ("settings", "whole"),
    [({"model.expert_family": "uniform"}, True), ({"model.top_k": 7}, True), ({}, False)],
)
def test_what_compiles_as_one_graph(settings, whole, monkeypatch) -> None:
    """Without a graph break, with the keys and values of the plain model."""
    from camoxpert.training.compiling import compile_model

    compiled = []
    original = torch.nn.Module.compile

    def with_eager(module, *args, **kwargs):
        compiled.append(type(module).__name__)
        kwargs["backend"] = "eager"  # the graph is captured; Inductor takes minutes on a CPU
        return original(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", with_eager)
    torch.manual_seed(0)
    values = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    model = build_model(build_config(values | settings).model).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    keys, expected = list(model.state_dict()), model(images).logits_B1HW
    said = compile_model(model)
    assert compiled == (["CamoXpert"] if whole else ["Backbone"])
    assert ("whole network" in said) == whole
    torch._dynamo.reset()
    torch.testing.assert_close(model(images).logits_B1HW, expected)
    assert list(model.state_dict()) == keys
    torch._dynamo.reset()


def test_several_training_sizes_compile_once_each(monkeypatch) -> None:
    from camoxpert.training.compiling import compile_model

    original = torch.nn.Module.compile
    graphs = []

    def counting(graph, inputs):
        graphs.append(tuple(inputs[0].shape))
        return graph.forward

    def with_counter(module, *args, **kwargs):
        return original(module, *args, **kwargs | {"backend": counting})

    monkeypatch.setattr(torch.nn.Module, "compile", with_counter)
    values = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    model = build_model(build_config(values | {"model.expert_family": "uniform"}).model).train()
    torch._dynamo.reset()
    sizes = [32 * n for n in range(1, 5)]
    seen = []
    # Torch's default limit is eight; with a lower one, few sizes are more than it allows. Not by
    # monkeypatch, which would delete torch's setting at the end.
    with torch._dynamo.config.patch(recompile_limit=2):
        compile_model(model, sizes=len(sizes))
        for _ in range(2):
            for size in sizes:
                model(torch.zeros(2, 3, size, size, dtype=torch.uint8))
            seen.append(len(graphs))
    torch._dynamo.reset()
    assert seen == [len(sizes)] * 2, "more sizes than torch's limit, each compiled once"


def test_without_a_connection_weights_are_refused_at_once(monkeypatch, tmp_path: Path) -> None:
    """No retries for most of a minute; the hub client still looks into its cache."""
    import timm
    from huggingface_hub import constants

    seen = []
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # refuses connections
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    original = timm.create_model

    def watched(*args, **kwargs):
        seen.append(constants.HF_HUB_OFFLINE)
        return original(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", watched)
    config = build_config({"model.backbone": "edgenext_xx_small", "model.pretrained": True})
    with pytest.raises(ConfigError, match="--weights FILE, or train from scratch"):
        build_model(config.model)
    assert seen == [True] and constants.HF_HUB_OFFLINE is False


def test_whether_the_hub_answers(monkeypatch) -> None:
    import socket

    from camoxpert.models.weights import hub_reachable

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_reachable()
    assert not hub_reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub_reachable()
