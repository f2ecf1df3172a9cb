"""One self-contained HTML page about a data set, and its contact sheet, from plain values."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from camoxpert.pages import plots
from camoxpert.pages.page import write_html
from camoxpert.pages.report import chart

CELL = 168
COLUMNS = 8
MARKS = {"error": "&#10007;", "warning": "!", "note": "&middot;"}
FILES_SHOWN = 20


def write_page(path: Path, summary: Mapping[str, Any]) -> Path:
    """Write the page.

    Args:
        path: file.
        summary: ``roots``, ``layouts``, ``findings`` (level, check, text, files), ``parts`` (title,
            sizes and classes as counts, contact sheet as uint8 RGB) and ``copies`` (caption and two
            pictures as uint8 RGB).
    """
    findings = summary["findings"]
    counts = {level: sum(f["level"] == level for f in findings) for level in MARKS}
    verdict = "Training should not start" if counts["error"] else "Ready to train"
    sections = [
        f"<h1>{verdict}</h1><p class='soft'>{escape(', '.join(map(str, summary['roots'])))}</p>",
        _tiles(summary, counts),
        _findings(findings),
        _copies(summary["copies"]),
        *(_part(part) for part in summary["parts"]),
    ]
    return write_html(path, "CamoXpert doctor", sections)


def contact_sheet(pictures: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Lay small images with their masks outlined on one sheet, uint8 RGB.

    Args:
        pictures: (image uint8 (H, W, 3), mask uint8 (H, W)) of any small size.
    """
    rows = max(1, -(-len(pictures) // COLUMNS))
    columns = min(COLUMNS, max(1, len(pictures)))
    sheet = np.full((rows * CELL, columns * CELL, 3), 128, np.uint8)
    for index, (image, mask) in enumerate(pictures):
        cell = fit(plots.overlay(image, mask, alpha=0.2), CELL - 4)
        y, x = index // COLUMNS * CELL, index % COLUMNS * CELL
        top, left = y + (CELL - cell.shape[0]) // 2, x + (CELL - cell.shape[1]) // 2
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def fit(image: np.ndarray, side: int) -> np.ndarray:
    """Scale an image so that its longer side is ``side``."""
    scale = side / max(image.shape[:2])
    size = [max(1, round(n * scale)) for n in image.shape[1::-1]]
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    scaled: np.ndarray = cv2.resize(image, size, interpolation=how)
    return scaled


def _tiles(summary: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    pairs = sum(part["pairs"] for part in summary["parts"])
    tiles = (
        (pairs, "sound pairs"),
        (counts["error"], "errors"),
        (counts["warning"], "warnings"),
        (len(summary["copies"]), "pairs of copies"),
    )
    cells = "".join(f"<div class='tile'><b>{n}</b><span>{name}</span></div>" for n, name in tiles)
    found = "".join(f"<li>{escape(text)}</li>" for text in summary["layouts"])
    return f"<div class='tiles'>{cells}</div><section><h2>Found</h2><ul>{found}</ul></section>"


def _findings(findings: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    order = list(MARKS)
    for finding in sorted(findings, key=lambda f: order.index(f["level"])):
        files = [str(file) for file in finding["files"]]
        listed = "".join(f"<li>{escape(file)}</li>" for file in files[:FILES_SHOWN])
        more = len(files) - FILES_SHOWN
        listed += f"<li>and {more} more in findings.json</li>" if more > 0 else ""
        details = (
            f"<details><summary>{len(files)} entries</summary><ul>{listed}</ul></details>"
            if files
            else ""
        )
        kind = "" if finding["level"] == "note" else " class='warning'"
        rows.append(
            f"<div{kind}><b>{MARKS[finding['level']]} {escape(finding['level'])}</b> "
            f"({escape(finding['check'])}) {escape(finding['text'])}{details}</div>"
        )
    return f"<section><h2>Findings</h2>{''.join(rows)}</section>"


def _copies(copies: Sequence[Mapping[str, Any]]) -> str:
    if not copies:
        return ""
    figures = []
    for entry in (entry for entry in copies if entry["pictures"]):
        pictures = [fit(picture, 220) for picture in entry["pictures"]]
        height = max(picture.shape[0] for picture in pictures)
        padded = [
            np.pad(p, ((0, height - p.shape[0]), (0, 6), (0, 0)), constant_values=128)
            for p in pictures
        ]
        caption = escape(entry["caption"])
        source = _jpeg(np.hstack(padded))
        figures.append(
            f"<figure><img src='{source}' "
            f"alt='{caption}'><figcaption>{caption}</figcaption></figure>"
        )
    rest = len(copies) - len(figures)
    more = f"<p class='soft'>{rest} more in findings.json.</p>" if rest > 0 else ""
    return (
        f"<section><h2>Images that show the same</h2><div class='gallery'>{''.join(figures)}</div>"
        f"{more}</section>"
    )


def _part(part: Mapping[str, Any]) -> str:
    title = escape(part["title"])
    bars = {"object size (share of the image)": part["sizes"], "class": part["classes"]}
    shown = {name: counts for name, counts in bars.items() if counts}
    picture = chart(lambda: plots.plot_counts(shown), f"histograms of {part['title']}")
    source = _jpeg(part["sheet"])
    return (
        f"<section><h2>{title}</h2><p class='soft'>{part['pairs']} sound pairs</p>{picture}"
        f"<h3>Contact sheet: masks outlined</h3><img class='chart' src='{source}' "
        f"alt='contact sheet of {title}'></section>"
    )


def _jpeg(pixels: np.ndarray) -> str:
    _, data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"
