"""Unit tests of EMA, precision, device choice and meters."""

import pytest
import torch
from torch import nn

from camoxpert.config import TrainConfig
from camoxpert.errors import ConfigError
from camoxpert.models.router import choose
from camoxpert.runtime.device import choose_device, choose_precision
from camoxpert.training.ema import ModelEma, warmed_decay
from camoxpert.training.routing import RoutingMeter
from camoxpert.training.steplog import LateReader

CPU = torch.device("cpu")


class TestEma:
    def test_by_hand(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 0.0)
        ema = ModelEma(model, 0.9999)
        nn.init.constant_(model.weight, 1.0)
        ema.update(model, torch.tensor(1.0))
        # The first decay is 1/10: the average moves nine tenths of the way.
        assert ema.module.weight.item() == pytest.approx(0.9)
        ema.update(model, torch.tensor(1.0))
        assert ema.module.weight.item() == pytest.approx(1 - 0.1 * 2 / 11)

    def test_warm_up_forgets_the_initialisation(self) -> None:
        left = constant = 1.0
        for step in range(500):
            left *= float(warmed_decay(0.9999, torch.tensor(float(step))))
            constant *= 0.9999
        assert left < 1e-6 < 0.9 < constant
        assert float(warmed_decay(0.99, torch.tensor(1e6, dtype=torch.float64))) == 0.99

    def test_a_skipped_step_leaves_it_alone(self) -> None:
        model = nn.BatchNorm1d(2)
        ema = ModelEma(model, 0.9)
        model.weight.data.fill_(5.0)
        model.running_mean.fill_(7.0)
        ema.update(model, torch.tensor(0.0))
        assert torch.equal(ema.module.weight.data, torch.ones(2))
        assert torch.equal(ema.module.running_mean, torch.zeros(2))
        assert ema.state_dict()["updates"] == 0, "the warm-up counts updates, not steps"
        ema.update(model, torch.tensor(1.0))
        assert torch.equal(ema.module.running_mean, torch.full((2,), 7.0))

    def test_it_follows_buffers_that_are_replaced_and_other_models(self) -> None:
        model = nn.BatchNorm1d(2)
        ema = ModelEma(model, 0.9)
        ema.update(model, torch.tensor(1.0))
        model.running_mean = torch.full((2,), 3.0)
        ema.update(model, torch.tensor(1.0))
        assert torch.equal(ema.module.running_mean, torch.full((2,), 3.0))
        other = nn.BatchNorm1d(2)
        nn.init.constant_(other.weight, 9.0)
        before = ema.module.weight.clone()
        ema.update(other, torch.tensor(1.0))
        assert (ema.module.weight > before).all()

    def test_the_modules_are_walked_once(self, monkeypatch) -> None:
        """The walk took most of the update's time on a GPU."""
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        ema = ModelEma(model, 0.9)
        seen, walk = [], nn.Module.named_modules

        def named_modules(self: nn.Module, *given: object, **named: object):
            for name, module in walk(self, *given, **named):
                seen.append(module)
                yield name, module

        monkeypatch.setattr(nn.Module, "named_modules", named_modules)
        ema.update(model, torch.tensor(1.0))
        assert model[1] in seen
        seen.clear()
        ema.update(model, torch.tensor(1.0))
        assert model[1] not in seen, "it looks no further than the first weight"

    def test_weights_that_are_replaced_are_followed(self) -> None:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        ema = ModelEma(model, 0.0)
        ema.update(model, torch.tensor(1.0))
        model.load_state_dict({"weight": torch.ones(1, 1)}, assign=True)
        ema.update(model, torch.tensor(1.0))
        assert ema.module.weight.item() == 1.0

    def test_keys_are_the_models_own(self) -> None:
        model = nn.Sequential(nn.Linear(2, 2))
        ema = ModelEma(model, 0.9)
        assert list(ema.state_dict()["weights"]) == list(model.state_dict())


class TestPrecision:
    def test_cpu(self) -> None:
        auto = choose_precision(TrainConfig(), CPU)
        assert auto.dtype is None and "cpu" in auto.reason
        assert choose_precision(TrainConfig(precision="bf16"), CPU).dtype is torch.bfloat16
        assert choose_precision(TrainConfig(precision="fp32"), CPU).name == "fp32"
        with pytest.raises(ConfigError, match="fp16"):
            choose_precision(TrainConfig(precision="fp16"), CPU)

    @pytest.mark.parametrize(
        ("capability", "native_bf16", "name", "scaler"),
        [
            ((9, 0), True, "bf16", False),
            ((7, 5), False, "fp16", True),
            ((6, 0), False, "fp32", False),
        ],
    )
    def test_cuda_by_capability(self, monkeypatch, capability, native_bf16, name, scaler) -> None:
        asked = {}

        def supported(including_emulation: bool = True) -> bool:
            asked["emulation"] = including_emulation
            return native_bf16

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        chosen = choose_precision(TrainConfig(), torch.device("cuda", 0))
        assert (chosen.name, chosen.scaler) == (name, scaler)
        # A T4 says yes to emulated bf16, which is slower than fp32.
        assert asked["emulation"] is False

    def test_old_gpu_without_kernels_is_refused(self, monkeypatch) -> None:
        from camoxpert.runtime.device import check_architecture

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "P100")
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_90"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
        with pytest.raises(ConfigError, match="P100"):
            check_architecture(torch.device("cuda", 0))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
        check_architecture(torch.device("cuda", 0))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
    def test_a_missing_device_is_not_replaced(self) -> None:
        with pytest.raises(ConfigError, match="sees no CUDA device"):
            choose_device("cuda")
        assert choose_device("auto") == CPU

    @pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:x", "cuda:", "xpu", "meta", "cpu:0", ""])
    def test_other_names_of_devices_are_refused(self, name: str) -> None:
        with pytest.raises(ConfigError, match="use auto, cpu, cuda, cuda:N or mps"):
            choose_device(name)


class TestMeters:
    def test_late_reader_is_one_step_behind(self) -> None:
        reader = LateReader()
        assert reader.push({"loss": torch.tensor(1.0)}, "a") is None
        assert reader.push({"loss": torch.tensor(2.0)}, "b") == ({"loss": 1.0}, "a")
        assert reader.flush() == ({"loss": 2.0}, "b")
        assert reader.flush() is None

    def test_routing_by_hand(self) -> None:
        meter = RoutingMeter(["stride 32"], ["edge", "edge", "texture"])
        assert meter.experts == ["edge 1", "edge 2", "texture"]
        logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]))
        meter.update([choose(logits, 1)])
        meter.update([choose(logits[:1], 1)])
        level = meter.summary()["stride 32"]
        assert level["usage"] == pytest.approx([2 / 3, 0, 1 / 3])
        assert level["gate"] == pytest.approx([1.1 / 3, 0.9 / 3, 1.0 / 3])
        assert 0 < level["entropy"] < 1
        meter.reset()
        assert meter.summary() == {}
