"""What runs an exported file: ONNX Runtime, OpenVINO or torch, behind one call.

Arrays go in and out; the names are those of the graph (``images``, ``reference``; ``probability``,
``logits``, ``presence``).
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from camoxpert.errors import CheckpointError, ConfigError
from camoxpert.runs.hub import is_hub_name
from camoxpert.runs.metadata import EXPORTED_SHAPE, check_shape, wrong
from camoxpert.runs.origin import SharedState

if TYPE_CHECKING:
    # Annotations are never evaluated, so Python 3.10 need not have it.
    from typing import NotRequired

Array = NDArray[Any]
ABOUT = "camoxpert"
"""Key of the metadata in an exported file."""
LAYOUT = 1
"""Version of the metadata."""
OUTPUTS = ("probability", "logits", "presence")
ABOUT_FILE = "camoxpert.json"
"""The same inside a ``.pt2`` archive."""


class PresenceImages(TypedDict):
    """The presence head of an exported model: on how many images it was calibrated; 0: not."""

    images: int


class ExportAbout(TypedDict):
    """The metadata of an exported file, and of ``FILE.json`` beside it.

    ``export.job.about_of`` makes it. ``gate`` is missing while the file is being judged; ``int8``
    is of that precision alone; ``experts_in_branches`` of files without a fixed size; older files
    have no ``kept_experts``, ``least_side`` (shortest side that it may be given) nor ``files``
    (name -> sha256), which is in ``FILE.json`` alone.
    """

    layout: int
    camoxpert: str  # version
    format: str
    precision: str
    static: list[int] | None  # batch, height, width; None: any
    sides_are_multiples_of: int
    least_side: NotRequired[int]
    img_size: int
    threshold: float
    inputs: list[str]
    outputs: list[str]
    presence: PresenceImages | None  # None without the head
    guidance: dict[str, Any] | None  # ``exported.memory_of``; None without guidance
    kept_experts: NotRequired[list[list[int]] | None]
    config: dict[str, Any]  # nested settings, without paths
    scores: dict[str, float]  # of the validation
    state: SharedState
    checkpoint_sha256: str
    experts_in_branches: NotRequired[int]
    int8: NotRequired[dict[str, Any]]  # what was quantised, and with which images
    files: NotRequired[dict[str, str]]
    gate: NotRequired[dict[str, Any]]  # ``export.gate.Gate.fields``


class Runtime(Protocol):
    """An exported graph that is ready to run.

    Attributes:
        title: name and version of the library, and where it runs.
        about: the metadata of the file.
    """

    title: str
    about: ExportAbout

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
        if device.type == "cuda" and self._session.get_providers()[0] == "CPUExecutionProvider":
            raise ConfigError(
                f"--device {device}: onnxruntime could not load its CUDA libraries and would run "
                "on the CPU. Install those of its version, or use --device cpu."
            )
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


EXAMPLES = "data/sample_inputs/model.pt"
NUMBERS = re.compile(r"(weight|tensor)_\d+")
OURS = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)"
    rf"|models/model\.json|{EXAMPLES}|extra/{re.escape(ABOUT_FILE)}"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
"""Members of an archive that ``export`` writes."""


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
        raise _not_installed(name, str(error)) from error


def check_library(name: str) -> None:
    """Raise ConfigError if a library of the extra ``export`` is not installed."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        raise _not_installed(name, "it is not installed")


def _not_installed(name: str, reason: str) -> ConfigError:
    return ConfigError(f"Exported models need {name}: pip install 'camoxpert[export]' ({reason}).")


def read_about(path: Path, text: str | bytes | None) -> ExportAbout:
    """Return the metadata of an exported file.

    Raises:
        CheckpointError: there is none, so that the file is not one of ours; it is of a later
            version, or holds what cannot be.
    """
    try:
        about: object = json.loads(text or "null")
    except ValueError:
        about = None
    if not _holds_settings(about):
        raise CheckpointError(
            f"{path} is not a model that `camoxpert export` wrote: it holds no settings."
        )
    if about.get("layout") != LAYOUT:
        raise CheckpointError(
            f"{path} has metadata of layout {about.get('layout')}; this version reads {LAYOUT}."
        )
    check_shape(path, about, EXPORTED_SHAPE)
    for name in ("format", "precision"):
        if not about.get(name):
            raise wrong(path, name, about.get(name), "text")
    outputs, static = about.get("outputs") or (), about.get("static")
    if "logits" not in outputs or not set(outputs) <= set(OUTPUTS):
        raise wrong(path, "outputs", about.get("outputs"), f"of {', '.join(OUTPUTS)}")
    if static is not None and (len(static) != 3 or min(static) < 1):
        raise wrong(path, "static", static, "batch, height and width")
    return about


def _holds_settings(about: object) -> TypeGuard[ExportAbout]:
    return isinstance(about, dict) and "config" in about


def refuse_code(path: Path) -> None:
    """Raise CheckpointError for an archive that is more than a program and plain numbers.

    ``torch.export.load`` reads pickles of any kind and loads compiled libraries where an archive
    asks for it. So this is a list of what ``export`` writes, and nothing else is opened.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            roots = {name.partition("/")[0] for name in names}
            members = [name.partition("/")[2] for name in names]
            strange = [name for name in members if not OURS.fullmatch(name)]
            if len(roots) != 1 or len(set(names)) < len(names) or strange:
                raise _holds_code(path, strange[0] if strange else "several archives in one")
            for name in names:
                if name.endswith("_config.json"):
                    for entry in json.loads(archive.read(name))["config"].values():
                        member = str(entry["path_name"])
                        if entry["use_pickle"] is not False or not NUMBERS.fullmatch(member):
                            raise _holds_code(path, member)
                elif name.endswith(EXAMPLES) and archive.getinfo(name).file_size:
                    # Ours is empty; what the safe reader takes is harmless.
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged or hostile archive raises
        raise damaged(path, "a torch.export program", error) from error


def _holds_code(path: Path, member: str) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than a program and plain numbers ({member}); loading it could run "
        "code. Export the model again, or use an .onnx file."
    )


def damaged(path: Path, what: str, error: Exception) -> CheckpointError:
    """Return the error for a file that a library cannot read."""
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(f"{path} cannot be read as {what} ({type(error).__name__}: {reason}).")


def _member_of(path: Path, name: str) -> bytes | None:
    """Return a member of a ``.pt2`` archive by the end of its name; None if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [member for member in archive.namelist() if member.endswith("/" + name)]
            return archive.read(found[0]) if found else None
    except (OSError, zipfile.BadZipFile) as error:
        raise damaged(path, "a torch.export program", error) from error
