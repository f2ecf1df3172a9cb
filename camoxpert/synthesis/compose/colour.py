"""Give an object the colours of its surroundings."""

from __future__ import annotations

import numpy as np

SPREAD = (0.5, 1.6)
"""Least and largest factor of a colour's deviation: flat surroundings do not erase an object."""
LEAST_DEVIATION = 0.02
"""Deviation, as a share of full scale, below which a colour counts as this varied."""


def colour_map(
    inside: np.ndarray, surroundings: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the linear map that moves an object's colours towards those of its surroundings.

    At full strength it gives the object the mean and the covariance of its surroundings, by the
    shortest way that does so: the linear Monge-Kantorovich map (Pitie and Kokaram 2007, "The
    Linear Monge-Kantorovitch Linear Colour Mapping for Example-Based Colour Transfer"). Correlated
    channels need no special colour space.

    Args:
        inside: float32 (N, 3), the object's colours, 0..1.
        surroundings: float32 (M, 3), the colours around it.
        strength: 0 keeps the object's colours, 1 gives it those of its surroundings.

    Returns:
        matrix (3, 3) and offset (3,), float32: ``new = matrix @ old + offset``.
    """
    identity = np.eye(3)
    if not strength or not len(inside) or not len(surroundings):
        return identity.astype(np.float32), np.zeros(3, np.float32)
    (mean, own), (wanted, other) = _statistics(inside), _statistics(surroundings)
    root = _power(own, 0.5)
    inverse = _power(own, -0.5)
    matrix = inverse @ _power(root @ other @ root, 0.5) @ inverse
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    matrix = (vectors * np.clip(values, *SPREAD)) @ vectors.T
    offset = wanted - matrix @ mean
    mixed = strength * matrix + (1 - strength) * identity
    return mixed.astype(np.float32), (strength * offset).astype(np.float32)


def _statistics(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean (3,) and covariance (3, 3) of colours (N, 3), no colour being quite constant."""
    exact = colours.astype(np.float64)
    # A product is ten times as fast as numpy's mean over the longer axis.
    mean = np.ones(len(exact)) @ exact / len(exact)
    exact -= mean
    return mean, exact.T @ exact / len(exact) + LEAST_DEVIATION**2 * np.eye(3)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    """Return a power of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    power: np.ndarray = (vectors * np.maximum(values, 1e-12) ** exponent) @ vectors.T
    return power
