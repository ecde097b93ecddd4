"""What each example looks like to those who have not learnt the trigger: where relabelled poison came from.

That is the network after its first epoch, or a linear classifier on pixels, too simple to learn a faint trigger.
"""

import warnings

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from scipy import stats
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from badloss_jax.scoring.distances import Rows, row_chunks

_VALUES = 2**22  # held at a time
_SIDE = 16  # pixels, at most, of what the linear classifier sees
_FITTED = 50_000  # images, at most, that it learns from
_SHRINKAGE = 0.5  # of its covariance; pixels of few images say little about theirs
_MOST_CLASSES = 5_000  # whose confusions are counted, in 400 MB


def first_seen_as(features: Float[np.ndarray, "N d"] | Rows, labels: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns the class whose mean each example's features are nearest to, int64, at an early epoch.

    Args:
      features: [N, d], or [N, 1, d], of one epoch; in memory, or read chunk by chunk.
      labels: int [N], as trained on; poison shifts a class's mean, but no more than its share.
    """
    count, width = len(labels), int(np.prod(features.shape[1:]))
    known, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.zeros((len(known), width))
    for start, stop in row_chunks(features, 0, count):
        np.add.at(means, group[start:stop], _flat(features[start:stop]))
    means /= sizes[:, None]
    squares, seen = (means**2).sum(1), np.empty(count, np.int64)
    rows = max(1, _VALUES // max(width, len(known)))
    for start in range(0, count, rows):
        chunk = _flat(features[start : start + rows])
        seen[start : start + rows] = (squares - 2 * chunk @ means.T).argmin(1)
    return known[seen].astype(np.int64)


def pixels_seen_as(images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns the class that a linear discriminant analysis of the pixels takes each example for, int64.

    Images are averaged down to at most 16 x 16 pixels, the covariance is shrunk by half, and classes count alike.

    Args:
      images: uint8 [N, H, W, C].
      labels: int [N], as trained on.
    """
    count, (classes, firsts) = len(labels), np.unique(labels, return_index=True)
    chosen = np.union1d(firsts, np.linspace(0, count - 1, _FITTED).astype(np.int64))
    if not 1 < len(classes) < min(len(chosen), _MOST_CLASSES):
        return np.array(labels, np.int64)
    model = LinearDiscriminantAnalysis(
        solver="lsqr", shrinkage=_SHRINKAGE, priors=np.full(len(classes), 1 / len(classes))
    )
    with warnings.catch_warnings(action="ignore"):  # of classes with a single image
        model.fit(_averaged(images[chosen]), labels[chosen])
    rows = max(1, _VALUES // max(int(np.prod(images.shape[1:])), len(classes)))
    parts = [model.predict(_averaged(images[start : start + rows])) for start in range(0, count, rows)]
    return np.concatenate(parts).astype(np.int64)


def _averaged(images: np.ndarray) -> Float[np.ndarray, "M D"]:
    """Averages blocks of pixels; what is left over at the right and lower edge is dropped."""
    count, height, width, channels = images.shape
    down, right = -(-height // _SIDE), -(-width // _SIDE)
    blocks = images[:, : height // down * down, : width // right * right]
    blocks = blocks.reshape(count, height // down, down, width // right, right, channels)
    return blocks.mean((2, 4), dtype=np.float32).reshape(count, -1)


def _flat(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows).reshape(len(rows), -1).astype(np.float64)


def stranger_p_values(
    labels: Int[np.ndarray, "N"], seen_as: Int[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"], num_classes: int
) -> Float[np.ndarray, "K"]:  # fmt: skip
    """Tests of each class whether too many of its examples look like classes that it is hardly confused with.

    An attacker who relabels images takes them from all other classes; a clean class is confused with a few. So of each
    class the half of the others is taken that every second of its examples look like least, for those between, and the
    other way round. How many of all probes are strangers by that measure says how many clean examples would be. Classes
    differ in how well they are told apart, so this is no exact test. A class is not suspicious if its own probes may
    well be strangers as often: if one is, unless it should be more of them with 95 % certainty.

    Args:
      labels: int [N].
      seen_as: int [N], by `first_seen_as` or `pixels_seen_as`.
      is_probe: bool [N].
      num_classes: K.

    Returns:
      float64 [K]; 1 where nothing can be said, as of more than 5,000 classes. Not corrected for their number.
    """
    if num_classes > _MOST_CLASSES:
        return np.ones(num_classes)
    half, second = (num_classes - 1) // 2, np.arange(len(labels)) % 2
    counts, of_probes = np.zeros((2, 2, num_classes, num_classes), np.int64)
    np.add.at(counts, (second[~is_probe], labels[~is_probe], seen_as[~is_probe]), 1)
    np.add.at(of_probes, (second[is_probe], labels[is_probe], seen_as[is_probe]), 1)
    strangers, probes = np.zeros((2, num_classes), np.int64)
    for label in range(num_classes):
        for part in (0, 1):
            order = np.argsort(counts[1 - part, label], kind="stable")
            rare = order[order != label][:half]
            strangers[label] += counts[part, label, rare].sum()
            probes[label] += of_probes[part, label, rare].sum()
    sizes, own, among = counts.sum((0, 2)), of_probes.sum((0, 2)), int(probes.sum())
    total = int(own.sum())
    if not half or among >= total:
        return np.ones(num_classes)
    p_values = stats.betabinom.sf(strangers - 1, sizes, among + 1, total - among)
    fewer = stats.binom.cdf(probes, own, strangers / np.maximum(sizes, 1))
    alike = (probes > 0) & (fewer > 0.05)
    return np.where(alike | (sizes == 0), 1.0, p_values)
