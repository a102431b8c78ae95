"""Chi-square tests that see a bias of .02 total variation, whatever its shape.

A law at total variation d from the tested one adds N sum (delta^2 / p) to the statistic's mean, which by Cauchy-Schwarz is at least
N (sum |delta|)^2 = N (2 d)^2: .0016 N at .02. `biased` is the law for which it is no more than that, so a test that fails on it
has the power. Worked example: 16 cells, threshold 15 + 10 sqrt(30) = 70; 60,000 trials add 96 and are enough, 10,000 add 16.
"""

from __future__ import annotations

import numpy as np

__all__ = ["BIAS", "biased", "excess"]

BIAS = 0.02


def biased(law: np.ndarray) -> np.ndarray:
    """The law [K] at total variation BIAS that chi-square sees least: about one half of the mass a little up, the other down."""
    up, rest = np.zeros(len(law), bool), 0.0  # the largest first, each to the lighter half
    for cell in np.argsort(-law):
        up[cell] = law[up].sum() <= rest
        rest += 0.0 if up[cell] else law[cell]
    share = np.where(up, law / law[up].sum(), -law / law[~up].sum())
    return law + BIAS * share


def excess(counts: np.ndarray, law: np.ndarray) -> float:
    """Pearson's statistic over the threshold df + 10 sqrt(2 df); cells that expect fewer than 5 are merged."""
    expected = counts.sum() * law
    small = expected < 5
    counts, expected = (
        np.append(column[~small], column[small].sum()) if small.any() else column for column in (counts, expected)
    )
    df = len(expected) - 1
    return float(((counts - expected) ** 2 / np.maximum(expected, 1.0)).sum() / (df + 10 * (2 * df) ** 0.5))
