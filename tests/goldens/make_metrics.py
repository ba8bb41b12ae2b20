"""Writes metrics.json, the reference values of tests/metrics.rs.

    pip install monai medpy scikit-image scikit-learn scipy
    python tests/goldens/make_metrics.py

Masks are unions of shapes in integer arithmetic, so that the test draws the same pixels from a few numbers.
Where two packages offer a metric they are checked against each other here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from medpy.metric import binary as medpy
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy import ndimage, special, stats
from skimage.metrics import hausdorff_distance
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

PIXEL_MM = 0.0785


def draw(width, height, shapes):
    """Ellipse and hole: centre, semi-axes. Box: first corner, last corner. Noise: seed, pixels in 1000."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    mask = np.zeros((height, width), bool)
    for kind, *v in shapes:
        if kind == "ellipse":
            cx, cy, a, b = v
            mask |= ((x - cx) * b) ** 2 + ((y - cy) * a) ** 2 <= (a * b) ** 2
        elif kind == "hole":
            cx, cy, a, b = v
            mask &= ((x - cx) * b) ** 2 + ((y - cy) * a) ** 2 > (a * b) ** 2
        elif kind == "box":
            x0, y0, x1, y1 = v
            mask |= (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)
        elif kind == "noise":
            seed, per_mille = v
            mask |= (x * 7919 + y * 104729 + seed) ** 2 % 1000003 % 1000 < per_mille
    return mask


MASKS = [
    # name, width, height, prediction, truth
    ("overlap", 97, 61, [["ellipse", 40, 30, 25, 14]], [["ellipse", 46, 27, 22, 17]]),
    ("equal", 40, 33, [["ellipse", 20, 16, 9, 12]], [["ellipse", 20, 16, 9, 12]]),
    ("apart", 80, 50, [["ellipse", 12, 10, 6, 5]], [["ellipse", 65, 40, 9, 7]]),
    ("cut by the border", 64, 48, [["ellipse", 2, 20, 20, 15]], [["ellipse", 0, 22, 17, 25]]),
    ("satellite", 90, 70, [["ellipse", 35, 35, 20, 18], ["box", 82, 60, 84, 63]], [["ellipse", 35, 36, 21, 17]]),
    ("ring", 71, 71, [["ellipse", 35, 35, 30, 30], ["hole", 35, 35, 20, 22]], [["ellipse", 35, 35, 30, 30]]),
    ("one pixel", 57, 43, [["box", 5, 6, 5, 6]], [["ellipse", 30, 25, 15, 11]]),
    ("everything", 31, 45, [["box", 0, 0, 30, 44]], [["ellipse", 14, 20, 6, 9]]),
    ("lines", 50, 50, [["box", 0, 25, 49, 25]], [["box", 10, 0, 11, 49]]),
    ("one row", 37, 1, [["box", 3, 0, 9, 0]], [["box", 7, 0, 20, 0]]),
    ("noise", 63, 59, [["ellipse", 30, 30, 15, 15], ["noise", 5, 20]], [["noise", 11, 300]]),
]


def one_hot(mask):
    return torch.from_numpy(mask)[None, None].float()


def segmentation(name, width, height, prediction, truth):
    p, t = draw(width, height, prediction), draw(width, height, truth)
    flat = t.ravel(), p.ravel()
    hd95 = compute_hausdorff_distance(one_hot(p), one_hot(t), include_background=True, percentile=95).item()
    hd95_mm = compute_hausdorff_distance(
        one_hot(p), one_hot(t), include_background=True, percentile=95, spacing=PIXEL_MM
    ).item()
    assd = medpy.assd(p, t)
    outline = [m & ~ndimage.binary_erosion(m) for m in (p, t)]
    hd = hausdorff_distance(*outline)
    edt = ndimage.distance_transform_edt(~t) ** 2

    assert np.isclose(hd, medpy.hd(p, t), rtol=1e-12)
    monai = compute_average_surface_distance(one_hot(p), one_hot(t), include_background=True, symmetric=True)
    assert np.isclose(assd, monai.item(), rtol=1e-6), (name, assd, monai)
    assert np.isclose(sk.f1_score(*flat), medpy.dc(p, t), rtol=1e-12)

    return {
        "name": name,
        "width": width,
        "height": height,
        "prediction": prediction,
        "truth": truth,
        "area": int(t.sum()),
        "outline": int(outline[1].sum()),
        "squared_distances_sum": int(np.rint(edt).sum()),
        "squared_distances_max": int(np.rint(edt).max()),
        "dice": sk.f1_score(*flat),
        "iou": sk.jaccard_score(*flat),
        "precision": sk.precision_score(*flat),
        "recall": sk.recall_score(*flat),
        "hd_px": hd,
        "hd95_px": hd95,
        "hd95_mm": hd95_mm,
        "assd_px": assd,
        "assd_mm": medpy.assd(p, t, voxelspacing=PIXEL_MM),
    }


def placements(scores, positive):
    """DeLong's structural components from their definition, pair by pair."""
    difference = scores[positive][:, None] - scores[~positive][None]
    psi = (difference > 0) + 0.5 * (difference == 0)
    return psi.mean(), psi.mean(1), psi.mean(0)


def delong(scores, positive):
    """AUCs, their standard errors, and z and p of the first score against each other one."""
    auc, v10, v01 = (np.array(v) for v in zip(*(placements(s, positive) for s in scores)))
    cov = np.cov(v10) / positive.sum() + np.cov(v01) / (~positive).sum()
    for s, a in zip(scores, auc):
        assert np.isclose(a, sk.roc_auc_score(positive, s), rtol=1e-12)
    se = np.sqrt(np.diag(cov))
    against_first = []
    for k in range(1, len(auc)):
        difference, spread = auc[0] - auc[k], np.sqrt(cov[0, 0] + cov[k, k] - 2 * cov[0, k])
        z = difference / spread
        against_first.append([difference, spread, z, 2 * stats.norm.sf(abs(z))])
    # On the logit scale, by the delta method.
    spread = stats.norm.ppf(0.975) * se / (auc * (1 - auc))
    interval = special.expit(special.logit(auc)[:, None] + np.stack([-spread, spread], 1))
    return {
        "auc": auc.tolist(),
        "standard_error": se.tolist(),
        "ci95": interval.tolist(),
        "first_against_others": against_first,
    }


# DeLong, DeLong and Clarke-Pearson 1988: ovarian cancer patients, albumin, total protein, K-G score and
# whether surgery helped; the 43 without missing values, as in the documentation of SAS PROC LOGISTIC.
OVARIAN = """
3.0 5.8 10 0 3.2 6.3 5 1 3.9 6.8 3 1 2.8 4.8 6 0 3.2 5.8 3 1 0.9 4.0 5 0 2.5 5.7 8 0 1.6 5.6 5 1 3.8 5.7 5 1
3.7 6.7 6 1 3.2 5.4 4 1 3.8 6.6 6 1 4.1 6.6 5 1 3.6 5.7 5 1 4.3 7.0 4 1 3.6 6.7 4 0 2.3 4.4 6 1 4.2 7.6 4 0
4.0 6.6 6 0 3.5 5.8 6 1 3.8 6.8 7 1 3.0 4.7 8 0 4.5 7.4 5 1 3.7 7.4 5 1 3.1 6.6 6 1 4.1 8.2 6 1 4.3 7.0 5 1
4.3 6.5 4 1 3.2 5.1 5 1 2.6 4.7 6 1 3.3 6.8 6 0 1.7 4.0 7 0 3.7 6.1 5 1 3.3 6.3 7 1 4.2 7.7 6 1 3.5 6.2 5 1
2.9 5.7 9 0 2.1 4.8 7 1 2.8 6.2 8 0 4.0 7.0 7 1 3.3 5.7 6 1 3.7 6.9 5 1 3.6 6.6 5 1
"""


def classification():
    rng = np.random.default_rng(1)
    positive = rng.random(90) < 0.35
    latent = 1.1 * positive + rng.normal(size=90) - 0.4
    # Two decimals: many ties.
    p = np.round(1 / (1 + np.exp(-1.5 * latent)), 2)
    q = np.round(1 / (1 + np.exp(-latent - rng.normal(size=90))), 2)
    decided = p >= 0.5
    tn, fp, fn, tp = sk.confusion_matrix(positive, decided).ravel().tolist()

    edges = np.linspace(0, 1, 16)
    # The bins of calibration_curve, which drops the empty ones.
    counts = np.bincount(np.searchsorted(edges[1:-1], p), minlength=15)
    fraction, mean_p = calibration_curve(positive, p, n_bins=15, strategy="uniform")
    ece = float(np.abs(fraction - mean_p) @ counts[counts > 0] / 90)

    albumin, protein, kg, helped = np.array(OVARIAN.split(), float).reshape(-1, 4).T
    return {
        "scores": [p.tolist(), q.tolist()],
        "positive": positive.astype(int).tolist(),
        "confusion": [tp, fp, fn, tn],
        "sensitivity": sk.recall_score(positive, decided),
        "specificity": sk.recall_score(~positive, ~decided),
        "precision": sk.precision_score(positive, decided),
        "f1": sk.f1_score(positive, decided),
        "brier": sk.brier_score_loss(positive, p),
        "ece": ece,
        "delong": delong([p, q], positive),
        "ovarian": {
            "scores": [albumin.tolist(), protein.tolist(), (-kg).tolist()],
            "positive": helped.astype(int).tolist(),
            "delong": delong([albumin, protein, -kg], helped > 0),
        },
    }


def statistics():
    values = np.round(np.random.default_rng(2).beta(6, 2, size=75), 4)
    bootstrap = stats.bootstrap(
        (values,), np.mean, n_resamples=200_000, batch=20_000, method="percentile", rng=np.random.default_rng(3)
    )
    return {
        "values": values.tolist(),
        "mean": values.mean(),
        "median": np.median(values),
        "variance": values.var(ddof=1),
        "quantiles": [[q, np.quantile(values, q)] for q in (0.0, 0.025, 0.3, 0.95, 0.975, 1.0)],
        "bootstrap_ci95": list(bootstrap.confidence_interval),
    }


golden = {
    "pixel_mm": PIXEL_MM,
    "segmentation": [segmentation(*case) for case in MASKS],
    "classification": classification(),
    "statistics": statistics(),
}


def line_by_line(value, depth):
    """JSON with one line per entry down to `depth` levels."""
    if depth == 0 or not isinstance(value, (dict, list)):
        return json.dumps(value, default=float)
    if isinstance(value, dict):
        entries = [f"{json.dumps(k)}: {line_by_line(v, depth - 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(entries) + "\n}"
    return "[\n" + ",\n".join(line_by_line(v, depth - 1) for v in value) + "\n]"


Path(__file__).with_name("metrics.json").write_text(line_by_line(golden, 2) + "\n")
