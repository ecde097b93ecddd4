"""What training changes: parameters, batch statistics, optimiser state, step.

Networks travel packed. JAX goes over all arrays at each call of a jitted function: of a ResNet-50 with AdamW 168 in
place of 591. Unpacked they are nested dicts of arrays, named as their modules are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from badloss_jax.core.mesh import jit_on, replicated
from badloss_jax.models import ModelSpec
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.packed import Packed, pack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The whole state of one training.

    Attributes:
      step: int32, the updates that were made.
      params: the network's parameters; their tree is module -> ... -> array.
      batch_stats: the running statistics of its batch norms, likewise.
      optimizer: state of the optimiser, for params and beside; its tree is optax's.
      beside: the objective's own parameters, mostly none.
    """

    step: Int[Array, ""]
    params: Packed
    batch_stats: Packed
    optimizer: Packed
    beside: Any = field(default_factory=dict)


@dataclass(frozen=True)
class AdamW:
    """AdamW with the learning rate left to the caller, who multiplies: one compiled step serves every schedule.

    Attributes:
      weight_decay: decoupled (Loshchilov and Hutter, ICLR 2019).
      b1, b2: decay of the first and the second moment.
    """

    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.999

    def transform(self) -> optax.GradientTransformation:
        """Returns the optax transformation, up to the factor -learning_rate."""
        return optax.chain(optax.scale_by_adam(self.b1, self.b2), optax.add_decayed_weights(self.weight_decay))


@dataclass(frozen=True)
class Adadelta:
    """Adadelta (Zeiler 2012), its learning rate left to the caller, too.

    Attributes:
      rho: decay of the squared gradients and updates.
      weight_decay: added to the gradient.
    """

    rho: float = 0.9
    weight_decay: float = 0.0

    def transform(self) -> optax.GradientTransformation:
        """Returns the optax transformation, up to the factor -learning_rate."""
        return optax.chain(optax.add_decayed_weights(self.weight_decay), optax.scale_by_adadelta(self.rho))


Optimizer = AdamW | Adadelta


def create_state(
    spec: ModelSpec, optimizer: Optimizer, seed: int, mesh: Mesh, objective: MeanLoss | None = None
) -> TrainState:
    """Returns a fresh state, created where it will live: replicated over the mesh.

    Args:
      spec: the network.
      optimizer: whose state it has.
      seed: of the weights.
      mesh: the devices.
      objective: whose own parameters it has; by default none.

    Returns:
      The state before the first step.
    """
    init = _make_init(spec, optimizer, mesh, objective or MeanLoss())
    return init(jax.random.key(seed))


def shapes_of_state(spec: ModelSpec, optimizer: Optimizer, mesh: Mesh, objective: MeanLoss) -> TrainState:
    """Returns the shapes, dtypes and shardings of a fresh state; arguments as of `create_state`."""
    # Traced as it will be called, so that JAX finds the trace again.
    traced = _make_init(spec, optimizer, mesh, objective).trace(jax.random.key(0))  # type: ignore[attr-defined]
    sharding = replicated(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), traced.out_info)


@lru_cache(maxsize=32)
def _make_init(
    spec: ModelSpec, optimizer: Optimizer, mesh: Mesh, objective: MeanLoss
) -> Callable[[jax.Array], TrainState]:
    def init(key: jax.Array) -> TrainState:
        model = spec.build(nnx.Rngs(key))
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))

        # A key of its own: the weights are the same whatever the objective draws.
        beside = objective.init(jax.random.fold_in(key, 1), spec)
        optimizer_state = optimizer.transform().init((params, beside))
        return TrainState(jnp.zeros((), jnp.int32), pack(params), statistics_of(model), pack(optimizer_state), beside)

    return jit_on(init, mesh, out_shardings=replicated(mesh))


def merged(spec: ModelSpec, params: dict[str, Any], batch_stats: dict[str, Any]) -> Any:
    """Returns the network with some parameters and statistics; training it changes none that it was given.

    Args:
      spec: the network.
      params: module -> ... -> array.
      batch_stats: likewise.

    Returns:
      The module.
    """
    return nnx.merge(_graph_of(spec), params, batch_stats)


def statistics_of(model: nnx.Module) -> Packed:
    """Returns the running statistics of a network's batch norms."""
    return pack(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


@lru_cache(maxsize=32)
def _graph_of(spec: ModelSpec) -> nnx.GraphDef:
    """Returns the static part of the network, to be merged with parameters and statistics.

    Building a ResNet-50 takes seconds, even of shapes alone, and each step asks for it.
    """
    return nnx.graphdef(nnx.eval_shape(lambda: spec.build(nnx.Rngs(0))))


def forward_of(
    spec: ModelSpec, state: TrainState
) -> Callable[[Float[Array, "B H W C"]], tuple[Float[Array, "B K"], Float[Array, "B F"]]]:
    """Returns the trained network in evaluation mode: the one forward pass of all that looks and does not train.

    Args:
      spec: the network.
      state: its parameters and statistics.

    Returns:
      A differentiable function from images in [0, 1] to logits and penultimate features.
    """
    model = merged(spec, state.params.tree, state.batch_stats.tree)
    return lambda images: model(images, train=False)
