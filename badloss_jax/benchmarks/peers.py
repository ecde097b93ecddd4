"""Other frameworks that train a workload's network beside ours: which there are, and what they can do.

None of them is needed for anything else, so that none is a dependency: each is imported where it is asked for.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Protocol

import numpy as np
from jaxtyping import Int

from badloss_jax.benchmarks.workload import Workload
from badloss_jax.core.errors import UsageError, listed, one_of
from badloss_jax.training.objective import MeanLoss
from badloss_jax.training.state import AdamW, TrainState

PEERS = ("torch",)
NETWORKS = ("resnet_small", "resnet18", "resnet34", "resnet50")


class Peer(Protocol):
    """One network in training by another framework.

    Attributes:
      name: of `PEERS`.
      version: of the framework.
      threads: that it computes with.
      loss: of the last step, the mean over its batch.
    """

    name: str
    version: str
    threads: int
    loss: float

    def train(self, batches: Iterable[Int[np.ndarray, "B"]]) -> None:
        """Trains on some batches, as ours does with recording off, and returns when the last one is done.

        Args:
          batches: int32 [B], the ids of each one's examples; ids of no example are padding.
        """


def check_peer(name: str) -> None:
    """Checks that a peer is known and installed.

    Args:
      name: as the user writes it.

    Raises:
      UsageError: it is not; how to install it is said.
    """
    one_of("--peer", name, PEERS)
    try:
        import_module(name)
    except ImportError as error:
        raise UsageError(
            f"--peer {name} is not installed: pip install {name}, or, where there is no GPU, pip install {name}"
            " --index-url https://download.pytorch.org/whl/cpu"
        ) from error


def check_workload(name: str, workload: Workload) -> None:
    """Checks that a peer can do the same work as ours.

    Args:
      name: of the peer.
      workload: what is to be trained.

    Raises:
      UsageError: it cannot; the setting that is in the way is named.
    """
    spec = workload.spec
    recipe = workload.recipe
    if spec.name not in NETWORKS:
        raise UsageError(
            f"model.name = {spec.name!r} with --peer {name}: expected one of {listed(NETWORKS)}; measure other networks"
            " without --peer"
        )
    if spec.dtype != "float32":
        raise UsageError(
            f"model.dtype = {spec.dtype!r} with --peer {name}: expected float32, in which both compute the same"
        )
    if spec.ghost_batch:
        raise UsageError(
            f"model.ghost_batch = {spec.ghost_batch} with --peer {name}: expected 0, the whole batch, by which the peer"
            " normalises"
        )

    devices = workload.mesh.devices.flat
    if len(devices) > 1 or devices[0].platform != "cpu":
        raise UsageError(
            f"--peer {name} with {len(devices)} devices of platform {devices[0].platform}: expected one CPU, which both"
            " train on; set JAX_PLATFORMS=cpu and JAX_NUM_CPU_DEVICES=1 in the environment"
        )

    if not isinstance(recipe.optimizer, AdamW):
        raise UsageError(f"{recipe.optimizer} with --peer {name}: expected AdamW, the optimiser that the peer has")
    # Its subclasses minimise something else.
    if type(recipe.objective) is not MeanLoss:
        raise UsageError(f"{recipe.objective} with --peer {name}: expected MeanLoss, which is all that it minimises")
    if recipe.augment != "none":
        raise UsageError(
            f"augment = {recipe.augment!r} with --peer {name}: expected 'none', as the peer does not augment images"
        )


def make_peer(name: str, workload: Workload, state: TrainState) -> Peer:
    """Makes ready to train by a peer.

    Args:
      name: of `PEERS`, an installed one.
      workload: what is trained.
      state: the weights to begin with; they are copied.

    Returns:
      The training, before its first step.

    Raises:
      UsageError: the peer cannot do the same work.
    """
    check_workload(name, workload)

    # Only here, as it needs the framework.
    from badloss_jax.benchmarks.torch_peer import TorchTraining

    return TorchTraining(workload, state)
