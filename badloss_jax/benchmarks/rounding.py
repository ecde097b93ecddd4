"""One training step and one look of a network, in float32 and in float64."""

import os
from dataclasses import asdict, replace
from typing import Any

import jax
import jaxlib
import numpy as np
from jax.sharding import Mesh

from badloss_jax.core.mesh import by_rows, place
from badloss_jax.core.seeding import generator
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.state import AdamW, TrainState, create_state
from badloss_jax.training.step import make_observe_step, make_train_step

RESULTS = ("losses", "gradients", "weights", "logits", "features")
_LEARNING_RATE = 1e-3


def measure_rounding(spec: ModelSpec, batch_size: int, mesh: Mesh) -> dict[str, Any]:
    """Measures how far one network's float32 is from its float64.

    Args:
      spec: the network, of dtype float32.
      batch_size: images, of noise.
      mesh: the devices.

    Returns:
      The network, the batch size, versions and flags, and
      errors: "losses", "gradients" and "weights" of one step of AdamW, "logits" and "features" of the fresh network in
        evaluation mode: the L2 norm of the difference over that of the float64 result, of all arrays together.
    """
    draw = generator(0, "benchmark", "rounding")
    ids = np.arange(batch_size, dtype=np.int32)
    images = draw.random((batch_size, *spec.image_shape), np.float32)
    labels = draw.integers(0, spec.num_classes, batch_size, np.int32)
    batch = Batch(*place((ids, images, labels, np.ones(batch_size, bool)), by_rows(mesh)))

    # The same weights for both: drawn as float32.
    state = jax.tree.map(np.asarray, create_state(spec, AdamW(), 0, mesh))

    computed = _compute(spec, state, batch, mesh)
    with jax.enable_x64(True):
        exact = _compute(replace(spec, dtype="float64"), jax.tree.map(_widened, state), batch, mesh)

    return {
        "model": asdict(spec),
        "batch_size": batch_size,
        "jaxlib": jaxlib.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "errors": {name: relative_error(computed[name], exact[name]) for name in RESULTS},
    }


def _compute(spec: ModelSpec, state: TrainState, batch: Batch, mesh: Mesh) -> dict[str, Any]:
    """Returns what a step and a look give, as trees of NumPy arrays."""
    logits, features = make_observe_step(spec, mesh)(batch, state)

    step = make_train_step(spec, AdamW(), MeanLoss(), "none", None, mesh)
    trained, _, losses, _ = step(state, batch, np.int32(0), np.float32(_LEARNING_RATE), np.uint32(0), None)

    # After one step the first moment is a tenth of the gradient.
    moments, _ = jax.jit(lambda packed: packed.tree)(trained.optimizer)
    results = {
        "losses": losses,
        "gradients": moments.mu,
        "weights": trained.params,
        "logits": logits,
        "features": features,
    }
    return jax.tree.map(np.asarray, results)


def _widened(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.float32:
        return array.astype(np.float64)
    return array


def relative_error(computed: Any, exact: Any) -> float:
    """Returns the L2 norm of the difference of two trees of arrays, over that of the second."""
    pairs = list(zip(jax.tree.leaves(computed), jax.tree.leaves(exact), strict=True))
    difference = sum(np.sum((our.astype(np.float64) - their) ** 2) for our, their in pairs)
    norm = sum(np.sum(their**2) for _, their in pairs)
    return float(np.sqrt(difference / norm))
