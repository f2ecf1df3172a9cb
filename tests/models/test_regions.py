"""Regions as routing units: cut and joined without a seam, in the same dispatch as images."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.runs import records

from camoxpert.config import build_config, load_config
from camoxpert.errors import ConfigError
from camoxpert.losses import total_loss
from camoxpert.models.camoxpert import CamoXpert, build_model
from camoxpert.models.cost import network_cost
from camoxpert.models.moe import DISPATCH, MoE
from camoxpert.models.regions import HALO, cells, cut, grid_of, join
from camoxpert.models.router import first_choices
from camoxpert.profile.syncs import SyncCounter
from camoxpert.training.routing import RoutingMeter, StepCounts

BACK_ENDS = {"specialist": ("loop", "sorted", "dense"), "uniform": tuple(DISPATCH)}


def model_of(**settings: object) -> CamoXpert:
    torch.manual_seed(0)
    values = {"model.backbone": "tiny_test", "model.pretrained": False, "model.width": 16}
    values |= {f"model.{key}": value for key, value in settings.items()}
    model = build_model(build_config(values).model).eval()
    for level in model.moe_levels:
        torch.nn.init.normal_(level.router.gate.weight, std=2.0)
    return model


def images(size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 3, size, size)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


class TestCutting:
    @pytest.mark.parametrize("size", [(8, 8), (11, 9), (22, 13), (7, 40), (5, 5)])
    @pytest.mark.parametrize("grid", [1, 2, 3, 4])
    @pytest.mark.parametrize("halo", [0, 2, 7])
    def test_joining_gives_the_map_back(self, size, grid, halo) -> None:
        x = torch.randn(2, 3, *size)
        units = cut(x, grid, halo=halo)
        assert units.shape[0] == 2 * grid**2
        assert torch.equal(join(units, x.shape[-2:], grid=grid, halo=halo), x)

    @pytest.mark.parametrize("side", [8, 11, 22, 37])
    @pytest.mark.parametrize("grid", [2, 3, 4])
    def test_every_cell_has_its_whole_halo(self, side, grid) -> None:
        found = cells(side, grid, HALO)
        assert [start for start, _ in found.cores] == [0, *(end for _, end in found.cores[:-1])]
        assert found.cores[-1][1] == side
        for start, (first, last) in zip(found.windows, found.cores, strict=True):
            assert start >= 0 and start + found.size <= side
            assert start <= max(0, first - HALO)
            assert start + found.size >= min(side, last + HALO)

    def test_small_maps_take_the_largest_grid_that_fits(self) -> None:
        assert [grid_of(4, side, side) for side in (88, 16, 15, 11, 8, 7, 1)] == [
            4,
            4,
            3,
            2,
            2,
            1,
            1,
        ]
        assert grid_of(4, 40, 9) == 2 and grid_of(1, 40, 40) == 1

    def test_the_order_is_that_of_images(self) -> None:
        x = torch.arange(2.0)[:, None, None, None].expand(2, 1, 8, 8)
        assert cut(x, 2)[:, 0, 0, 0].tolist() == [0] * 4 + [1] * 4


def moe_of(family: str, grid: int, **more: object) -> MoE:
    torch.manual_seed(3)
    options = {"num_experts": 4, "top_k": 2, "family": family} | more
    moe = MoE(16, grid=grid, **options)
    torch.nn.init.normal_(moe.router.gate.weight, std=2.0)
    return moe


def uneven(batch: int, height: int, width: int) -> torch.Tensor:
    """Return features that differ from region to region."""
    coarse = torch.randn(batch, 16, 4, 4)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return 8 * smooth + torch.randn(batch, 16, height, width)


def run(moe: MoE, x: torch.Tensor, name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    moe.dispatch = name
    moe.zero_grad()
    leaf = x.clone().requires_grad_()
    y, _ = moe(leaf)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters()}
    return y.detach(), gradients | {"input": leaf.grad}


class TestDispatch:
    @pytest.mark.parametrize("family", ["specialist", "uniform"])
    @pytest.mark.parametrize(
        ("grid", "size", "top_k"), [(2, (8, 8), 2), (3, (13, 17), 1), (4, (16, 9), 3)]
    )
    def test_back_ends_agree(self, family, grid, size, top_k) -> None:
        moe = moe_of(family, grid, top_k=top_k)
        x = uneven(3, *size)
        assert moe.route(x).experts_BK.unique(dim=0).shape[0] > 1
        expected, gradients = run(moe, x, "loop")
        for name in BACK_ENDS[family]:
            y, own = run(moe, x, name)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            for key, gradient in gradients.items():
                torch.testing.assert_close(
                    own[key], gradient, rtol=1e-4, atol=1e-5, msg=f"{name} {key}"
                )

    @pytest.mark.parametrize(("grid", "size"), [(2, (12, 12)), (3, (14, 19)), (4, (23, 16))])
    def test_one_choice_everywhere_is_exact_at_the_borders(self, grid, size) -> None:
        """A filter that reaches no further than the halo sees what it sees on the whole map."""
        x = torch.randn(2, 16, *size)
        whole, regions = (moe_of("uniform", g, num_experts=2, top_k=1) for g in (1, grid))
        for moe in (whole, regions):
            # Everything to the dilated 3x3 filter, of reach 2; its gate is 1.
            moe.router.gate.weight.data.zero_()
            moe.router.gate.bias.data = torch.tensor([-60.0, 60.0])
            assert moe.kinds[1] == "3x3 dilated 2" and HALO == 2
        torch.testing.assert_close(regions(x)[0], whole(x)[0], rtol=1e-5, atol=1e-5)
        expected = run(whole, x, "sorted")[1]
        for name, gradient in run(regions, x, "sorted")[1].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)

    def test_without_the_halo_there_is_a_seam(self) -> None:
        """Negative control of the test above."""
        x = torch.randn(2, 16, 12, 12)
        expert = moe_of("uniform", 1).experts[1]
        alone = join(expert(cut(x, 2)), x.shape[-2:], grid=2, halo=0)
        wrong = (alone - expert(x)).abs().amax((0, 1)) > 1e-4
        assert wrong[5:7].all() and wrong[:, 5:7].all() and not wrong[:3, :3].any()

    def test_the_shared_expert_sees_the_whole_map(self) -> None:
        moe = moe_of("specialist", 2, shared="semantic")
        x = torch.randn(2, 16, 12, 12)
        y = moe(x)[0]
        shared, moe.shared = moe.shared, None
        torch.testing.assert_close(y - moe(x)[0], shared(moe.norm(x)), rtol=1e-4, atol=1e-5)


class TestModel:
    def test_a_grid_of_one_runs_today_s_program(self) -> None:
        """No operator more than routing and dispatch on whole images, and the same bits."""
        model = model_of()
        shot = images()
        for level in model.moe_levels:
            x = torch.randn(2, 16, 9, 9)
            with SyncCounter() as counter:
                y, routing = level(x)
            with SyncCounter() as plain:
                routing = level.router(x)
                expected = x + DISPATCH["sorted"](level.experts, level.norm(x), routing, None)
            assert torch.equal(y, expected) and counter.operators == plain.operators
        assert [r.probs_BE.shape[0] for r in model(shot).routing] == [3] * 4

    def test_regions_choose_on_their_own(self) -> None:
        model = model_of(routing_grid=4)
        output = model(images())
        # Sides 2, 4, 8 and 16 of 64 pixels, stride 32 first.
        assert [r.probs_BE.shape[0] for r in output.routing] == [3, 3, 12, 48]
        assert [first_choices(r, 3).shape[0] for r in output.routing] == [3] * 4
        fine = output.routing[-1].experts_BK[:, 0].reshape(3, 16)
        assert any(row.unique().numel() > 1 for row in fine)
        assert "regions of up to 4 x 4 routed" in model.describe_decoder()
        assert not torch.equal(output.logits_B1HW, model_of()(images()).logits_B1HW)
        with pytest.raises(ConfigError, match="nothing to choose"):
            load_config(overrides=["model.routing_grid=2", "model.num_experts=1", "model.top_k=1"])

    @pytest.mark.parametrize(
        ("settings", "syncs"),
        [
            ({}, 1),
            ({"routing": "fused"}, 4),
            ({"expert_family": "uniform"}, 0),
            ({"dispatch": "dense"}, 0),
        ],
    )
    def test_host_syncs(self, settings, syncs) -> None:
        model = model_of(routing_grid=2, **settings)
        with SyncCounter() as counter:
            model(images())
        assert counter.syncs == syncs, counter.places

    def test_other_images_of_a_batch_change_nothing(self) -> None:
        model = model_of(routing_grid=3)
        shot = images()
        alone = torch.cat([model(shot[i : i + 1]).logits_B1HW for i in range(3)])
        torch.testing.assert_close(model(shot).logits_B1HW, alone, rtol=1e-4, atol=1e-4)

    def test_recomputed_activations_give_the_same_gradients(self) -> None:
        gradients = []
        for recompute in (False, True):
            model = model_of(routing_grid=2).train()
            model.set_gradient_checkpointing(recompute)
            model(images()).logits_B1HW.square().mean().backward()
            gradients.append([p.grad for p in model.decoder.parameters() if p.grad is not None])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)

    def test_counts_and_balance_are_those_of_units(self) -> None:
        model = model_of(routing_grid=2)
        output = model(images())
        counts = StepCounts().add(output.routing)
        units = [3, 3, 12, 12]
        assert counts is not None and counts.sum(1).tolist() == [2 * n for n in units]
        meter = RoutingMeter(model.level_names(), model.expert_kinds)
        meter.update(output.routing)
        meter.update(output.routing)
        assert [level["units"] for level in meter.summary().values()] == [2 * n for n in units]
        again = RoutingMeter(model.level_names(), model.expert_kinds)
        again.load_state_dict(meter.state_dict(), torch.device("cpu"))
        assert again.summary() == meter.summary()
        # A checkpoint of an earlier version counts images.
        old = {**meter.state_dict(), "images": 6}
        del old["units"]
        again.load_state_dict(old, torch.device("cpu"))
        assert again.units == [6] * 4
        mask = torch.zeros(3, 1, 64, 64)
        loss = build_config({"loss.balance": 1.0}).loss
        _, parts = total_loss(output, mask, loss, counts_LE=counts)
        by_hand = sum(
            float(7 * (r.probs_BE.detach().mean(0) * counts[i] / counts[i].sum()).sum()) / 4
            for i, r in enumerate(output.routing)
        )
        assert float(parts["balance"]) == pytest.approx(by_hand, rel=1e-5)

    def test_a_run_says_and_counts_regions(self, train, tmp_path, capsys) -> None:
        words = ("--epochs", "1", "--stage1-epochs", "0", "--run-name", "r", "--img-size", "64")
        assert train(*words, "model.routing_grid=2", "--val-fraction", "0.2") == 0
        said = " ".join(capsys.readouterr().out.split())
        whole = "stride 16 whole, stride 32 whole; each is routed by itself"
        assert f"stride 4 in 2 x 2, stride 8 in 2 x 2, {whole}" in said
        (record,) = records(tmp_path / "r", "routing")
        units = [level["units"] for level in record["levels"].values()]
        assert units == [32, 32, 128, 128]  # 32 training images
        page = " ".join((tmp_path / "r" / "report.html").read_text().split())
        assert "used by the regions of images of epoch 1 (regions routed: stride 32 32," in page
        (result,) = json.loads((tmp_path / "r/evaluation/scores.json").read_text())["results"]
        assert sum(use["images"] for use in result["experts"]["uses"]) == 4 * 8

    def test_the_halo_is_counted(self) -> None:
        whole, halved = (network_cost(model_of(routing_grid=g), 64) for g in (1, 2))
        assert whole.active < halved.active < 1.6 * whole.active
