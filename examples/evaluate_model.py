"""Score a model on a data set and print the field's measures with their 95 % intervals.

python examples/evaluate_model.py runs/beetle data/NC4K
"""

import sys

import camoxpert


def main(model: str, data: str) -> None:
    """Print one line per measure; ``output="scores"`` would write tables, curves and a page."""
    for result in camoxpert.evaluate(model, data):
        print(f"{result.method} on {result.dataset}, {result.num_images} images")
        for measure, value in result.scores.items():
            low, high = result.intervals[measure]
            print(f"  {measure:<10} {value:.3f}  (95 %: {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main(*(sys.argv[1:3] or ["runs/toy", "data/toy"]))
