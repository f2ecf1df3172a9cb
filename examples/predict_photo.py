"""Find the hidden object in one photo and save pictures of it.

python examples/predict_photo.py runs/beetle photo.jpg out/
"""

import sys
from pathlib import Path

import camoxpert


def main(model: str, photo: str, output: str) -> None:
    """Print what was found, and write map, mask, cut-out and overlay."""
    prediction = camoxpert.load(model).predict(photo)
    height, width = prediction.size
    print(f"{prediction.name}: {width} x {height} pixels, {prediction.seconds:.2f} s")
    print(f"object on {prediction.object_fraction:.1%}, confidence {prediction.confidence:.2f}")
    for path in prediction.save(output):
        print(path)


def photo_of_toy_data() -> Path:
    """Return the first photo that ``camoxpert synthesize toy data/toy`` generated."""
    return min(Path("data/toy/TestDataset/toy/Imgs").iterdir())


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*(given if given else ["runs/toy", str(photo_of_toy_data()), "out"]))
