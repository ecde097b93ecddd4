"""Causality-inspired backdoor defence (Zhang et al., CVPR 2023): a network deconfounded from a backdoored one.

A first network, trained for a few epochs, learns the triggers before all else. A second is trained by the whole recipe
on everything, with two changes (section 4 of the paper): its features are to tell nothing about the first one's, and
examples that the first one finds easy weigh little.

- The mutual information of the features is estimated as in a Wasserstein GAN by a critic of Lipschitz constant about
  1, on pairs of one example against pairs of two: the critic maximises the estimate, the network minimises it. The
  authors' program gives the critic an epoch of its own before each of the network's; here both take every step.
- The critic's weights are normalised by their largest singular value where they are used (Miyato et al., ICLR 2018,
  algorithm 1), not after every step; and it has no dropout.
- The program trains the networks by SGD and the critic by Adam at a rate of 0.2; here the recipe's optimiser does.

It stands and falls with the first network, which has to learn the triggers well before the images. On digits with one
patch it does not (after 3 to 5 epochs its losses are .10 to .35 on the poison and .40 to .92 on clean images), and the
second learns the patch as well (three seeds: attack success .99 to 1.00 at a penalty of 0.1, .33 to .57 at 1, which
costs 15 to 23 points of accuracy).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from badloss_jax.defenses.context import Cleansed, Context
from badloss_jax.models import ModelSpec
from badloss_jax.training.objective import Forward, MeanLoss
from badloss_jax.training.state import TrainState, forward_of

Critic = dict[str, Float[Array, "..."]]

_POWER_ITERATIONS = 5  # as in the authors' program
_TINY = 1e-8


def cbd(context: Context, settings: Mapping[str, Any]) -> Cleansed:
    """Trains a backdoored network, and one that is independent of it.

    Args:
      context: what every defence is given.
      settings: `config.defenses.cbd`.

    Returns:
      The second network.
    """
    recipe = context.recipe

    # At the rate that the recipe begins with, as in the paper's program: annealed, it learns the triggers less well.
    epochs = settings["backdoor_epochs"]
    early = replace(recipe, epochs=epochs, schedule_epochs=max(epochs, recipe.schedule_epochs))
    backdoored = context.train("backdoored", early)

    objective = Deconfounded(clamp=recipe.objective.clamp, spec=context.spec, penalty=settings["penalty"])
    state = context.train("clean", replace(recipe, objective=objective), given=backdoored)
    return Cleansed(state)


@dataclass(frozen=True, kw_only=True)
class Deconfounded(MeanLoss):
    """The reweighted loss, and a penalty on what the features tell about those of a backdoored network.

    `given` is the `TrainState` of the backdoored network; `beside` is the critic. The value is the reweighted loss
    alone: the penalty is subtracted again as what the critic maximises, so that one gradient serves both players.

    Attributes:
      spec: of both networks.
      penalty: weight of the estimated mutual information.
    """

    spec: ModelSpec
    penalty: float = 0.01

    def init(self, key: Key[Array, ""], spec: ModelSpec) -> Critic:
        """Returns the critic: one hidden layer of F units over the 2 F features, and a linear unit without a bias.

        Args:
          key: of the weights.
          spec: the network, which says F.

        Returns:
          "hidden" [2 F, F], "bias" [F], "output" [F, 1], in float32 or wider.
        """
        features = spec.num_features
        dtype = spec.param_dtype
        for_hidden, for_output = jax.random.split(key)

        # Small, for only the direction of its weights counts, and the smaller they are, the faster they turn.
        draw = jax.nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        return {
            "hidden": draw(for_hidden, (2 * features, features), dtype),
            "bias": jnp.zeros(features, dtype),
            "output": draw(for_output, (features, 1), dtype),
        }

    def __call__(self, forward: Forward, beside: Critic, given: TrainState) -> Float[Array, ""]:
        """Returns the scalar to minimise, for the network and, by its opposite sign, for the critic.

        Args:
          forward: the batch and the network's outputs.
          beside: the critic.
          given: the backdoored network.
        """
        logits, confounders = jax.lax.stop_gradient(forward_of(self.spec, given)(forward.images))
        confounding = optax.softmax_cross_entropy_with_integer_labels(logits, forward.labels)

        losses = jnp.minimum(forward.losses, self.clamp)
        weights = hardness(jnp.minimum(confounding, self.clamp), losses, forward.real)

        # The same number twice: the gradient of the first reaches only the network, that of the second only the critic.
        for_network = dependence(jax.lax.stop_gradient(beside), confounders, forward.features, forward.real)
        for_critic = dependence(beside, confounders, jax.lax.stop_gradient(forward.features), forward.real)
        return forward.mean(weights * losses) + self.penalty * (for_network - for_critic)


def hardness(confounding: Float[Array, "B"], losses: Float[Array, "B"], real: Bool[Array, "B"]) -> Float[Array, "B"]:
    """Weighs examples by how hard they are for the backdoored network: l_b / (l_b + l_c), scaled to a mean of 1.

    Args:
      confounding: l_b, losses of the backdoored network in nats, at least 0.
      losses: l_c, those of the network in training; no gradient flows through them.
      real: False for padding, whose weight is 0 and which does not count in the mean.

    Returns:
      The weights, at least 0.
    """
    raw = jnp.where(real, confounding / (confounding + losses + _TINY), 0)
    return jax.lax.stop_gradient(raw * real.sum() / (raw.sum() + _TINY))


def dependence(
    critic: Critic, confounders: Float[Array, "B F"], features: Float[Array, "B F"], real: Bool[Array, "B"]
) -> Float[Array, ""]:
    """Estimates how much two networks' features tell about each other: E[T] over pairs less E[T] over shuffled ones.

    Shuffled, each example is paired with the next real one of the batch, the last with the first: the batch is in
    random order already. Padding is in neither mean and in no pair.

    Args:
      critic: T.
      confounders: features of the backdoored network.
      features: those of the network in training.
      real: False for padding; one row at least is True.
    """
    # Centring is a choice of the critic's bias: features are positive, and where no hidden unit changes its side within
    # the batch, the critic is linear and both means are the same.
    confounders = _centred(confounders, real)
    features = _centred(features, real)

    together = score(critic, confounders, features)
    apart = score(critic, confounders, features[next_real(real)])
    return jnp.sum(jnp.where(real, together - apart, 0)) / real.sum()


def next_real(real: Bool[Array, "B"]) -> Array:
    """Returns, for each real row, the index of the real row after it, cyclically; int [B]."""
    in_order = jnp.argsort(~real, stable=True)
    return in_order[jnp.cumsum(real) % real.sum()]


def score(critic: Critic, confounders: Float[Array, "B F"], features: Float[Array, "B F"]) -> Float[Array, "B"]:
    """Applies the critic T, of a Lipschitz constant of about 1.

    Args:
      critic: T.
      confounders: of each pair, what is of the backdoored network.
      features: and what is of the network in training.
    """
    pairs = jnp.concatenate([confounders, features], -1)
    hidden = jax.nn.leaky_relu(pairs @ normalised(critic["hidden"]) + critic["bias"])
    return (hidden @ normalised(critic["output"]))[:, 0]


def normalised(weights: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """Divides a matrix by its largest singular value, found by power iteration."""
    fixed = jax.lax.stop_gradient(weights)

    def iterate(_: int, vectors: tuple[Array, Array]) -> tuple[Array, Array]:
        _left, right = vectors
        left = _unit(fixed @ right)
        return left, _unit(fixed.T @ left)

    # A loop, for unrolled it takes long to compile.
    start = (jnp.zeros(weights.shape[0], weights.dtype), jnp.ones(weights.shape[1], weights.dtype))
    left, right = jax.lax.fori_loop(0, _POWER_ITERATIONS, iterate, start)

    return weights / (left @ weights @ right + _TINY)


def _centred(features: Float[Array, "B F"], real: Bool[Array, "B"]) -> Float[Array, "B F"]:
    """Subtracts the mean over the real rows, through which no gradient flows."""
    mean = jnp.sum(jnp.where(real[:, None], features, 0), 0) / real.sum()
    return features - jax.lax.stop_gradient(mean)


def _unit(vector: Float[Array, "D"]) -> Float[Array, "D"]:
    return vector / (jnp.linalg.norm(vector) + _TINY)
