"""Neural Cleanse (Wang et al., IEEE S&P 2019, sections IV and VI): a trigger is a short cut from any class to another.

For each class, the smallest mask and the pattern in it are optimised that flip the probes to that class. Classes whose
mask is an outlier among the classes' (anomaly index of at least 2) and small are attacked. Examples are scored by the
penultimate units that the pattern raises most.

Unlike the paper, which filters or patches at test time, examples are removed, as in BaDLoss' comparison. Unlike the
program of that comparison, which optimises on the poisoned training set, only the probes are looked at, an epoch is
`steps` batches of them, whatever their number, the paper's tanh parameters and Adam (betas 0.5, 0.9) are used, and the
mask that is kept is the smallest that flipped enough probes, not the last. Both double or halve the penalty each epoch.

Where several classes are attacked, each class's scores are shifted to its threshold and divided by their deviation over
the probes, and the largest counts: above 0 an example is removed, as the union of the classes' removals. Where none is,
the class of the smallest mask gives the scores, and nothing is removed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.core.mesh import by_rows, place, round_up, to_host
from badloss_jax.core.seeding import generator
from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.models import ModelSpec
from badloss_jax.training.state import TrainState, forward_of

_NAME = "neural_cleanse"
_BETAS = 0.5, 0.9  # of Adam
_VALUES = 2**23  # of the images that a device takes at once: at 224 px one class, at 32 px and below about all
_CONSISTENT = 1.4826  # the deviation of a normal distribution, in median absolute deviations
_TINY = 1e-9


def anomaly_indices(norms: Float[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """Computes |norm - median| / (1.4826 * median absolute deviation) (section IV-B), finite and at least 0."""
    deviations = np.abs(norms - np.median(norms))
    return deviations / max(_CONSISTENT * np.median(deviations), _TINY)


def attacked_classes(norms: Float[np.ndarray, "K"], anomaly: float) -> Int[np.ndarray, "A"]:
    """Returns the classes whose anomaly index is at least `anomaly` and whose norm is below the median, ascending."""
    return np.flatnonzero((anomaly_indices(norms) >= anomaly) & (norms < np.median(norms)))


def most_raised(raised: Float[np.ndarray, "F"], share: float) -> Int[np.ndarray, "U"]:
    """Returns the floor(share F) units, at least one, that are raised most."""
    return np.argsort(-raised, kind="stable")[: max(1, math.floor(share * len(raised)))]


def probe_threshold(of_probes: Float[np.ndarray, "P"], share: float) -> float:
    """Returns the smallest of the probes' scores that at most floor(share P) of them exceed."""
    return float(np.sort(of_probes)[::-1][math.floor(share * len(of_probes))])


def excess(
    activations: Float[np.ndarray, "A N"], probe_ids: Int[np.ndarray, "P"], share: float
) -> Float[np.ndarray, "N"]:
    """Combines the classes' scores: the largest excess over a class's threshold, in deviations of its probes' scores.

    Args:
      activations: [A, N], of each attacked class's units, by example.
      probe_ids: int [P].
      share: of the probes that the thresholds may cost, all classes together.
    """
    parts = []
    for scores in activations.astype(np.float64):
        of_probes = scores[probe_ids]
        parts.append((scores - probe_threshold(of_probes, share / len(activations))) / max(of_probes.std(), _TINY))
    return np.max(parts, axis=0)


@dataclass(frozen=True)
class Found:
    """The best masks and patterns so far, one a class.

    Attributes:
      norms: L1 norms of the masks, in pixels; infinite before the first.
      flipped: shares of the probes that they flip.
      features: means over the probes that they are put on.
    """

    norms: Float[np.ndarray, "C"]
    flipped: Float[np.ndarray, "C"]
    features: Float[np.ndarray, "C F"]

    def better(self, other: "Found", wanted: float) -> "Found":
        """Takes from `other` what flips the share `wanted` with a smaller mask, or more if neither flips so many."""
        ours, theirs = self.flipped >= wanted, other.flipped >= wanted
        taken = np.where(ours | theirs, theirs & (~ours | (other.norms < self.norms)), other.flipped > self.flipped)
        return Found(np.where(taken, other.norms, self.norms), np.where(taken, other.flipped, self.flipped),
                     np.where(taken[:, None], other.features, self.features))  # fmt: skip


def _unit(raw: Array) -> Array:
    """Maps what is optimised to (0, 1)."""
    return (jnp.tanh(raw) + 1) / 2


def triggered(images: Float[Array, "B H W D"], raw: tuple[Array, Array]) -> Float[Array, "B H W D"]:
    """Puts one class's pattern into images as far as its mask lets it, from `raw` mask [H W 1] and pattern [H W D]."""
    mask, pattern = map(_unit, raw)
    return images * (1 - mask) + pattern * mask


@lru_cache(maxsize=8)
def make_steps(spec: ModelSpec, learning_rate: float, mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """Compiles the search; classes are shared by the devices, and nothing else is, so that none waits for another.

    Returns:
      begin: raw mask and pattern -> (raw, moments), the same for each of the classes [C] that it is given, too.
      learn: (raw, moments, classes, penalties [C], images, state) -> (raw, moments), a step of Adam; both are donated.
      judge: (raw, classes, images, real, state) -> (masks' norms [C], how many flip [C], sums of features [C, F]).
    """
    optimizer = optax.adam(learning_rate, *_BETAS)

    def network(images: Array, raw: tuple[Array, Array], state: TrainState) -> tuple[Array, Array]:
        return forward_of(spec, state)(triggered(images, raw))

    def begin(raw: tuple[Array, Array], classes: Array) -> tuple[tuple[Array, Array], Any]:
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(classes), 0), raw)
        return repeated, jax.vmap(optimizer.init)(repeated)

    def learn(
        raw: tuple[Array, Array], moments: Any, classes: Array, penalties: Array, images: Array, state: TrainState
    ) -> tuple[tuple[Array, Array], Any]:  # fmt: skip
        def loss_of(raw: tuple[Array, Array], target: Array, penalty: Array) -> Array:
            logits, _ = network(images, raw, state)
            return -jax.nn.log_softmax(logits)[:, target].mean() + penalty * _unit(raw[0]).sum()

        gradients = jax.vmap(jax.grad(loss_of))(raw, classes, penalties)
        updates, moments = jax.vmap(optimizer.update)(gradients, moments)
        return optax.apply_updates(raw, updates), moments

    def judge(
        raw: tuple[Array, Array], classes: Array, images: Array, real: Array, state: TrainState
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        def of_class(raw: tuple[Array, Array], target: Array) -> tuple[Array, Array, Array]:
            logits, features = network(images, raw, state)
            flips = real & (logits.argmax(-1) == target)
            return _unit(raw[0]).sum(), flips.sum(), jnp.where(real[:, None], features, 0).sum(0)

        return jax.vmap(of_class)(raw, classes)

    rows = by_rows(mesh)
    return (jax.jit(begin, out_shardings=rows), jax.jit(learn, donate_argnums=(0, 1), out_shardings=rows),
            jax.jit(judge, out_shardings=rows))  # fmt: skip


def reverse_engineer(
    context: Context, probes: Float[np.ndarray, "P H W D"], state: TrainState, settings: Mapping[str, Any]
) -> Found:
    """Optimises the masks and patterns of all classes, as many at once as fit into memory."""
    mesh, count, size, num_epochs = context.mesh, context.num_classes, settings["batch_size"], settings["epochs"]
    at_once = min(mesh.size * max(1, _VALUES // (size * probes[0].size)), round_up(count, mesh))
    draw = generator(context.seed, _NAME)
    raw = tuple(draw.normal(size=(*probes.shape[1:3], depth)).astype(probes.dtype) for depth in (1, probes.shape[3]))
    epochs = _batches(len(probes), num_epochs * settings["steps"], size, draw).reshape(num_epochs, -1, size)
    context.progress.phase(f"{_NAME} masks")
    context.progress.begin(count * epochs.size)
    parts = []
    for start in range(0, count, at_once):
        # Padding repeats the last class.
        classes = np.minimum(np.arange(start, start + at_once, dtype=np.int32), count - 1)
        parts.append(_search(context, probes, state, settings, raw, epochs, classes))
    context.progress.end()
    columns = zip(*((part.norms, part.flipped, part.features) for part in parts), strict=True)
    norms, flipped, features = (np.concatenate(column)[:count] for column in columns)
    return Found(norms, flipped, features)


def _search(
    context: Context, probes: np.ndarray, state: TrainState, settings: Mapping[str, Any], raw: Any,
    epochs: Int[np.ndarray, "E S B"], classes: Int[np.ndarray, "C"],
) -> Found:  # fmt: skip
    """Returns the best that was found of some classes; padding, which repeats the last one, does not count."""
    mesh, wanted, num_features = context.mesh, settings["flipped_share"], context.spec.num_features
    begin, learn, judge = make_steps(context.spec, settings["learning_rate"], mesh)
    penalties = np.full(len(classes), settings["penalty"], np.float32)
    best = Found(np.full(len(classes), np.inf), np.full(len(classes), -1.0), np.zeros((len(classes), num_features)))
    placed = place(classes, by_rows(mesh))
    raw, moments = begin(raw, placed)
    real_classes = len(np.unique(classes))
    for number, batches in enumerate(epochs, 1):
        weights = place(penalties, by_rows(mesh))
        for rows in batches:
            raw, moments = learn(raw, moments, placed, weights, probes[rows], state)
        flips, features = np.zeros(len(classes)), np.zeros((len(classes), num_features))
        for rows, real in _blocks(len(probes), epochs.shape[2]):
            norms, flipped, summed = map(to_host, judge(raw, placed, probes[rows], real, state))
            flips, features = flips + flipped, features + summed
        now = Found(norms.astype(np.float64), flips / len(probes), features / len(probes))
        best = best.better(now, wanted)
        penalties = penalties * np.where(now.flipped >= wanted, 2, 0.5).astype(np.float32)
        done = f"classes {classes[0] + 1} to {classes[-1] + 1}, epoch {number}/{len(epochs)}"
        context.progress.advance(real_classes * batches.size, done)
        context.progress.say(done)
    return best


def _batches(num_probes: int, steps: int, size: int, draw: np.random.Generator) -> Int[np.ndarray, "S B"]:
    """Draws batches of the probes: one shuffle of them after the other."""
    shuffles = -(-steps * size // num_probes)
    order = np.concatenate([draw.permutation(num_probes) for _ in range(shuffles)])
    return order[: steps * size].reshape(steps, size).astype(np.int32)


def _blocks(num_probes: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields blocks of all probes, and which rows of them are no padding."""
    for start in range(0, num_probes, size):
        rows = np.arange(start, start + size, dtype=np.int32)
        yield np.minimum(rows, num_probes - 1), rows < num_probes


def neural_cleanse(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Removes examples that the reverse-engineered triggers' units find suspicious, if a class is attacked at all.

    The score is the mean activation of the units that an attacked class's pattern raises most, less the threshold, in
    deviations over the probes; details: the attacked classes, and masks' norms (pixels), anomaly indices and shares of
    the probes flipped, by class.
    """
    observed, probe_ids = context.observed(), context.probe_ids
    probes = context.images(probe_ids)
    found = reverse_engineer(context, probes, context.attacked(), settings)
    attacked = attacked_classes(found.norms, settings["anomaly"])
    looked_at = attacked if len(attacked) else np.array([found.norms.argmin()])
    raised = found.features[looked_at] - observed.features[probe_ids].mean(0)
    units = [most_raised(of_class, settings["unit_share"]) for of_class in raised]
    activations = np.stack([observed.features[:, chosen].mean(1) for chosen in units])
    scores = excess(activations, probe_ids, settings["probe_share"])
    details = {
        "attacked": attacked.tolist(),
        "mask_norms": found.norms.tolist(),
        "anomaly_indices": anomaly_indices(found.norms).tolist(),
        "flipped": found.flipped.tolist(),
    }
    return Suspicion(scores, removed=(scores > 0) & bool(len(attacked)), details=details)
