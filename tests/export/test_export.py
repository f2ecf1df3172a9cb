"""Exported files are the same model, and the gate refuses those that are not."""

import filecmp
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from camoxpert.cli import main
from camoxpert.export.gate import Agreement, Parity, judge
from camoxpert.export.graph import PaddedConv2d
from camoxpert.export.usage import kept_of
from camoxpert.models.layers import cell_shares
from camoxpert.runs.checkpoint import load_checkpoint, resolve_checkpoint
from camoxpert.runs.share import write_shared

SAME = Agreement(50, "generated", {"Smeasure": (0.8, 0.8), "MAE": (0.05, 0.05)}, 1.0, 1.0, "a")
NEAR = Parity(shapes=[(1, 64, 64)], difference=1e-6, spread=8.0)


def test_the_same_model_passes() -> None:
    assert judge("fp32", NEAR, SAME).broken == []


@pytest.mark.parametrize(
    ("parity", "agreement", "named"),
    [
        (Parity(difference=2e-4, spread=8.0), SAME, "a probability differs"),
        (Parity(difference=float("nan"), spread=8.0), SAME, "a probability differs"),
        (Parity(presence_difference=0.1, spread=8.0), SAME, "presence"),
        (Parity(spread=0.2), SAME, "not trained"),
        (NEAR, Agreement(50, "", {"Smeasure": (0.8, 0.79), "MAE": (0, 0)}, 1, 1, "a"), "Smeasure"),
        (NEAR, Agreement(50, "", {"Smeasure": (0, 0), "MAE": (0, 0.001)}, 1, 1, "a"), "MAE"),
        (NEAR, Agreement(50, "", {"Smeasure": (0, 0), "MAE": (0, 0)}, 0.9, 0.5, "bad"), "bad"),
    ],
)
def test_each_limit_refuses(parity: Parity, agreement: Agreement, named: str) -> None:
    (sentence,) = judge("fp32", parity, agreement).broken
    assert named in sentence


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (11, 22), (6, 7)])
@pytest.mark.parametrize("grid", [1, 2, 3, 6])
def test_cells_are_those_of_adaptive_pooling(height: int, width: int, grid: int) -> None:
    x = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(0))
    means = cell_shares(height, grid, x) @ x @ cell_shares(width, grid, x).t()
    torch.testing.assert_close(means, F.adaptive_avg_pool2d(x, grid), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2), (5, 1), (1, 1)])
def test_constant_padding_is_that_of_timm(kernel: int, stride: int) -> None:
    from timm.layers import Conv2dSame

    conv = Conv2dSame(3, 4, kernel, stride)
    x = torch.randn(1, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PaddedConv2d(conv)(x), conv(x))


def test_experts_that_are_used_stay_and_enough_for_an_image() -> None:
    assert kept_of([0, 5, 0, 2], 2) == (1, 3)
    assert kept_of([0, 5, 0, 0], 2) == (0, 1)


@pytest.fixture(scope="module")
def steep(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits vary, as those of a trained one do."""
    checkpoint = load_checkpoint(resolve_checkpoint(tiny_run))
    checkpoint.evaluated_weights["decoder.detail.head.weight"].mul_(30)
    return write_shared(tmp_path_factory.mktemp("steep"), checkpoint)


@pytest.mark.slow
def test_an_onnx_file_predicts_and_scores_as_its_checkpoint(
    steep: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(steep), "-o", "m.onnx", "--data", str(toy_data)]) == 0
    report = json.loads(Path("m.onnx.json").read_text())
    assert report["gate"]["passed"] and len(report["gate"]["parity"]["shapes"]) >= 6
    photos = str(next((toy_data / "TestDataset").iterdir()) / "Imgs")
    for model, out in (("m.onnx", "exported"), (str(steep), "own")):
        assert main(["predict", model, photos, "-o", out, "--save", "mask"]) == 0
    names = [path.name for path in Path("own/masks").iterdir()]
    _same, different, missing = filecmp.cmpfiles("own/masks", "exported/masks", names, False)
    assert not missing and len(different) <= len(names) // 3
    assert main(["evaluate", "m.onnx", "--data", str(toy_data), "-o", "scores"]) == 0


def test_a_file_name_must_say_the_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "nowhere", "-o", str(tmp_path / "m.bin")]) == 2
    assert "does not say the format" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
