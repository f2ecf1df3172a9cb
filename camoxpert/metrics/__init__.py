"""The field's measures, computed from one joint histogram per image."""

from camoxpert.metrics.evaluator import HIGHER_IS_BETTER, KNOWN_KEYS, Evaluator, is_better
from camoxpert.metrics.scoring import EXTRA_KEYS, FAST_KEYS, RESULT_KEYS

__all__ = [
    "EXTRA_KEYS",
    "FAST_KEYS",
    "HIGHER_IS_BETTER",
    "KNOWN_KEYS",
    "RESULT_KEYS",
    "Evaluator",
    "is_better",
]
