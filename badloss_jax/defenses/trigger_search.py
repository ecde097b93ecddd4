"""The search for triggers in Neural Cleanse (Wang et al., IEEE S&P 2019, section IV): one mask and pattern a class.

For each class the smallest mask is optimised, and the pattern in it, that flip the probes to that class. An epoch is
`steps` batches of the probes, whatever their number. After it all probes are judged, the best mask so far is kept, and
the penalty on a mask is doubled where enough probes flipped, and halved where they did not.

What is optimised, called raw here, is mapped to (0, 1) by the paper's (tanh + 1) / 2.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from badloss_jax.core.mesh import by_rows, jit_on, place, round_up, to_host
from badloss_jax.core.seeding import generator
from badloss_jax.defenses.context import Context
from badloss_jax.models import ModelSpec
from badloss_jax.training.state import TrainState, forward_of

Raw = tuple[Array, Array]  # a mask [H W 1] and a pattern [H W D], or as many of both as there are classes

_NAME = "neural_cleanse"
_BETAS = 0.5, 0.9  # of Adam
_VALUES = 2**23  # of the images that a device takes at once: at 224 px one class, at 32 px and below about all


@dataclass(frozen=True)
class Triggers:
    """The best masks and patterns so far, one a class.

    Attributes:
      norms: L1 norms of the masks, in pixels; infinite before the first.
      flipped: shares of the probes that they flip.
      features: means over the probes that they are put on.
    """

    norms: Float[np.ndarray, "C"]
    flipped: Float[np.ndarray, "C"]
    features: Float[np.ndarray, "C F"]

    def better(self, other: "Triggers", wanted: float) -> "Triggers":
        """Takes from `other` what flips the share `wanted` with a smaller mask, or more if neither flips so many.

        Args:
          other: of the same classes.
          wanted: share of the probes, 0 to 1.
        """
        enough = self.flipped >= wanted
        enough_of_other = other.flipped >= wanted

        smaller = ~enough | (other.norms < self.norms)
        more = other.flipped > self.flipped
        taken = np.where(enough | enough_of_other, enough_of_other & smaller, more)

        return Triggers(
            norms=np.where(taken, other.norms, self.norms),
            flipped=np.where(taken, other.flipped, self.flipped),
            features=np.where(taken[:, None], other.features, self.features),
        )


def triggered(images: Float[Array, "B H W D"], raw: Raw) -> Float[Array, "B H W D"]:
    """Puts one class's pattern into images as far as its mask lets it.

    Args:
      images: in [0, 1].
      raw: mask [H W 1] and pattern [H W D].
    """
    mask, pattern = map(_unit, raw)
    return images * (1 - mask) + pattern * mask


@lru_cache(maxsize=8)
def make_steps(spec: ModelSpec, learning_rate: float, mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """Compiles the search; classes are shared by the devices, and nothing else is, so that none waits for another.

    Args:
      spec: the network that is looked into.
      learning_rate: of Adam.
      mesh: the devices.

    Returns:
      begin: raw mask and pattern -> (raw, moments), the same for each of the classes [C] that it is given, too.
      learn: (raw, moments, classes, penalties [C], images, state) -> (raw, moments), a step of Adam; both are donated.
      judge: (raw, classes, images, real, state) -> (masks' norms [C], how many flip [C], sums of features [C, F]).
    """
    optimizer = optax.adam(learning_rate, *_BETAS)
    rows = by_rows(mesh)

    def begin(raw: Raw, classes: Array) -> tuple[Raw, Any]:
        repeated = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], len(classes), 0), raw)
        return repeated, jax.vmap(optimizer.init)(repeated)

    return (
        jax.jit(begin, out_shardings=rows),
        jit_on(_learn_of(spec, optimizer), mesh, donate_argnums=(0, 1), out_shardings=rows),
        jit_on(_judge_of(spec), mesh, out_shardings=rows),
    )


def _learn_of(spec: ModelSpec, optimizer: optax.GradientTransformation) -> Callable[..., tuple[Raw, Any]]:
    """Returns the step of Adam on the masks and patterns of some classes."""

    def learn(
        raw: Raw, moments: Any, classes: Array, penalties: Array, images: Array, state: TrainState
    ) -> tuple[Raw, Any]:
        def loss_of(raw: Raw, target: Array, penalty: Array) -> Array:
            logits, _ = forward_of(spec, state)(triggered(images, raw))
            return -jax.nn.log_softmax(logits)[:, target].mean() + penalty * _unit(raw[0]).sum()

        gradients = jax.vmap(jax.grad(loss_of))(raw, classes, penalties)
        updates, moments = jax.vmap(optimizer.update)(gradients, moments)
        return optax.apply_updates(raw, updates), moments

    return learn


def _judge_of(spec: ModelSpec) -> Callable[..., tuple[Array, Array, Array]]:
    """Returns what says how large the masks are, and what a block of probes becomes under them."""

    def judge(raw: Raw, classes: Array, images: Array, real: Array, state: TrainState) -> tuple[Array, Array, Array]:
        def of_class(raw: Raw, target: Array) -> tuple[Array, Array, Array]:
            logits, features = forward_of(spec, state)(triggered(images, raw))
            flips = real & (logits.argmax(-1) == target)
            return _unit(raw[0]).sum(), flips.sum(), jnp.where(real[:, None], features, 0).sum(0)

        return jax.vmap(of_class)(raw, classes)

    return judge


def _unit(raw: Array) -> Array:
    """Maps what is optimised to (0, 1)."""
    return (jnp.tanh(raw) + 1) / 2


@dataclass(frozen=True)
class _Search:
    """What the searches of all classes share.

    Attributes:
      spec: the network that is looked into.
      state: its parameters and statistics.
      settings: `config.defenses.neural_cleanse`.
      probes: [P, H, W, D] in [0, 1].
      start: the raw mask and pattern that every class begins with.
      epochs: int32 [E, S, B], which probes each step of each epoch is made on.
    """

    spec: ModelSpec
    state: TrainState
    settings: Mapping[str, Any]
    probes: Float[np.ndarray, "P H W D"]
    start: tuple[Float[np.ndarray, "H W 1"], Float[np.ndarray, "H W D"]]
    epochs: Int[np.ndarray, "E S B"]


def reverse_engineer(
    context: Context, probes: Float[np.ndarray, "P H W D"], state: TrainState, settings: Mapping[str, Any]
) -> Triggers:
    """Optimises the masks and patterns of all classes, as many at once as fit into memory.

    Args:
      context: what every defence is given.
      probes: in [0, 1].
      state: of the network that is looked into.
      settings: `config.defenses.neural_cleanse`.

    Returns:
      The best of each of the K classes.
    """
    search = _plan(context, probes, state, settings)
    count = context.num_classes

    # Every device holds whole classes, at least one, and no more than are asked for.
    per_device = max(1, _VALUES // (settings["batch_size"] * probes[0].size))
    at_once = min(context.mesh.size * per_device, round_up(count, context.mesh))

    context.progress.phase(f"{_NAME} masks")
    context.progress.begin(count * search.epochs.size)
    parts = []
    for start in range(0, count, at_once):
        # Padding repeats the last class.
        classes = np.minimum(np.arange(start, start + at_once, dtype=np.int32), count - 1)
        parts.append(_search_classes(context, search, classes))
    context.progress.end()

    return Triggers(
        norms=np.concatenate([part.norms for part in parts])[:count],
        flipped=np.concatenate([part.flipped for part in parts])[:count],
        features=np.concatenate([part.features for part in parts])[:count],
    )


def _plan(context: Context, probes: np.ndarray, state: TrainState, settings: Mapping[str, Any]) -> _Search:
    """Draws where the search begins, and the batches of all its epochs: the same for every class."""
    draw = generator(context.seed, _NAME)
    height, width, depth = probes.shape[1:]
    mask = draw.normal(size=(height, width, 1)).astype(probes.dtype)
    pattern = draw.normal(size=(height, width, depth)).astype(probes.dtype)

    num_epochs = settings["epochs"]
    size = settings["batch_size"]
    batches = _batches(len(probes), num_epochs * settings["steps"], size, draw)
    epochs = batches.reshape(num_epochs, -1, size)
    return _Search(context.spec, state, settings, probes, (mask, pattern), epochs)


def _search_classes(context: Context, search: _Search, classes: Int[np.ndarray, "C"]) -> Triggers:
    """Returns the best of some classes; padding, which repeats the last one, does not count as progress."""
    settings = search.settings
    rows = by_rows(context.mesh)
    begin, learn, judge = make_steps(search.spec, settings["learning_rate"], context.mesh)

    placed = place(classes, rows)
    raw, moments = begin(search.start, placed)

    best = Triggers(
        norms=np.full(len(classes), np.inf),
        flipped=np.full(len(classes), -1.0),
        features=np.zeros((len(classes), search.spec.num_features)),
    )
    penalties = np.full(len(classes), settings["penalty"], np.float32)
    num_classes = len(np.unique(classes))
    for number, batches in enumerate(search.epochs, 1):
        weights = place(penalties, rows)
        for batch in batches:
            raw, moments = learn(raw, moments, placed, weights, search.probes[batch], search.state)

        latest = _judge_probes(judge, raw, placed, search)
        best = best.better(latest, settings["flipped_share"])

        # Where enough flip, the mask may shrink; where not, flipping comes first.
        enough = latest.flipped >= settings["flipped_share"]
        penalties = penalties * np.where(enough, 2, 0.5).astype(np.float32)

        text = f"classes {classes[0] + 1} to {classes[-1] + 1}, epoch {number}/{len(search.epochs)}"
        context.progress.advance(num_classes * batches.size, text)
        context.progress.say(text)
    return best


def _judge_probes(judge: Callable, raw: Raw, classes: Array, search: _Search) -> Triggers:
    """Puts the triggers of some classes on all probes, block by block."""
    num_probes = len(search.probes)
    flipped = np.zeros(len(classes))
    features = np.zeros((len(classes), search.spec.num_features))

    for rows, real in _blocks(num_probes, search.epochs.shape[2]):
        judgement = judge(raw, classes, search.probes[rows], real, search.state)
        norms, flips, sums = map(to_host, judgement)
        flipped = flipped + flips
        features = features + sums

    return Triggers(norms.astype(np.float64), flipped / num_probes, features / num_probes)


def _batches(num_probes: int, steps: int, size: int, draw: np.random.Generator) -> Int[np.ndarray, "S B"]:
    """Draws batches of the probes: one shuffle of them after the other."""
    shuffles = -(-steps * size // num_probes)
    order = np.concatenate([draw.permutation(num_probes) for _ in range(shuffles)])
    return order[: steps * size].reshape(steps, size).astype(np.int32)


def _blocks(num_probes: int, size: int) -> Iterator[tuple[Int[np.ndarray, "B"], Bool[np.ndarray, "B"]]]:
    """Yields blocks of all probes, and which rows of them are no padding."""
    for start in range(0, num_probes, size):
        rows = np.arange(start, start + size, dtype=np.int32)
        yield np.minimum(rows, num_probes - 1), rows < num_probes
