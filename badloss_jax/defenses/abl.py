"""Anti-Backdoor Learning (Li et al., NeurIPS 2021), its isolation (section 3.2) alone: what is learned first goes.

A network is trained for a few epochs with its mean loss held at a level by flooding, which keeps all but the easiest
examples, the poisoned ones, from being learned; those of the lowest loss are removed. The paper goes on by unlearning
1 % of the examples; here, as in the program of BaDLoss's authors, 15 % are removed and the network is retrained. The
losses are those of evaluation mode, without the augmentation that the program leaves on.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from badloss_jax.core.mesh import by_rows, jit_on
from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.objective import Flooding
from badloss_jax.training.state import TrainState
from badloss_jax.training.step import network_of


def abl(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Trains with flooding and finds low losses suspicious; removes the share `fraction` of the lowest.

    Args:
      context: what every defence is given.
      settings: `config.defenses.abl`.

    Returns:
      Scores [N], minus the losses in nats, and what is removed by them.
    """
    flooding = Flooding(clamp=context.recipe.objective.clamp, level=settings["flooding"])
    epochs = settings["epochs"]
    recipe = replace(context.recipe, epochs=epochs, schedule_epochs=epochs, objective=flooding)
    state = context.train("flooded", recipe)

    loss_step = make_loss_step(context.spec, context.mesh)
    losses = context.map(loss_step, state, title="losses of the flooded network")

    scores = -losses.astype(np.float64)
    return Suspicion(scores, removed=lowest(losses, settings["fraction"]))


def lowest(losses: Float[np.ndarray, "N"], fraction: float) -> Bool[np.ndarray, "N"]:
    """Marks the lowest losses; ties go by id.

    Args:
      losses: [N], in nats.
      fraction: the share that is marked, above 0 and below 1, rounded down.
    """
    ascending = np.argsort(losses, kind="stable")
    count = int(fraction * len(losses))

    marked = np.zeros(len(losses), bool)
    marked[ascending[:count]] = True
    return marked


@lru_cache(maxsize=32)
def make_loss_step(spec: ModelSpec, mesh: Mesh) -> Callable[[Batch, TrainState], Float[Array, "B"]]:
    """Compiles (batch, state) -> cross-entropies in evaluation mode, in nats, float32 or wider [B].

    Args:
      spec: the network.
      mesh: the devices that share a batch.
    """

    def step(batch: Batch, state: TrainState) -> Float[Array, "B"]:
        logits = network_of(spec, state)(batch.images.astype(spec.param_dtype))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)

    return jit_on(step, mesh, out_shardings=by_rows(mesh))
