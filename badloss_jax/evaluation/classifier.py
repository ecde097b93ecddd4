"""Clean accuracy, attack success rate and robust accuracy of a trained network (BaDLoss, section 5.1)."""

import collections
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.attacks.poisoning import evaluation_triggers
from badloss_jax.attacks.trigger import Trigger
from badloss_jax.core.mesh import by_rows, pass_batch_size, place_rows, to_host
from badloss_jax.core.seeding import generator
from badloss_jax.data import Split
from badloss_jax.models import ModelSpec
from badloss_jax.training.in_flight import InFlight
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import make_predict_step

_AHEAD = 2  # batches that are made ready while one is computed


def predict(
    spec: ModelSpec,
    state: TrainState,
    images: UInt8[np.ndarray, "N H W C"],
    batch_size: int,
    mesh: Mesh,
    rows: Int[np.ndarray, "M"] | None = None,
    trigger: Trigger | None = None,
) -> Int[np.ndarray, "M"]:
    """Predicts the classes of images.

    Args:
      spec: of the network.
      state: with its weights.
      images: uint8 [N, H, W, C].
      batch_size: images at a time, of all devices together; see `pass_batch_size`.
      mesh: the devices.
      rows: int [M], which images, by default all.
      trigger: to put on them, or None.

    Returns:
      int32 [M].
    """
    step = make_predict_step(spec, mesh)
    size = pass_batch_size(batch_size, mesh)
    if rows is None:
        rows = np.arange(len(images))

    predicted: list[jax.Array] = []
    in_flight = InFlight(jax.block_until_ready, mesh)
    for batch in _placed(images, rows, size, mesh, trigger):
        predicted.append(step(state, batch))
        in_flight.append(predicted[-1])

    # Without images there is nothing else to join.
    return np.concatenate([np.zeros(0, np.int32), *map(to_host, predicted)])[: len(rows)]


def _placed(
    images: UInt8[np.ndarray, "N H W C"],
    rows: Int[np.ndarray, "M"],
    size: int,
    mesh: Mesh,
    trigger: Trigger | None,
) -> Iterator[jax.Array]:
    """Yields batches on the devices, float32 in [0, 1], a few of which are made ready by threads meanwhile.

    Images travel as the bytes that they are; with a trigger on them they are no whole numbers any more.
    """

    def part(start: int, begin: int, end: int) -> np.ndarray:
        # What one device needs of the batch, with black images past the end.
        batch_rows = rows[start + begin : start + end]
        batch = images[batch_rows]
        if trigger:
            batch = batch.astype(np.float32) / 255
            # A device may have nothing but padding.
            batch = trigger(batch) if len(batch) else batch
        padding = np.zeros((end - begin - len(batch_rows), *images.shape[1:]), batch.dtype)
        return np.concatenate([batch, padding])

    def place(start: int) -> jax.Array:
        return place_rows((size, *images.shape[1:]), mesh, partial(part, start))

    show = _make_show(mesh)
    with ThreadPoolExecutor(_AHEAD, "badloss-evaluating") as threads:
        ahead: collections.deque[Future] = collections.deque()
        for start in range(0, len(rows), size):
            ahead.append(threads.submit(place, start))
            if len(ahead) > _AHEAD:
                yield show(ahead.popleft().result())
        while ahead:
            yield show(ahead.popleft().result())


@lru_cache(maxsize=8)
def _make_show(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Compiles images, uint8 or float32 -> float32 in [0, 1]."""

    def show(images: Array) -> Array:
        if images.dtype == jnp.uint8:
            return images.astype(jnp.float32) / 255
        return images

    return jax.jit(show, out_shardings=by_rows(mesh))


def evaluate(
    spec: ModelSpec,
    state: TrainState,
    test: Split,
    manifest: Manifest,
    settings: Mapping[str, Any],
    mesh: Mesh,
) -> dict[str, Any]:
    """Measures a network on the clean and on the triggered test set.

    Args:
      spec: of the network.
      state: with its weights.
      test: images and their true classes.
      manifest: of the attacks, from which the triggers are.
      settings: as `config.evaluation`: "batch_size", "boost", and "max_triggered", how many images of an attack.
      mesh: the devices.

    Returns:
      `clean_accuracy`; per attack `attack_success_rate` (share of triggered test images, target class left out, that
      are called the target), `robust_accuracy` (share given their true class) and, where a trigger can be made
      `settings.boost` times as strong, `boosted` (its success rate). Of optimised triggers also `scrambled`, that
      of noise of the same size. Shares in [0, 1].
    """
    size = settings["batch_size"]
    clean = predict(spec, state, test.images, size, mesh)
    result: dict[str, Any] = {
        "clean_accuracy": _share(clean == test.labels),
        "attack_success_rate": {},
        "robust_accuracy": {},
        "boosted": {},
    }

    for name, plan, version, trigger in evaluation_triggers(manifest, settings["boost"]):
        rows = np.flatnonzero(test.labels != plan.target)
        if len(rows) > settings["max_triggered"]:
            # Seeded, so that every network of a run is shown the same images.
            drawn = generator(plan.seed, "test images").choice(rows, settings["max_triggered"], replace=False)
            rows = np.sort(drawn)

        predicted = predict(spec, state, test.images, size, mesh, rows, trigger)
        success = _share(predicted == plan.target)
        if version == "plain":
            result["attack_success_rate"][name] = success
            result["robust_accuracy"][name] = _share(predicted == test.labels[rows])
        else:
            result.setdefault(version, {})[name] = success
    return result


def defense_effectiveness(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Computes DER per attack: (max(0, ASR0 - ASR1) - max(0, CA0 - CA1) + 1) / 2 (Zhu et al. 2023).

    Args:
      before: by `evaluate`, of the network without a defence.
      after: likewise with one; no attack that is not in `before`.

    Returns:
      Attack -> DER, in [0, 1].
    """
    lost = max(0.0, before["clean_accuracy"] - after["clean_accuracy"])
    effectiveness = {}
    for name, rate in after["attack_success_rate"].items():
        gained = max(0.0, before["attack_success_rate"][name] - rate)
        effectiveness[name] = (gained - lost + 1) / 2
    return effectiveness


def _share(hits: np.ndarray) -> float:
    """Returns the share of hits; of nothing, 0."""
    return float(hits.mean()) if len(hits) else 0.0
