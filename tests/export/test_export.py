"""Exported files are the same model, and the gate refuses those that are not."""

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from camoxpert.cli import main
from camoxpert.data.files.manifest import USUAL
from camoxpert.export.gate import LIMITS, Agreement, Parity, judge
from camoxpert.export.graph import ExportGraph, PaddedConv2d
from camoxpert.export.images import Scored, calibration_of, data_of, gate_images
from camoxpert.export.job import ExportOptions, Made, about_of, run_gate, skip, write_int8
from camoxpert.export.skip import skip_unused
from camoxpert.export.usage import kept_of
from camoxpert.export.write import half, linear_nodes, put_about, write_openvino
from camoxpert.inference.predictor import Predictor, load_predictor
from camoxpert.models.layers import cell_shares
from camoxpert.runs.checkpoint import load_checkpoint, resolve_checkpoint
from camoxpert.runs.share import write_shared

SAME = Agreement(50, "generated", {"Smeasure": (0.8, 0.8), "MAE": (0.05, 0.05)}, 1.0, 1.0, "a")
EXPERTS = 4 * 3
"""Of the tiny model: four levels, three experts each."""
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


@pytest.fixture(scope="module")
def exported(steep: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as an ONNX file, written by the command; ``graph.onnx`` beside it has no branches
    yet, and the other formats are made of it."""
    file = tmp_path_factory.mktemp("exported") / "new" / "m.onnx"
    file.parent.mkdir()

    def keep(path: Path) -> int:
        shutil.copyfile(path, file.with_name("graph.onnx"))
        return skip_unused(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("camoxpert.export.job.skip_unused", keep)
        assert main(["export", str(steep), "-o", str(file), "--data", str(toy_data)]) == 0
    return file


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_onnx_file_predicts_and_scores_as_its_checkpoint(
    exported: Path, steep: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = json.loads(exported.with_name("m.onnx.json").read_text())
    parity = report["gate"]["parity"]
    assert report["experts_in_branches"] == EXPERTS
    assert report["gate"]["passed"] and len(parity["shapes"]) >= 6
    assert parity["not_reached"] == [] and parity["difference"] <= 1e-4
    photos = str(next((toy_data / "TestDataset").iterdir()) / "Imgs")
    for model, out in ((str(exported), "exported"), (str(steep), "own")):
        assert main(["predict", model, photos, "-o", out, "--save", "mask"]) == 0
    names = [path.name for path in Path("own/masks").iterdir()]
    _same, different, missing = filecmp.cmpfiles("own/masks", "exported/masks", names, False)
    assert not missing and len(different) <= len(names) // 3
    assert main(["evaluate", str(exported), "--data", str(toy_data), "-o", "scores"]) == 0


def made_of(
    exported: Path, steep: Path, toy_data: Path, folder: Path, suffix: str, precision: str
) -> tuple[Predictor, Made, ExportOptions]:
    """Return what an export has in hand after the graph was written as ONNX."""
    import onnx

    predictor = load_predictor(steep, device="cpu", precision="fp32")
    graph = ExportGraph(predictor.network)
    options = ExportOptions({".onnx": "onnx", ".xml": "openvino"}[suffix], precision)
    images = gate_images(predictor, [str(toy_data)], USUAL, str(folder))
    scored = Scored(predictor, images, data_of(predictor))
    about = about_of(predictor, graph, options)
    made = Made(graph, folder / f"model{suffix}", scored, about)
    plain = exported.with_name("graph.onnx")
    shutil.copyfile(plain, made.onnx_file)
    made.nodes.update(linear_nodes(onnx.load(str(plain))))
    return predictor, made, options


def allow_more(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """Two epochs and steep logits make a model that rounding changes more than a trained one."""
    monkeypatch.setitem(LIMITS[precision], "Smeasure", 0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("suffix", "word"),
    [
        (".onnx", "QuantizeLinear"),
        pytest.param(".xml", "FakeQuantize", marks=pytest.mark.exhaustive),
    ],
)
def test_int8_files_keep_their_limit_at_every_shape(
    exported: Path,
    steep: Path,
    toy_data: Path,
    tmp_path: Path,
    suffix: str,
    word: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The search for parts that stay in float has tests of its own.
    allow_more(monkeypatch, "int8")
    predictor, made, options = made_of(exported, steep, toy_data, tmp_path, suffix, "int8")
    write_int8(made, calibration_of(predictor, made.graph, [str(toy_data)], USUAL))
    if suffix == ".onnx":
        skip(made, made.file, options)
    gate = run_gate(predictor, made, options)
    assert gate.broken == [] and gate.parity.not_reached == []
    # Otherwise nothing was quantised.
    assert gate.parity.difference > 1e-4 and word.encode() in made.file.read_bytes()
    assert made.about["int8"]["calibration"]["images"] == 40
    if suffix == ".xml":
        assert made.file.with_suffix(".bin").stat().st_size < exported.stat().st_size / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_files_are_the_same_model(
    exported: Path,
    steep: Path,
    toy_data: Path,
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if precision == "bf16":
        allow_more(monkeypatch, precision)
    predictor, made, options = made_of(exported, steep, toy_data, tmp_path, ".xml", precision)
    skip(made, made.onnx_file, options)
    write_openvino(made.onnx_file, made.file, precision=precision)
    put_about(made.file, made.about)
    gate = run_gate(predictor, made, options)
    assert gate.broken == [] and gate.parity.not_reached == []
    assert (gate.parity.difference <= 1e-4) == (precision == "fp32")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_norms_and_routers_of_an_fp16_file_compute_in_float32(
    exported: Path,
    steep: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnx

    allow_more(monkeypatch, "fp16")
    predictor, made, options = made_of(exported, steep, toy_data, tmp_path, ".onnx", "fp16")
    model = half(onnx.load(str(made.onnx_file)))
    onnx.save(model, str(made.file))
    skip(made, made.file, options)
    put_about(made.file, made.about)
    gate = run_gate(predictor, made, options)
    assert gate.broken == [] and gate.parity.not_reached == []
    casts = {
        node.output[0]: node.attribute[0].i for node in model.graph.node if node.op_type == "Cast"
    }
    halves = {
        value.name
        for value in model.graph.initializer
        if value.data_type == onnx.TensorProto.FLOAT16
    }
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    assert norms and halves
    for node in norms:
        assert not halves.intersection(node.input)
        assert casts.get(node.input[0], onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT


def test_a_file_name_must_say_the_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "nowhere", "-o", str(tmp_path / "m.bin")]) == 2
    assert "does not say the format" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
