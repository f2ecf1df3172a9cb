"""The presence head: what it sees, what it leaves alone, and its calibrated probabilities."""

import pytest
import torch

from camoxpert.config import build_config, to_dict
from camoxpert.inference.predictor import load_predictor
from camoxpert.models.camoxpert import CamoXpert, ModelOutput, build_model
from camoxpert.models.presence import PresenceHead, mask_evidence
from camoxpert.runs.checkpoint import FORMAT, Checkpoint
from camoxpert.runs.share import write_shared

TINY = {
    "model.backbone": "tiny_test",
    "model.pretrained": False,
    "model.width": 16,
    "model.num_experts": 2,
    "model.detail_width": 8,
}


def _model(presence: str, **values: object) -> CamoXpert:
    torch.manual_seed(0)
    return build_model(build_config(TINY | values | {"model.presence": presence}).model)


def _draw_after(presence: str) -> torch.Tensor:
    _model(presence)
    return torch.rand(1)


def test_evidence_is_the_top_percent_and_the_log_area():
    logits = torch.full((2, 1, 80, 80), -8.0)
    # Of the 400 cells, the top 1 % are four.
    logits[0, 0, :4, :16] = 8.0
    found = mask_evidence(logits)
    area = torch.sigmoid(logits[0].double()).mean() + 1e-6
    assert found[0, 0] == pytest.approx(2.0) and found[1, 0] == pytest.approx(-2.0)
    assert found[0, 1] == pytest.approx((area.log().item() + 4) / 3, abs=1e-5)
    assert torch.isfinite(mask_evidence(torch.full((1, 1, 32, 32), -200.0))).all()


def test_the_head_changes_no_other_weight_no_mask_and_no_gradient_of_them():
    without, with_head = _model("off"), _model("on")
    assert without.presence is None and isinstance(with_head.presence, PresenceHead)
    # Later draws, such as those of dropout, are the same as well.
    assert torch.equal(_draw_after("on"), _draw_after("off"))
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, with_head.state_dict()[name]), name
    images = torch.rand(2, 3, 64, 64)
    plain, output = without.eval()(images), with_head.eval()(images)
    assert plain.presence_logit_B is None and without.presence_probability(plain) is None
    assert torch.equal(plain.logits_B1HW, output.logits_B1HW)
    assert output.presence_logit_B is not None and output.presence_logit_B.shape == (2,)
    output.presence_logit_B.sum().backward()
    reached = {name for name, p in with_head.named_parameters() if p.grad is not None}
    assert reached and all(name.startswith("presence.") for name in reached)


def test_probabilities_follow_the_calibration():
    model = _model("on")
    head = model.presence
    assert head is not None and not head.calibration.is_fitted
    output = ModelOutput(torch.zeros(2, 1, 32, 32), (), (), torch.tensor([0.0, 4.0]))
    probs = model.presence_probability(output)
    assert probs is not None and probs.tolist() == pytest.approx([0.5, 0.98201], abs=1e-4)
    head.calibration.set(2.0, -1.0, 30)
    probs = model.presence_probability(output)
    # sigmoid(0 / 2 - 1), sigmoid(4 / 2 - 1)
    assert probs is not None and probs.tolist() == pytest.approx([0.26894, 0.73106], abs=1e-4)
    assert head.calibration.is_fitted


def test_a_checkpoint_carries_head_and_calibration_and_old_ones_have_none(tmp_path):
    for presence in ("on", "off"):
        # A run saves what the user asked for: auto.
        model = _model(presence)
        if model.presence is not None:
            model.presence.calibration.set(1.5, 0.25, 40)
        config = build_config(TINY)
        values = {"format": FORMAT, "config": to_dict(config), "model": model.state_dict()}
        shared = write_shared(tmp_path / presence, Checkpoint(tmp_path, config, values))
        loaded = load_predictor(shared, device="cpu").model
        assert isinstance(loaded, CamoXpert)
        output = loaded(torch.zeros(1, 3, 352, 352, dtype=torch.uint8))
        assert (output.presence_logit_B is not None) is (presence == "on")
        if loaded.presence is not None:
            assert loaded.presence.calibration.bias.item() == 0.25


@pytest.mark.parametrize("decoder", ["unet", "fpn"])
def test_other_decoders_have_the_head_as_well(decoder):
    pytest.importorskip("segmentation_models_pytorch")
    model = _model("on", **{"model.decoder": decoder}).eval()
    output = model(torch.rand(1, 3, 64, 64))
    assert output.presence_logit_B is not None and output.presence_logit_B.shape == (1,)
