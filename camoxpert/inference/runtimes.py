"""What runs an exported file: ONNX Runtime, OpenVINO or torch, behind one call.

Arrays go in and out; the names are those of the graph (``images``, ``reference``; ``probability``,
``logits``, ``presence``).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.runs.hub import is_hub_name

Array = NDArray[Any]
ABOUT = "camoxpert"
"""Key of the metadata in an exported file."""
ABOUT_FILE = "camoxpert.json"
"""The same inside a ``.pt2`` archive."""


class Runtime(Protocol):
    """An exported graph that is ready to run.

    Attributes:
        title: name and version of the library, and where it runs.
        about: the metadata of the file.
    """

    title: str
    about: dict[str, Any]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Return outputs by name."""


class OnnxRuntime:
    """ONNX Runtime, for ``.onnx``."""

    def __init__(self, path: Path, device: torch.device, precision: str) -> None:
        ort = import_library("onnxruntime")
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" not in ort.get_available_providers():
                raise ConfigError(
                    f"--device {device}: this build of onnxruntime has no CUDA. Install "
                    "onnxruntime-gpu in place of onnxruntime, or use --device cpu."
                )
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # It warns of every node that a graph optimisation could not fold.
        options.log_severity_level = 3
        # Threads that spin between calls take the cores from the decoders.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # its own types for each kind of damage
            raise damaged(path, "an ONNX model", error) from error
        self.about = read_about(path, self._session.get_modelmeta().custom_metadata_map.get(ABOUT))
        self.title = f"onnxruntime {ort.__version__}, {self._session.get_providers()[0]}"

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Return outputs by name."""
        found: list[Array] = self._session.run(list(outputs), dict(inputs))
        return found


class OpenVino:
    """OpenVINO, for ``.xml`` with its ``.bin``; on a CPU."""

    def __init__(self, path: Path, device: torch.device, precision: str) -> None:
        ov = import_library("openvino")
        if device.type != "cpu":
            raise ConfigError(f"--device {device}: OpenVINO files run on the CPU. Leave it out.")
        core = ov.Core()
        try:
            model = core.read_model(path)
        except Exception as error:  # its own types for each kind of damage
            raise damaged(path, "an OpenVINO model", error) from error
        kept = model.get_rt_info([ABOUT]).value if model.has_rt_info([ABOUT]) else None
        self.about = read_about(path, kept)
        chosen = precision or str(self.about.get("precision", "fp32"))
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if chosen == "bf16" else "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._compiled = core.compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._places = {
            name: index
            for index, port in enumerate(self._compiled.outputs)
            for name in port.get_names()
        }
        self.title = f"openvino {ov.__version__.split('-')[0]}, CPU"

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Return outputs by name."""
        self._request.infer(dict(inputs))
        # Copied: the next call writes over what it returns.
        return [
            np.array(self._request.get_output_tensor(self._places[name]).data) for name in outputs
        ]


class TorchProgram:
    """torch, for a ``.pt2`` of ``torch.export``."""

    def __init__(self, path: Path, device: torch.device, precision: str) -> None:
        self.about = read_about(path, _member_of(path, ABOUT_FILE))
        refuse_code(path)
        try:
            program = torch.export.load(path)
        except Exception as error:  # its own types for each kind of damage
            raise damaged(path, "a torch.export program", error) from error
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        self._module, self._device = program.module(check_guards=False), device
        self._names = [str(name) for name in self.about["outputs"]]
        self.title = f"torch {torch.__version__}, {device}"

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Return outputs by name."""
        given = [torch.from_numpy(array).to(self._device) for array in inputs.values()]
        with torch.no_grad():
            found = self._module(*given)
        return [found[self._names.index(name)].cpu().numpy() for name in outputs]


RUNTIMES: dict[str, type[OnnxRuntime] | type[OpenVino] | type[TorchProgram]] = {
    ".onnx": OnnxRuntime,
    ".xml": OpenVino,
    ".pt2": TorchProgram,
}
"""Suffix -> what runs the file."""


def is_exported(path: Path) -> bool:
    """Return whether a path is named like an exported file; names of the Hub may end like one."""
    return path.suffix.lower() in RUNTIMES and not is_hub_name(path)


def open_runtime(path: Path, device: torch.device, precision: str = "") -> Runtime:
    """Open an exported file.

    Args:
        path: of the file.
        device: that runs it.
        precision: number format for the runtimes that choose it when they load; "": the file's.

    Raises:
        CheckpointError: not a file that ``export`` wrote, or damaged.
        ConfigError: the library that runs it is missing, or cannot use the device.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    runtime: Runtime = RUNTIMES[path.suffix.lower()](path, device, precision)
    return runtime


def import_library(name: str) -> Any:
    """Import a library of the extra ``export``.

    Raises:
        ConfigError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"Exported models need {name}: pip install 'camoxpert[export]' ({error})."
        ) from error


def read_about(path: Path, text: str | bytes | None) -> dict[str, Any]:
    """Return the metadata of an exported file.

    Raises:
        CheckpointError: there is none, so that the file is not one of ours.
    """
    try:
        about = json.loads(text or "null")
    except ValueError:
        about = None
    if not isinstance(about, dict) or "config" not in about:
        raise CheckpointError(
            f"{path} is not a model that `camoxpert export` wrote: it holds no settings."
        )
    return about


def refuse_code(path: Path) -> None:
    """Raise CheckpointError for an archive with pickles that could run code.

    ``torch.export.load`` tries the safe reader first and any pickle after it; so whatever the safe
    reader refuses must not get there.
    """
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            # A pickle, or a zip of torch.save, whatever its name is.
            if not data.startswith((b"PK\x03\x04", b"\x80")):
                continue
            try:
                torch.load(io.BytesIO(data), weights_only=True)
            except Exception as error:
                # Raw weights may start with any bytes; they are not read as pickles.
                if _is_raw(archive, name):
                    continue
                raise CheckpointError(
                    f"{path} holds pickled objects that are not tensors ({name}); loading them "
                    "could run code. Export the model again, or use an .onnx file."
                ) from error


def damaged(path: Path, what: str, error: Exception) -> CheckpointError:
    """Return the error for a file that a library cannot read."""
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path} cannot be read as {what} ({type(error).__name__}: {reason}).")


def _is_raw(archive: zipfile.ZipFile, member: str) -> bool:
    """Return whether an archive's own index says that a member holds plain numbers."""
    for name in archive.namelist():
        if name.endswith("_config.json"):
            index = json.loads(archive.read(name)).get("config", {})
            for entry in index.values():
                if member.endswith("/" + str(entry.get("path_name"))):
                    return not entry.get("use_pickle", True)
    return False


def _member_of(path: Path, name: str) -> bytes | None:
    """Return a member of a ``.pt2`` archive by the end of its name; None if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [member for member in archive.namelist() if member.endswith("/" + name)]
            return archive.read(found[0]) if found else None
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged(path, "a torch.export program", error) from error
