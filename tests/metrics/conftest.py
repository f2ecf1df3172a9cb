"""The oracle: pysodmetrics under the framework's result keys."""

import warnings

import numpy as np
import pytest


def oracle_scores(prediction, mask, *, normalise=True):
    """Return (results, curves) of one uint8 pair from pysodmetrics."""
    oracle = pytest.importorskip("py_sod_metrics")
    binary = {"with_dynamic": False, "with_adaptive": False, "with_binary": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its F class is deprecated; empty blocks divide by 0
        measures = {
            "S": oracle.Smeasure(),
            "MAE": oracle.MAE(),
            "W": oracle.WeightedFmeasure(),
            "E": oracle.Emeasure(),
            "F": oracle.Fmeasure(),
            "V2": oracle.FmeasureV2(
                {"IoU": oracle.IOUHandler(**binary), "Dice": oracle.DICEHandler(**binary)}
            ),
        }
        if not normalise:
            prediction, mask = prediction / 255, mask > 128
        for measure in measures.values():
            measure.step(prediction, mask, normalize=normalise)
        done = {key: measure.get_results() for key, measure in measures.items()}
    em, fm, pr = done["E"]["em"], done["F"]["fm"], done["F"]["pr"]
    results = {
        "Smeasure": done["S"]["sm"],
        "MAE": done["MAE"]["mae"],
        "wFmeasure": done["W"]["wfm"],
        "meanEm": em["curve"].mean(),
        "maxEm": em["curve"].max(),
        "adpEm": em["adp"],
        "meanFm": fm["curve"].mean(),
        "maxFm": fm["curve"].max(),
        "adpFm": fm["adp"],
        "IoU": done["V2"]["IoU"]["binary"],
        "Dice": done["V2"]["Dice"]["binary"],
    }
    curves = {"E": em["curve"], "F": fm["curve"], "precision": pr["p"], "recall": pr["r"]}
    return {key: float(value) for key, value in results.items()}, curves


@pytest.fixture(scope="session")
def oracle():
    return oracle_scores


@pytest.fixture
def square():
    """Return a 64 x 64 mask (0, 255) with a 20 x 24 object, 11.7 % of the image."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 18:42] = 255
    return mask
