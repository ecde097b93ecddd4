"""Clean accuracy, attack success rate and robust accuracy of a trained network (BaDLoss, section 5.1)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.attacks.poisoning import evaluation_triggers
from badloss_jax.attacks.trigger import Trigger
from badloss_jax.core.mesh import place_rows, round_up, to_host
from badloss_jax.core.seeding import generator
from badloss_jax.data import Split
from badloss_jax.models import ModelSpec
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import make_predict_step


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
      batch_size: images at a time, rounded up to a multiple of the devices.
      mesh: the devices.
      rows: int [M], which images, by default all.
      trigger: to put on them, or None.

    Returns:
      int32 [M].
    """
    step = make_predict_step(spec, mesh)
    size = round_up(batch_size, mesh)
    if rows is None:
        rows = np.arange(len(images))

    def part(start: int, begin: int, end: int) -> np.ndarray:
        # What one device needs of the batch, with black images past the end.
        batch_rows = rows[start + begin : start + end]
        batch = images[batch_rows].astype(np.float32) / 255
        if trigger and len(batch_rows):
            batch = trigger(batch)
        padding = np.zeros((end - begin - len(batch_rows), *images.shape[1:]), np.float32)
        return np.concatenate([batch, padding])

    predicted = []
    for start in range(0, len(rows), size):
        batch = place_rows((size, *images.shape[1:]), mesh, partial(part, start))
        predicted.append(step(state, batch))
        if len(predicted) > 2:  # so that few batches lie on the devices at a time
            predicted[-3].block_until_ready()

    # Without images there is nothing else to join.
    return np.concatenate([np.zeros(0, np.int32), *map(to_host, predicted)])[: len(rows)]


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
