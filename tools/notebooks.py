"""Strip the outputs of notebooks/: ``python tools/notebooks.py``; ``--check`` only names them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "notebooks"
KEPT = ("kaggle", "kernelspec", "language_info")
"""Metadata of a notebook that stay; the rest is of the program that edited it."""


def stripped(book: dict[str, Any]) -> dict[str, Any]:
    """Return a notebook without outputs, counts and what its editor left."""
    cells = []
    for cell in book["cells"]:
        kept = {**cell, "metadata": {}}
        if cell["cell_type"] == "code":
            kept |= {"execution_count": None, "outputs": []}
        cells.append(kept)
    metadata = {key: book["metadata"][key] for key in KEPT if key in book["metadata"]}
    metadata["language_info"] = {"name": "python"}
    return {**book, "cells": cells, "metadata": metadata}


def main(check: bool) -> int:
    """Strip what is not stripped; return 1 if ``check`` finds any."""
    found = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        book = json.loads(path.read_text(encoding="utf-8"))
        if stripped(book) != book:
            found.append(path.name)
            if not check:
                text = json.dumps(stripped(book), indent=1, ensure_ascii=False)
                path.write_text(f"{text}\n", encoding="utf-8")
    if found:
        print(f"{'with outputs' if check else 'stripped'}: {', '.join(found)}")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
