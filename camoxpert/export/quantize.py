"""int8: convolutions and products of a written graph in integers, calibrated on training images.

OpenVINO files are quantised by NNCF, ONNX files by ONNX Runtime (QDQ form). Routers, presence and
guidance compute in float32 in every file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from camoxpert.export.images import Calibration
from camoxpert.export.write import (
    FP32_PARTS,
    part_of,
    put_about,
    quiet,
    read_onnx_as_openvino,
)
from camoxpert.inference.runtimes import ExportAbout, import_library

QUANTISED = ("Conv", "MatMul", "Gemm")
"""ONNX operators that compute in integers."""
SHORTENED = ("network", "net", "moe")
"""Words of a module's name that say nothing to a user."""
UNNAMED = "parts without a name"


class Quantizer:
    """Quantises one graph, with any of its parts left in float.

    Args:
        onnx_file: the graph in fp32.
        suffix: ``.onnx`` or ``.xml``: which runtime it is for.
        about: metadata for the files.
        calibration: images that set the ranges.
        scratch: folder for what is kept between calls.
    """

    def __init__(
        self,
        onnx_file: Path,
        suffix: str,
        about: ExportAbout,
        calibration: Calibration,
        scratch: Path,
    ) -> None:
        import onnx

        self.onnx_file, self.about, self.calibration = onnx_file, about, calibration
        self.scratch = scratch
        self._write = {".onnx": self._onnx, ".xml": self._openvino}[suffix]
        model = onnx.load(str(onnx_file), load_external_data=False)
        self._part_of_node = {node.name: short_part(part_of(node)) for node in model.graph.node}
        self._in_fp32 = {
            node.name
            for node in model.graph.node
            if any(word in f".{part_of(node)}" for word in FP32_PARTS)
        }
        found = (node.name for node in model.graph.node if node.op_type in QUANTISED)
        self.parts = tuple(
            dict.fromkeys(self._part_of_node[n] for n in found if n not in self._in_fp32)
        )
        self._converted: Path | None = None

    def write(self, path: Path, in_float: Sequence[str] = (), images: int | None = None) -> None:
        """Write the graph in int8.

        Args:
            path: file to write.
            in_float: names of ``parts`` that stay in float.
            images: how many calibrate; None: all.
        """
        kept = {
            name
            for name, part in self._part_of_node.items()
            if part in in_float or name in self._in_fp32
        }
        self._write(path, kept, self.calibration.inputs[:images])
        put_about(path, self.about)

    def _onnx(
        self, path: Path, kept: set[str], inputs: Sequence[Mapping[str, NDArray[Any]]]
    ) -> None:
        quantization = import_library("onnxruntime.quantization")
        # The ranges are those of all tensors: other parts in float need no new ones.
        ranges = self.scratch / "ranges.json"
        if not ranges.is_file():
            inputs = self.calibration.inputs
        with quiet():
            quantization.quantize_static(
                str(self.onnx_file),
                str(path),
                _reader(quantization.CalibrationDataReader, inputs),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(QUANTISED),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=sorted(kept),
                calibration_cache_path=str(ranges),
            )

    def _openvino(
        self, path: Path, kept: set[str], inputs: Sequence[Mapping[str, NDArray[Any]]]
    ) -> None:
        nncf, ov = import_nncf(), import_library("openvino")
        advanced = import_library("nncf.quantization.advanced_parameters")
        if self._converted is None:
            self._converted = self.scratch / "float.xml"
            with quiet():
                model = read_onnx_as_openvino(self.onnx_file)
                ov.save_model(model, self._converted, compress_to_fp16=False)
        model = ov.Core().read_model(self._converted)
        # An ONNX node becomes operators named NODE and NODE/...
        names = [
            operator.get_friendly_name()
            for operator in model.get_ops()
            if operator.get_type_name() not in ("Constant", "Convert")
            and operator.get_friendly_name().split("/")[0] in kept
        ]
        with quiet():
            quantised = nncf.quantize(
                model,
                nncf.Dataset(list(inputs)),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(inputs),
                ignored_scope=nncf.IgnoredScope(names=names, validate=False),
                advanced_parameters=advanced.AdvancedQuantizationParameters(
                    # Half of the time; parts can be compared without.
                    disable_bias_correction=len(inputs) < len(self.calibration.inputs),
                    # One range per tensor: behind a transposition NNCF takes the rows of a map for
                    # its channels, and the graph would hold for one size alone.
                    activations_quantization_params=advanced.QuantizationParameters(
                        per_channel=False
                    ),
                ),
            )
            ov.save_model(quantised, path, compress_to_fp16=False)


def short_part(module: str) -> str:
    """Return the part of the network that a module belongs to: a block of the backbone, an expert
    of a level, or what else a level consists of.

    Args:
        module: such as ``network.decoder.levels.0.moe.experts.2.enter``, which is part of
            ``decoder.levels.0.experts.2``.
    """
    words = [word for word in module.split(".") if word not in SHORTENED]
    if not words or words == [""]:
        return UNNAMED
    if words[0] == "decoder" and words[1:2] != ["levels"]:
        return ".".join(words[:2])
    numbers = [place for place, word in enumerate(words) if word.isdigit()]
    if "experts" in words:
        numbers = [place for place in numbers if place > words.index("experts")]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:2])


def import_nncf() -> Any:
    """Import NNCF without the messages that it sends to its makers."""
    os.environ.setdefault("NNCF_CI", "1")
    with quiet():
        return import_library("nncf")


def _reader(base: type, inputs: Sequence[Mapping[str, NDArray[Any]]]) -> Any:
    """Return ONNX Runtime's reader of calibration data."""

    class Reader(base):  # type: ignore[misc]  # known at run time only
        def __init__(self) -> None:
            self._left: Iterator[Mapping[str, NDArray[Any]]] = iter(inputs)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            found = next(self._left, None)
            return None if found is None else dict(found)

    return Reader()
