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
    """Predicts the classes of images, by default all of them, with a trigger on them if one is given."""
    step = make_predict_step(spec, mesh)
    size = round_up(batch_size, mesh)
    rows = np.arange(len(images)) if rows is None else rows

    def part(start: int, begin: int, end: int) -> np.ndarray:
        """Makes what one device needs of the batch, with black images past the end."""
        taken = rows[start + begin : start + end]
        shown = images[taken].astype(np.float32) / 255
        padding = np.zeros((end - begin - len(taken), *images.shape[1:]), np.float32)
        return np.concatenate([trigger(shown) if trigger and len(taken) else shown, padding])

    predicted = []
    for start in range(0, len(rows), size):
        batch = place_rows((size, *images.shape[1:]), mesh, partial(part, start))
        predicted.append(step(state, batch))
        if len(predicted) > 2:  # so that few batches lie on the devices at a time
            predicted[-3].block_until_ready()
    return np.concatenate([np.zeros(0, np.int32), *map(to_host, predicted)])[: len(rows)]


def evaluate(
    spec: ModelSpec, state: TrainState, test: Split, manifest: Manifest, settings: Mapping[str, Any], mesh: Mesh
) -> dict[str, Any]:
    """Measures a network on the clean and on the triggered test set.

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
            rows = np.sort(generator(plan.seed, "test images").choice(rows, settings["max_triggered"], replace=False))
        predicted = predict(spec, state, test.images, size, mesh, rows, trigger)
        success = _share(predicted == plan.target)
        if version != "plain":
            result.setdefault(version, {})[name] = success
        else:
            result["attack_success_rate"][name] = success
            result["robust_accuracy"][name] = _share(predicted == test.labels[rows])
    return result


def defense_effectiveness(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """Returns DER per attack, in [0, 1]: (max(0, ASR0 - ASR1) - max(0, CA0 - CA1) + 1) / 2 (Zhu et al. 2023)."""
    lost = max(0.0, before["clean_accuracy"] - after["clean_accuracy"])
    rates = after["attack_success_rate"]
    return {name: (max(0.0, before["attack_success_rate"][name] - rates[name]) - lost + 1) / 2 for name in rates}


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else 0.0
