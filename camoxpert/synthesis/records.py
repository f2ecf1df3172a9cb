"""What is written about made images: their files, the table of pairs, provenance, the head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from camoxpert.data.files.image_io import encode, write_encoded
from camoxpert.data.files.labels import VOC_VOID, VOID, has_void
from camoxpert.data.files.provenance import PROVENANCE
from camoxpert.files import write_whole
from camoxpert.inference.ledger import Ledger, as_fields
from camoxpert.inference.plan import state_of
from camoxpert.inference.products import Product, Table
from camoxpert.runs.jobs import ItemRow

Row = dict[str, Any]
FORMATS = {"jpg": ".jpg", "png": ".png"}
KINDS = ("image", "mask")
LEDGER = "synthesis.jsonl"
PAIRS = "pairs.csv"
PAGE = "synthesis.html"
QUALITY = 95
"""Of JPEG files; compositions bring their own."""
COLUMNS = (
    *("image", "mask", "class", "kind", "source_image", "source_mask", "seed", "index"),
    *("object_fraction", "difficulty", "seconds"),
)


def product_of(image_format: str) -> Product:
    """Return what is made of sources; the folders are a layout that ``train`` reads."""
    return Product(
        LEDGER,
        {"image": "TrainDataset/Imgs", "mask": "TrainDataset/GT"},
        {"image": FORMATS[image_format]},
        item="image",
        again="make them again",
    )


@dataclass(frozen=True)
class Head:
    """What all images of a folder depend on besides their sources.

    Attributes:
        values: plain values; mappings may be nested.
    """

    values: Mapping[str, Any]

    def fields(self) -> dict[str, Any]:
        """Return the head of the ledger."""
        found: dict[str, Any] = json.loads(json.dumps(self.values))
        return found

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """Return a text for each value that differs from an earlier head."""
        before, now = dict(flat(earlier)), dict(flat(self.fields()))
        return [
            f"{name} {shown(before.get(name))}, now {shown(now.get(name))}"
            for name in dict.fromkeys((*before, *now))
            if before.get(name) != now.get(name)
        ]


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the values of nested mappings with the names that lead to them."""
    found = []
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        found += flat(value, f"{prefix}{key} ") if inner else [(prefix + key, value)]
    return found


def shown(value: Any) -> str:
    """Return a value of a head as text."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write_pair(
    product: Product,
    output: Path,
    name: str,
    image: NDArray[np.uint8] | bytes,
    mask_HW: NDArray[np.uint8],
) -> dict[str, Any]:
    """Write an image and its mask; return the fields of their files for the row.

    Args:
        product, output, name: what is made, its folder, the item.
        image: uint8 (H, W, 3) RGB, or the bytes of a JPEG file.
        mask_HW: uint8 0, VOID and 255.

    Raises:
        DataError: they cannot be written, or would be outside the folder.
    """
    suffix = product.suffixes["image"]
    if not isinstance(image, bytes):
        image = encode(image, suffix, quality=QUALITY)
    contents = {"image": image, "mask": encode_mask(mask_HW)}
    files, hashes = {}, {}
    for kind, data in contents.items():
        path = product.path(output, kind, name)
        write_encoded(path, data)
        files[kind] = path.relative_to(output).as_posix()
        hashes[kind] = hashlib.sha256(data).hexdigest()
    return {"kinds": list(KINDS), "files": files, "sha256": hashes}


def encode_mask(mask_HW: NDArray[np.uint8]) -> bytes:
    """Return a PNG that reads back as exactly this mask: uint8 0, VOID and 255.

    Void is written as PASCAL VOC does: a palette, whose last entry nobody labelled.
    """
    if not has_void(mask_HW):
        return encode(mask_HW, ".png")
    levels = np.zeros(256, np.uint8)
    levels[255], levels[VOID] = 1, 255
    picture = Image.fromarray(cv2.LUT(mask_HW, levels), "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[1], palette[255] = (255, 255, 255), VOC_VOID
    picture.putpalette(palette.reshape(-1).tolist())
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def failed_row(files: Sequence[Path], reason: str) -> Row:
    """Return the fields of the row of an image that could not be made."""
    return {"status": "failed", **as_fields(state_of(files)), "reason": reason}


def cells(row: ItemRow) -> list[str]:
    """Return the cells of an image's row of ``pairs.csv``, in the order of COLUMNS."""
    sources = {source["role"]: source["path"] for source in row["sources"]}
    hard = row.get("difficulty")
    return [
        row["files"]["image"],
        row["files"]["mask"],
        row["group"],
        row["kind"],
        sources.get("image", sources.get("object", "")),
        sources.get("mask", sources.get("object mask", "")),
        str(row["seed"]),
        str(row["index"]),
        f"{row['object_fraction']:.6f}",
        "" if hard is None else f"{hard:.4f}",
        f"{row['seconds'].get('forward', 0.0):.4f}",
    ]


TABLE = Table(PAIRS, COLUMNS, cells, "synthesize")
PROVENANCE_KEYS = (
    *(
        "kind",
        "seed",
        "index",
        "parameters",
        "sources",
        "test_source",
        "mask_source",
        "sha256",
        "height",
        "width",
    ),
    *("group", "object_fraction", "changed_fraction", "difficulty", "difficulty_source", "made"),
)


def provenance_row(row: ItemRow, head: Mapping[str, Any]) -> Row:
    """Return what is told of one image: how it was made, from what, and its hashes."""
    values: Mapping[str, object] = row
    known = {key: values[key] for key in PROVENANCE_KEYS if key in values}
    return {**row["files"], **known, "settings": head_digest(head)}


def head_digest(head: Mapping[str, Any]) -> str:
    """Return a short hash of the settings of a folder."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]


def write_provenance(ledger: Ledger) -> None:
    """Write a row for each made image, in the order of the ledger, after the settings.

    Raises:
        OSError: it cannot be written.
    """

    def write(file: IO[bytes]) -> None:
        head = ledger.earlier or {}
        first = {"settings": head_digest(head), "values": head}
        file.write(json.dumps(first).encode() + b"\n")
        for row in ledger.rows():
            if row["status"] == "ok":
                file.write(json.dumps(provenance_row(row, head)).encode() + b"\n")

    write_whole(ledger.folder / PROVENANCE, write)
