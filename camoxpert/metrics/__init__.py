"""The field's measures, computed from one joint histogram per image."""

from camoxpert.metrics.evaluator import RESULT_KEYS, Evaluator, is_better

__all__ = ["RESULT_KEYS", "Evaluator", "is_better"]
