"""Predict a folder of any size in constant memory and list the photos with the largest objects.

python examples/stream_folder.py runs/beetle photos/
"""

import heapq
import sys

import camoxpert


def main(model: str, folder: str) -> None:
    """Print the names of the photos with the largest objects, and the share they cover."""
    predictions = camoxpert.load(model).stream(folder, batch_size=8)
    largest = heapq.nlargest(5, ((p.object_fraction, p.name) for p in predictions))
    for fraction, name in largest:
        print(f"{fraction:6.1%}  {name}")


if __name__ == "__main__":
    main(*(sys.argv[1:3] or ["runs/toy", "data/toy/TestDataset/toy/Imgs"]))
