"""Writes paired.json, the reference values of tests/paired.rs.

    pip install numpy scipy statsmodels
    python tests/goldens/make_paired.py

SciPy gives the Wilcoxon tests; those with ties as well, by its permutation of all signs. The centre and its
interval, which SciPy lacks, are taken from their definitions and held to Hollander and Wolfe's published example.
"""

import json
from itertools import product
from pathlib import Path

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

# Hollander and Wolfe, Nonparametric Statistical Methods, table 3.1: depression before and after treatment.
BEFORE = [1.83, 0.50, 1.62, 2.48, 1.68, 1.88, 1.55, 3.06, 1.30]
AFTER = [0.878, 0.647, 0.598, 2.05, 1.06, 1.29, 1.06, 3.14, 1.29]


def walsh(d):
    i, j = np.triu_indices(len(d))
    return np.sort((d[i] + d[j]) / 2)


def outside(n):
    """How many pair means lie outside the interval at either end, as R's wilcox.test counts them."""
    if n <= 50:
        counts = np.ones(1)
        for rank in range(1, n + 1):
            shifted = np.zeros(len(counts) + rank)
            shifted[rank:] = counts
            shifted[: len(counts)] += counts
            counts = shifted
        return int(np.sum(np.cumsum(counts) / counts.sum() < 0.025))
    sd = np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    return int(np.floor(n * (n + 1) / 4 - stats.norm.ppf(0.975) * sd))


def sample(name, d):
    d = np.asarray(d, float)
    left = d[d != 0]
    ranks = stats.rankdata(np.abs(left))
    positive, negative = ranks[left > 0].sum(), ranks[left < 0].sum()
    tied = len(np.unique(np.abs(left))) < len(left)
    if len(left) > 50:
        p = stats.wilcoxon(left, method="approx", correction=False).pvalue
    elif not tied:
        p = stats.wilcoxon(left, method="exact").pvalue
    else:
        p = stats.wilcoxon(left, method=stats.PermutationMethod(n_resamples=np.inf)).pvalue
        sums = np.array([ranks[np.array(s, bool)].sum() for s in product([0, 1], repeat=len(left))])
        tail = min(positive, negative)
        assert np.isclose(p, min(1, 2 * np.mean(sums <= tail + 1e-9)), rtol=1e-12), name
    means, k = walsh(d), outside(len(d))
    return {
        "name": name,
        "differences": d.tolist(),
        "n": len(left),
        "positive": positive,
        "negative": negative,
        "p_value": p,
        "rank_biserial": (positive - negative) / (positive + negative),
        "centre": np.median(means),
        "ci95": [means[k - 1], means[len(means) - k]] if k else None,
    }


rng = np.random.default_rng(6)
hollander = sample("Hollander and Wolfe", np.round(np.subtract(BEFORE, AFTER), 3))
assert np.isclose(hollander["centre"], 0.46) and np.allclose(hollander["ci95"], [0.01, 0.786])
assert np.isclose(hollander["p_value"], 0.0390625)

golden = {
    "samples": [
        hollander,
        sample("four", [0.3, -0.1, 0.4, 0.2]),
        sample("one sign", [0.1, 0.25, 0.3, 0.45, 0.5, 0.61]),
        sample("ties and zeros", np.round(rng.normal(0.4, 1, 14)) / 4),
        sample("fifty", np.round(rng.normal(0.02, 0.1, 50), 9)),
        sample("fifty-one", np.round(rng.normal(-0.03, 0.1, 51), 9)),
        sample("many, with ties and zeros", np.round(rng.normal(0.01, 0.1, 400), 2)),
    ],
    "holm": [
        {"p": p, "corrected": multipletests(p, method="holm")[1].tolist()}
        for p in ([0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.9], [0.02], [0.012, 0.011, 0.3, 0.013, 0.0])
    ],
}


def line_by_line(value, depth):
    """JSON with one line per entry down to `depth` levels."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return json.dumps(value, default=float)
    if isinstance(value, dict):
        entries = [f"{json.dumps(k)}: {line_by_line(v, depth - 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    return "[\n" + ",\n".join(line_by_line(v, depth - 1) for v in value) + "\n]"


Path(__file__).with_name("paired.json").write_text(line_by_line(golden, 2) + "\n")
