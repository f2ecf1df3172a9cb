"""``export``: a checkpoint as an ONNX, OpenVINO or torch file that is proved to be the same
model."""

from __future__ import annotations

import argparse
from pathlib import Path

from camoxpert import console, stop
from camoxpert.cli import no_overrides
from camoxpert.cli.outputs import check_file
from camoxpert.config.flags import add_flags
from camoxpert.errors import ConfigError
from camoxpert.export.target import check_replaceable, format_of

EXAMPLES = """Exit code 5: the file would not be the same model; none is written.

examples:
  camoxpert export runs/NAME -o model.onnx
  camoxpert export runs/NAME -o model.xml --format openvino --precision bf16
  camoxpert predict model.onnx photos/ -o out"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "checkpoint", help="a run folder (its best weights), a .pt file or hf:USER/NAME"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--format",
        choices=("onnx", "openvino", "torch"),
        help="onnx (.onnx), openvino (.xml and .bin) or torch (.pt2) [by the name of the file]",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        default="fp32",
        help="number format of the file [fp32]",
    )
    parser.add_argument(
        "--static",
        action="store_true",
        help="fix batch and size, for TensorRT and ExecuTorch [any batch, any multiple of 32]",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of a --static file [1]")
    parser.add_argument(
        "--prune-experts",
        action="store_true",
        help="leave out experts that no image of the gate uses",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="DIR",
        help="data sets of the gate, which scores up to 200 images [the run's test sets, filled up "
        "to 50 with generated images]",
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="DIR",
        help="data sets of which up to 300 training images calibrate int8 [the run's]",
    )
    add_flags(parser, ("data.layout", "data.noncam", "data.allow_outside", "train.max_hours"))


def run(options: argparse.Namespace, rest: list[str], typed: list[str]) -> int:
    """Export, compare, write."""
    no_overrides(rest)
    target = Path(options.output)
    chosen = format_of(target, options.format)
    if options.batch_size is not None and not options.static:
        raise ConfigError("--batch-size is of a --static file: other files take any batch.")
    if options.batch_size is not None and options.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1; {options.batch_size} is not.")
    if options.calibration and options.precision != "int8":
        raise ConfigError("--calibration is for --precision int8 alone.")
    check_file("-o", target)
    check_replaceable(target)
    from camoxpert.data.files.manifest import Search
    from camoxpert.export.job import ExportOptions, export_model, written_files
    from camoxpert.export.write import check_format
    from camoxpert.inference.predictor import load_predictor

    check_format(chosen, options.precision)
    model, static = Path(options.checkpoint), None
    if options.static:
        predictor = load_predictor(model, device="cpu")
        # Its file: a branch on the Hub may mean another one a moment later.
        side, model = predictor.img_size, predictor.checkpoint.path
        static = (options.batch_size or 1, side, side)
    wanted = ExportOptions(
        chosen,
        options.precision,
        static,
        options.prune_experts,
        tuple(options.data),
        tuple(options.calibration),
    )
    search = Search(options.layout, options.noncam, allow_outside=options.allow_outside)
    with stop.watch(options.max_hours), stop.outcome("No file was written."):
        exported = export_model(model, target, wanted, search)
    for path in written_files(exported):
        console.say(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
