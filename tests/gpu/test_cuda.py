"""Tests that need a CUDA device; skipped without one."""

import copy
import warnings

import numpy as np
import pytest
import torch

from camoxpert.config import DECODERS, AugmentConfig, DataConfig, build_config
from camoxpert.data.cache.build import open_cache
from camoxpert.data.files.manifest import load_train
from camoxpert.data.loader import LoaderPlan, build_loader, device_batches
from camoxpert.data.samples.augment import square_pair
from camoxpert.data.samples.augment_device import apply_draws
from camoxpert.data.samples.draw import Draw, draw
from camoxpert.data.samples.scenes import relit
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import build_model
from camoxpert.models.moe import DISPATCH, MoE
from camoxpert.runtime.device import HostCopy, Precision
from camoxpert.synthesis.online import OnlineScenes
from camoxpert.synthesis.toy import generate_toy, toy_pair
from camoxpert.training.batching import choose_batching
from camoxpert.training.ema import ModelEma
from camoxpert.training.optim import build_optimizer, set_lr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


SCALE = 4096.0


def build(backbone: str = "edgenext_xx_small"):
    torch.manual_seed(0)
    settings = {"model.backbone": backbone, "model.pretrained": False, "model.width": 32}
    config = build_config(settings)
    return config, build_model(config.model).cuda().train()


@pytest.mark.parametrize("family", ["specialist", "uniform"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 5e-2), (torch.float16, 5e-3)]
)
def test_back_ends_agree_on_the_gpu(dtype, tolerance, family) -> None:
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.manual_seed(0)
    moe = MoE(32, num_experts=7, top_k=2, family=family).cuda()
    x = torch.randn(8, 32, 22, 22, device="cuda")
    results = {}
    names = [name for name in DISPATCH if family == "uniform" or name != "gathered"]
    for name in names:
        moe.dispatch = name
        moe.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            y, _ = moe(x)
        # Scaled as in training: fp16 has no digits left for the gradients of a mean over pixels.
        (SCALE * y.float().square().mean()).backward()
        results[name] = (y.detach().float(), [p.grad.clone() for p in moe.parameters()])
    for name in names:
        for a, b in zip(results[name][1], results["loop"][1], strict=True):
            assert (a - b).norm() <= tolerance * (b.norm() + 1e-6 * SCALE)
        error = (results[name][0] - results["loop"][0]).norm()
        assert error <= tolerance * results["loop"][0].norm()


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "moe"])
def test_decoders_to_compare_with_take_a_step(decoder) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    settings = {"model.backbone": "resnet18", "model.pretrained": False, "model.decoder": decoder}
    config = build_config(settings)
    model = build_model(config.model).cuda().train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, device="cuda")
    masks = torch.zeros(2, 1, 64, 64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = model(images)
    loss, _ = total_loss(output, masks, config.loss)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_training_learns_under_autocast(dtype) -> None:
    config, model = build()
    optimizer = build_optimizer(model, config.optim)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    images = torch.randint(0, 256, (8, 3, 96, 96), dtype=torch.uint8, device="cuda")
    masks = torch.zeros(8, 1, 96, 96, device="cuda")
    masks[..., 30:60, 30:60] = 1
    losses = []
    for _ in range(30):
        set_lr(optimizer, 2e-3)
        with torch.autocast("cuda", dtype=dtype):
            output = model(images)
        loss, _ = total_loss(output, masks, config.loss)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_the_only_syncs_of_a_forward_are_the_dispatchs() -> None:
    _, model = build()
    images = torch.zeros(4, 3, 64, 64, dtype=torch.uint8, device="cuda")
    model(images)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            model(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [w for w in seen if "synchronizing" in str(w.message)]
    # One read of the counts per level; bincount itself reads its range once more on CUDA.
    assert len(syncs) <= 3 * len(model.decoder.levels)


def test_skipped_step_leaves_weights_and_ema_alone() -> None:
    config, model = build("tiny_test")
    ema = ModelEma(model, 0.9)
    optimizer = build_optimizer(model, config.optim)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones((), device="cuda")
    optimizer.step()
    ema.update(model, torch.zeros((), device="cuda"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(ema.module.state_dict()[name], before[name])


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, 1),
        ({"model.expert_family": "uniform"}, 0),
        ({"model.presence": "on"}, 1),
        ({"model.support.encoder": "tiny_test", "model.support.pretrained": False}, 1),
    ],
)
def test_host_syncs_of_the_forward_and_backward_pass(settings, allowed) -> None:
    """Counted by torch, which warns at every synchronising call."""
    torch.manual_seed(0)
    values = {"model.backbone": "edgenext_xx_small", "model.pretrained": False, "model.width": 32}
    config = build_config(values | settings)
    model = build_model(config.model).cuda().train()
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, device="cuda")
    masks = torch.zeros(4, 1, 64, 64, device="cuda")
    shown = () if model.guidance is None else (model.guidance.trial(len(images)),)
    alone = model.presence is not None

    def step() -> None:
        loss, _ = total_loss(model(images, *shown), masks, config.loss, empty_alone=alone)
        loss.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [str(w.message) for w in caught if "synchroniz" in str(w.message).lower()]
    assert len(syncs) <= allowed, syncs


@pytest.mark.parametrize("setting", ["off", "on"])
def test_memory_predicted_from_two_points_is_what_the_step_takes(setting) -> None:
    settings = {"model.backbone": "edgenext_small", "model.pretrained": False}
    settings |= {"data.img_size": 352, "train.batch_size": None, "train.effective_batch_size": 32}
    config = build_config(settings | {"train.gradient_checkpointing": setting})
    model = build_model(config.model).cuda()
    device, precision = torch.device("cuda"), Precision(torch.bfloat16, False, "bf16")
    chosen = choose_batching(config, model, device, precision)
    assert chosen.size == 32, chosen.reason
    assert chosen.predicted == pytest.approx(chosen.measured, rel=0.15), chosen.reason


def test_the_micro_batch_follows_the_free_memory(monkeypatch) -> None:
    settings = {"model.backbone": "edgenext_small", "model.pretrained": False}
    settings |= {"data.img_size": 352, "train.batch_size": None, "train.effective_batch_size": 32}
    config = build_config(settings | {"train.gradient_checkpointing": "off"})
    model = build_model(config.model).cuda()
    device, precision = torch.device("cuda"), Precision(torch.bfloat16, False, "bf16")
    needed = choose_batching(config, model, device, precision).predicted
    # Told, not filled: other processes of the test run take and free memory meanwhile.
    _, total = torch.cuda.mem_get_info()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (needed, total))
    torch.cuda.empty_cache()
    chosen = choose_batching(config, model, device, precision)
    assert 1 <= chosen.size < 32 and chosen.size * chosen.steps == 32, chosen.reason
    assert chosen.measured is not None, chosen.reason


def test_device_augmentation_is_the_same_on_the_gpu_and_waits_for_nothing() -> None:
    generator = np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (8, 64, 64, 4), dtype=np.uint8))
    augment = AugmentConfig(vflip=0.5, rotate=60, blur=0.5, noise=0.5)
    draws = [draw(augment, seed=0, epoch=0, index=i, source=64, target=96) for i in range(8)]
    expected = apply_draws(pixels, draws, 96)
    on_gpu = pixels.cuda()
    apply_draws(on_gpu, draws, 96)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        images, masks = apply_draws(on_gpu, draws, 96)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (images.cpu().int() - expected[0].int()).abs().float().mean() < 0.5
    assert (masks.cpu() != expected[1]).float().mean() < 0.005


def test_new_light_is_the_same_on_the_gpu_and_waits_for_nothing() -> None:
    pairs = [toy_pair(3, index, size=64, difficulty=0.0) for index in range(6)]
    pixels = torch.from_numpy(np.stack([square_pair(*pair, 64) for pair in pairs]))
    draws = [Draw(np.eye(2, 3), None, light=light) for light in (1, None, 3, 4, 5, 6)]
    expected = relit(pixels, draws, OnlineScenes())
    on_gpu = pixels.cuda()
    relit(on_gpu, draws, OnlineScenes())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = relit(on_gpu, draws, OnlineScenes())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[..., 3].cpu(), pixels[..., 3])
    apart = (found.cpu().int() - expected.int()).abs()
    assert float((apart <= 2).float().mean()) > 0.999 and not torch.equal(expected, pixels)


def test_batches_straight_from_the_cache_arrive_on_the_gpu(tmp_path) -> None:
    generate_toy(tmp_path / "data", num_train=12, num_test=0, size=64, seed=0)
    manifest = load_train([tmp_path / "data"])
    data = DataConfig(img_size=64, cache_dir=str(tmp_path / "cache"))
    cache = open_cache(manifest, data, mode="disk")

    def loader(pin_memory: bool):
        plan = LoaderPlan(0, 2, cache, True, pin_memory=pin_memory)
        return build_loader(manifest, data, plan, batch_size=4, seed=0)

    host = [b for b, _ in device_batches(loader(False), torch.device("cpu"))]
    batches = [b for b, _ in device_batches(loader(True), torch.device("cuda", 0))]
    for expected, batch in zip(host, batches, strict=True):
        assert batch.names == expected.names and batch.images.device.type == "cuda"
        assert (batch.images.cpu().int() - expected.images.int()).abs().float().mean() < 0.5


def test_numbers_read_one_step_late_do_not_wait_for_the_next_step() -> None:
    from camoxpert.training.steplog import LateReader, StepNote

    reader = LateReader()
    values = {"loss": torch.full((), 3.0, device="cuda")}
    reader.push(values, StepNote(1, 1, 1, 0.1, []))
    torch.cuda.synchronize()
    # The next step: a second of work, after which its numbers are queued.
    torch.cuda._sleep(2_000_000_000)
    launched = torch.cuda.Event()
    launched.record()
    read = reader.push(values, StepNote(2, 1, 1, 0.1, []))
    assert not launched.query(), "reading the first step's numbers waited for the second step"
    assert read is not None and read[0] == {"loss": 3.0}
    last = reader.flush()
    assert launched.query() and last is not None and last[0] == {"loss": 3.0}


def test_scores_are_read_while_the_next_forward_pass_runs() -> None:
    from camoxpert.metrics import Evaluator
    from camoxpert.metrics.device import DeviceScorer

    scorer = DeviceScorer(Evaluator(keys=("MAE", "Smeasure")), HostCopy)
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 10:30] = 255
    for name in ("warm", "measured"):
        scorer.add(name, torch.from_numpy(mask).cuda(), mask)
        scorer.send()
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000 if name == "measured" else 1)
        launched = torch.cuda.Event()
        launched.record()
        (row,) = scorer.flush()
    assert not launched.query(), "reading the scores waited for what was launched after them"
    assert row["MAE"] == 0
