"""Predictions as annotations that labelling tools and pycocotools read: COCO and labelme.

Each photo has a file of its own, which the same call after a stop writes again or leaves. From
those of COCO ``coco.json`` is joined at the end, in the order of the ledger; it is only there while
it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from camoxpert.errors import DataError
from camoxpert.files import write_bytes, write_whole
from camoxpert.inference.prediction import Prediction, output_path

ANNOTATIONS = ("coco", "labelme")
COCO = "coco.json"
COCO_START = '{"info": {"description": "camoxpert predict"}'
"""First bytes of our ``coco.json``: another one is not replaced."""
LABEL = "object"
LABELME_VERSION = "5.5.0"
LARGEST_ERROR = 1.0
"""Pixels that a polygon may be off the outline; exact ones have too many points to edit."""


def save_annotations(found: Prediction, folder: Path, kinds: Iterable[str], file: Path) -> None:
    """Write the annotations of a photo under ``folder``.

    Args:
        found: the prediction.
        folder: of the results.
        kinds: those of ANNOTATIONS are written, others left to ``Prediction.save``.
        file: the photo.

    Raises:
        DataError: a file would be written outside ``folder``, or cannot be written.
    """
    for kind in kinds:
        if kind not in ANNOTATIONS:
            continue
        path = output_path(folder, kind, found.name)
        value = _coco(found, file) if kind == "coco" else _labelme(found, path, file)
        try:
            write_bytes(path, json.dumps(value).encode())
        except OSError as error:
            raise DataError(f"{path} could not be written: {error.strerror or error}.") from error


def _coco(found: Prediction, file: Path) -> dict[str, Any]:
    """Return the image and its annotation, without their numbers.

    One annotation for an image: the model tells object from background, not objects from each
    other, and an animal behind a branch is one object in two parts. None where nothing was found.
    """
    mask_HW = found.mask_HW
    height, width = found.size
    image = {"file_name": str(PurePosixPath(found.name).parent / file.name)}
    parts: dict[str, Any] = {"image": image | {"height": height, "width": width}}
    if mask_HW.any():
        rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
        top, left = int(rows[0]), int(columns[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
        parts["annotation"] = {
            "category_id": 1,
            "segmentation": {
                "size": [height, width],
                "counts": encode_counts(run_lengths(mask_HW)),
            },
            "area": int(mask_HW.sum()),
            "bbox": box,
            "iscrowd": 0,
            "score": round(found.confidence, 6),
        }
    return parts


def run_lengths(mask_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the lengths of runs of 0 and 1 in turn, down the columns, beginning with 0."""
    flat = mask_HW.T.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    ends = np.concatenate([[0], changes, [flat.size]])
    lengths = np.diff(ends)
    return np.concatenate([[0], lengths]) if flat.size and flat[0] else lengths


def encode_counts(lengths: NDArray[np.int64]) -> str:
    """Return run lengths as the text that pycocotools calls compressed counts.

    From the fourth on a length is the difference to the last but one before it. Each number is
    written in groups of 5 bits, lowest first, with a sixth bit where more follow, from "0" on.
    """
    left = lengths.astype(np.int64).copy()
    left[3:] -= lengths[1:-2]
    groups, open_ = [], np.ones(len(left), bool)
    while open_.any():
        bits = left & 0x1F
        left >>= 5
        # The fifth bit of the last group is the sign.
        more = np.where(bits & 0x10, left != -1, left != 0) & open_
        groups.append(np.where(open_, bits + 0x20 * more + 48, 0))
        open_ = more
    characters = np.stack(groups, 1).reshape(-1) if groups else np.zeros(0, np.int64)
    return characters[characters > 0].astype(np.uint8).tobytes().decode("ascii")


def _labelme(found: Prediction, path: Path, file: Path) -> dict[str, Any]:
    """Return what labelme opens: the outer outlines of all parts, as one group.

    Its polygons have no holes: they are filled. Parts of under three corners are left out.
    """
    contours, _ = cv2.findContours(
        found.mask_HW.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE
    )
    polygons = []
    for contour in contours:
        simple = cv2.approxPolyDP(contour, LARGEST_ERROR, True)
        points = simple if len(simple) >= 3 else contour
        if len(points) >= 3:
            polygons.append([[float(x), float(y)] for x, y in points[:, 0]])
    height, width = found.size
    shapes: list[dict[str, Any]] = [
        {
            "label": LABEL,
            "points": points,
            "group_id": 1 if len(polygons) > 1 else None,
            "description": "",
            "shape_type": "polygon",
            "flags": {},
        }
        for points in polygons
    ]
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": Path(os.path.relpath(file, path.parent)).as_posix(),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def begin_coco(folder: Path, *, wanted: bool, changes: bool) -> bool:
    """Return whether ``coco.json`` is to be joined at the end of a call.

    One that is about to change is removed: a call that is stopped leaves none out of date.

    Args:
        folder: of the results.
        wanted: the call writes COCO annotations.
        changes: the call has something to do.

    Raises:
        DataError: the file is that of somebody else.
    """
    path = folder / COCO
    there = path.is_file() and not path.is_symlink()
    own = False
    if there:
        with path.open("rb") as file:
            own = file.read(len(COCO_START)) == COCO_START.encode()
    if wanted and there and not own:
        raise DataError(
            f"{path} was not written by `predict`. Move it, or name another folder with -o."
        )
    if changes and own:
        path.unlink()
        return True
    return wanted and not own


def join_coco(folder: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``coco.json`` from the files of all photos; two passes, constant memory.

    Args:
        folder: of the results.
        rows: of the ledger, in order; those without COCO annotations are left out.

    Raises:
        DataError: a file cannot be read or written.
    """
    names = [row["item"] for row in rows if "coco" in row.get("kinds", ())]

    def write(out: IO[bytes]) -> None:
        out.write(f'{COCO_START},\n"categories": [{{"id": 1, "name": "{LABEL}"}}],\n'.encode())
        out.write(b'"images": [')
        for number, name in enumerate(names, 1):
            image = {"id": number} | _part(folder, name)["image"]
            out.write(b",\n" * (number > 1) + json.dumps(image).encode())
        out.write(b'],\n"annotations": [')
        written = 0
        for number, name in enumerate(names, 1):
            annotation = _part(folder, name).get("annotation")
            if annotation is not None:
                written += 1
                whole = {"id": written, "image_id": number} | annotation
                out.write(b",\n" * (written > 1) + json.dumps(whole).encode())
        out.write(b"]}\n")

    try:
        write_whole(folder / COCO, write)
    except OSError as error:
        raise DataError(
            f"{folder / COCO} could not be written: {error.strerror or error}."
        ) from error


def _part(folder: Path, name: str) -> dict[str, Any]:
    path = output_path(folder, "coco", name)
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Remove it; the same call makes it again."
        ) from error
    return value
