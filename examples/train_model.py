"""Train a model and print its scores.

python examples/train_model.py data/toy runs --epochs 20
"""

import argparse
from typing import Any

import camoxpert


def main(data: str, runs: str, **settings: Any) -> None:
    """Train with settings given as keywords, named like the flags of the command."""
    result = camoxpert.train(dataset_path=data, checkpoint_dir=runs, **settings)
    print(f"weights in {result.path / 'checkpoints'}")
    for dataset, scores in result.scores.items():
        print(f"{dataset}: weighted F {scores['wFmeasure']:.3f}, MAE {scores['MAE']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?", default="data/toy")
    parser.add_argument("runs", nargs="?", default="runs")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    main(options.data, options.runs, epochs=options.epochs)
