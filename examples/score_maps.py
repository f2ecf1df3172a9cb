"""Score the prediction maps of any model against masks, without torch.

python examples/score_maps.py maps/ours data/CAMO/GT
"""

import sys

import camoxpert


def main(predictions: str, masks: str) -> None:
    """Print the main measures of each method on each data set."""
    for result in camoxpert.score_maps(predictions, masks, intervals=False):
        shown = ", ".join(f"{key} {result.scores[key]:.3f}" for key in ("Smeasure", "MAE"))
        print(f"{result.method} on {result.dataset}: {shown}")


if __name__ == "__main__":
    main(*(sys.argv[1:3] or ["out/maps", "data/toy/TestDataset/toy/GT"]))
