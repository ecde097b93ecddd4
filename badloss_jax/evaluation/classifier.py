"""Clean accuracy, attack success rate and robust accuracy of a trained network (BaDLoss, section 5.1)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from badloss_jax.attacks.manifest import Manifest
from badloss_jax.attacks.poisoning import evaluation_triggers
from badloss_jax.data import Split
from badloss_jax.models import ModelSpec
from badloss_jax.seeding import generator
from badloss_jax.training.mesh import round_up
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import make_predict_step


def predict(
    spec: ModelSpec, state: TrainState, images: Float[np.ndarray, "N H W C"], batch_size: int, mesh: Mesh
) -> Int[np.ndarray, "N"]:
    """Predicts the classes of images in [0, 1]."""
    step = make_predict_step(spec, mesh)
    size = round_up(batch_size, mesh)
    predicted = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padded = np.zeros((size, *images.shape[1:]), np.float32)
        padded[: len(batch)] = batch
        predicted.append(step(state, padded)[: len(batch)])
    return np.concatenate([np.asarray(part) for part in predicted])


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
    clean = predict(spec, state, _as_float(test.images), size, mesh)
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
        predicted = predict(spec, state, trigger(_as_float(test.images[rows])), size, mesh)
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


def _as_float(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else 0.0
