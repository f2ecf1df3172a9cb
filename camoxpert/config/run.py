"""The settings of what a run writes."""

from __future__ import annotations

from dataclasses import dataclass

from camoxpert.config.schema import setting


@dataclass(frozen=True)
class RunConfig:
    """Output folder, logging and what is written at the end."""

    dir: str = setting("runs", "folder that holds the run folders", flag="--checkpoint-dir")
    name: str = setting(
        "", "name of the run folder; empty: made from the settings", flag="--run-name"
    )
    log_every: int = setting(10, "optimizer steps between logged training records", minimum=1)
    save_every: int = setting(
        0,
        "also save every this many optimizer steps; 0: at each epoch's end",
        flag="--save-every",
        minimum=0,
    )
    keep_every: int = setting(
        0,
        "keep the checkpoint of every this many epochs permanently; 0: the last two and the best",
        flag="--keep-every",
        minimum=0,
    )
    tensorboard: bool = setting(True, "write TensorBoard events", flag="--tensorboard")
    num_images: int = setting(
        6, "validation pictures in TensorBoard and images per gallery in the report", minimum=0
    )
    test: bool = setting(
        True, "score the test sets found beside the training data when training ends", flag="--test"
    )
    report: bool = setting(True, "write report.html when training ends", flag="--report")
