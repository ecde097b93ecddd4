"""What each example looks like to a network that has not learnt it: where relabelled images came from."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.scoring.rows import Rows, row_chunks

MOST_ODDS = 15.0  # log-odds beyond say no more
_VALUES = 2**22  # held at a time
_SHRINKAGE = 0.05  # of the classifier's covariance towards a multiple of the identity
_CALIBRATED_ON = 5_000  # examples, at most


@dataclass(frozen=True)
class Impressions:
    """What each example looks like.

    Attributes:
      first: int64 [N], the class that it looked like after the first epoch, of those in the labels.
      late: int64 [N], the likeliest class but its own, by all epochs together, or its own where that is likelier.
      odds: float32 [N], log-odds of the likeliest other class against its own, by all epochs, in [-15, 15].
    """

    first: Int[np.ndarray, "N"]
    late: Int[np.ndarray, "N"]
    odds: Float[np.ndarray, "N"]


def chosen_epochs(num_epochs: int) -> Int[np.ndarray, "E"]:
    """Returns the epochs that are looked at: eight at most, closer together at the beginning, or all of so few."""
    shares = np.array([0, 1 / 14, 1 / 7, 2 / 7, 3 / 7, 4 / 7, 11 / 14, 1])
    if num_epochs <= len(shares):
        return np.arange(num_epochs)
    return np.unique(np.round(shares * (num_epochs - 1)).astype(np.int64))


def impressions_of(features: Float[np.ndarray, "N T d"] | Rows, labels: Int[np.ndarray, "N"]) -> Impressions:
    """Tells what examples look like.

    After the first epoch that is the class whose mean is the nearest. By all of `chosen_epochs`, a linear discriminant
    analysis of each, labels as given, says how likely the classes are, each as frequent as the others. Its
    log-likelihoods are averaged, and divided by the one temperature at which the labels are the likeliest (Guo et al.
    2017): epochs of much the same would be surer than they are right.

    Args:
      features: [N, T, d], in memory, or read chunk by chunk.
      labels: int [N], as trained on; poison shifts a class's mean, but no more than its share.

    Returns:
      What each looks like.
    """
    known, group, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    count = len(labels)
    width = features.shape[2]
    reader = _FeatureReader(features, count, chosen_epochs(features.shape[1]))

    means, spread = _moments(reader, group, sizes)
    weights, constants = _discriminants(reader, means, spread, sizes, width)
    some = np.unique(np.linspace(0, count - 1, min(count, _CALIBRATED_ON)).astype(np.int64))
    temperature = _temperature(reader.read(some) @ weights + constants, group[some])
    at_first = means[:, :width].T.astype(np.float32)

    first = np.empty(count, np.int64)
    late = np.empty(count, np.int64)
    odds = np.empty(count, np.float32)
    step = max(1, _VALUES // max(weights.shape))
    for chunk in reader.chunks():
        for start in range(chunk.start, chunk.stop, step):
            rows = slice(start, min(start + step, chunk.stop))
            values = reader.read(rows)
            first[rows] = _nearest_means(values[:, :width], at_first)
            late[rows], odds[rows] = _likeliest(values @ weights + constants, group[rows], temperature)
    return Impressions(known[first].astype(np.int64), known[late].astype(np.int64), odds)


@dataclass(frozen=True)
class _FeatureReader:
    """Reads features at some epochs, of each example in one row of D = E d values."""

    features: Rows
    count: int
    epochs: Int[np.ndarray, "E"]

    def read(self, rows: slice | np.ndarray) -> Float[np.ndarray, "n D"]:
        chunk = np.asarray(self.features[rows])[:, self.epochs]
        return chunk.reshape(len(chunk), -1).astype(np.float32)

    def chunks(self) -> Iterator[slice]:
        for start, stop in row_chunks(self.features, 0, self.count):
            yield slice(start, stop)


def _nearest_means(values: Float[np.ndarray, "n d"], means: Float[np.ndarray, "d K"]) -> Int[np.ndarray, "n"]:
    """Returns the class whose mean is the nearest; the square of the values themselves is the same for all."""
    return ((means**2).sum(0) - 2 * values @ means).argmin(1)


def _likeliest(
    scores: Float[np.ndarray, "n K"], group: Int[np.ndarray, "n"], temperature: float
) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """Returns the likeliest class but its own, or its own where that is likelier, with the odds; uses up `scores`."""
    own = group[:, None]
    ours = np.take_along_axis(scores, own, 1)
    np.put_along_axis(scores, own, -np.inf, 1)
    other = scores.argmax(1)[:, None]
    more = (np.take_along_axis(scores, other, 1) - ours)[:, 0] / temperature
    return np.where(more > 0, other[:, 0], group), np.clip(more, -MOST_ODDS, MOST_ODDS)


def _moments(
    reader: _FeatureReader, group: Int[np.ndarray, "N"], sizes: Int[np.ndarray, "K"]
) -> tuple[Float[np.ndarray, "K D"], Float[np.ndarray, "D"]]:
    """Returns the classes' means, and the standard deviation of all, infinite where nothing varies."""
    width = len(reader.epochs) * reader.features.shape[2]
    sums = np.zeros((len(sizes), width))
    squares = np.zeros(width)
    for chunk in reader.chunks():
        values = reader.read(chunk).astype(np.float64)
        squares += (values**2).sum(0)

        # Sorted by class, each class is one run, which is added up at once.
        order = np.argsort(group[chunk], kind="stable")
        present, starts = np.unique(group[chunk][order], return_index=True)
        sums[present] += np.add.reduceat(values[order], starts)

    variance = squares / len(group) - (sums.sum(0) / len(group)) ** 2
    spread = np.where(variance > 1e-8, np.sqrt(np.maximum(variance, 0)), np.inf)
    return sums / sizes[:, None], spread


def _discriminants(
    reader: _FeatureReader,
    means: Float[np.ndarray, "K D"],
    spread: Float[np.ndarray, "D"],
    sizes: Int[np.ndarray, "K"],
    width: int,
) -> tuple[Float[np.ndarray, "D K"], Float[np.ndarray, "K"]]:
    """Returns weights and constants of the classes' log-likelihoods, averaged over epochs of so many values."""
    count = sizes.sum()
    epochs = means.shape[1] // width
    middle = sizes @ means / count

    def by_epoch(values: np.ndarray) -> Float[np.ndarray, "E n d"]:
        return ((values - middle) / spread).reshape(-1, epochs, width).transpose(1, 0, 2).astype(np.float32)

    # The covariance within classes is that of all less that of the means.
    within = np.zeros((epochs, width, width))
    for chunk in reader.chunks():
        values = by_epoch(reader.read(chunk))
        within += values.transpose(0, 2, 1) @ values
    classes = by_epoch(means).astype(np.float64)
    within = (within - (classes.transpose(0, 2, 1) * sizes) @ classes) / count

    common = np.trace(within, axis1=1, axis2=2) / width + 1e-6
    within = (1 - _SHRINKAGE) * within + _SHRINKAGE * common[:, None, None] * np.eye(width)

    directions = np.linalg.solve(within, classes.transpose(0, 2, 1)) / epochs
    constants = -0.5 * (directions * classes.transpose(0, 2, 1)).sum((0, 1))
    weights = directions.reshape(-1, len(sizes)) / spread[:, None]
    return weights.astype(np.float32), (constants - middle @ weights).astype(np.float32)


def _temperature(scores: Float[np.ndarray, "n K"], group: Int[np.ndarray, "n"]) -> float:
    """Returns what log-likelihoods are divided by where the labels are the likeliest."""
    from scipy.optimize import minimize_scalar  # takes a quarter of a second to import

    scores = scores.astype(np.float64) - scores.max(1, keepdims=True)
    ours = np.take_along_axis(scores, group[:, None], 1)[:, 0]

    def surprise(log_temperature: float) -> float:
        inverse = np.exp(-log_temperature)
        return float((np.log(np.exp(scores * inverse).sum(1)) - ours * inverse).mean())

    return float(np.exp(minimize_scalar(surprise, bounds=(-3, 6), method="bounded").x))
