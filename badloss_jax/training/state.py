"""What training changes: parameters, batch statistics, optimiser state, step."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from badloss_jax.models import ModelSpec
from badloss_jax.training.mesh import replicated


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The whole state of one training."""

    step: Int[Array, ""]
    params: nnx.State
    batch_stats: nnx.State
    optimizer: Any


@dataclass(frozen=True)
class AdamW:
    """AdamW with the learning rate left to the caller, who multiplies: one compiled step serves every schedule."""

    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999

    def transform(self) -> optax.GradientTransformation:
        """Returns the optax transformation, up to the factor -learning_rate."""
        return optax.chain(optax.scale_by_adam(self.b1, self.b2), optax.add_decayed_weights(self.weight_decay))


def create_state(spec: ModelSpec, optimizer: AdamW, seed: int, mesh: Mesh) -> TrainState:
    """Returns a fresh state, created where it will live: replicated over the mesh."""
    return _make_init(spec, optimizer, mesh)(jax.random.key(seed))


@lru_cache(maxsize=32)
def _make_init(spec: ModelSpec, optimizer: AdamW, mesh: Mesh) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        model = spec.build(nnx.Rngs(key))
        params, batch_stats = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.transform().init(params))

    return jax.jit(init, out_shardings=replicated(mesh))


def graph_of(spec: ModelSpec) -> nnx.GraphDef:
    """Returns the static part of the network, to be merged with parameters and statistics."""
    return nnx.graphdef(nnx.eval_shape(lambda: spec.build(nnx.Rngs(0))))
