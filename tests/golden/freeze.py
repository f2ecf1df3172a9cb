"""Writes what the tests in ``tests/frozen`` compare with; run by hand where a change is meant.

python tests/golden/freeze.py [flags|errors|digests|exits]; without a word: all of them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def main(names: list[str], scratch: Path) -> None:
    # The tests' own folder, and the checkout that they lie in.
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    import torch
    from frozen import digests, error_texts, exits, flags, store

    os.environ["CAMOXPERT_CACHE"] = str(scratch / "cache")
    torch.set_num_threads(1)
    if "flags" in names:
        store.write("flags", flags.collect())
    if "errors" in names:
        store.write("errors", error_texts.collect())
    if "exits" in names:
        (scratch / "exits").mkdir()
        store.write("exits", exits.collect(scratch / "exits"))
    if "digests" in names:
        (scratch / "digests").mkdir()
        measured = digests.measure(scratch / "digests")
        # Only this machine's: what other machines measured was of another program.
        store.write("digests", {digests.environment(): measured})


if __name__ == "__main__":
    every = ["flags", "errors", "digests", "exits"]
    wanted = sys.argv[1:] or every
    if not set(wanted) <= set(every):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        main(wanted, Path(scratch))
