"""A workload in PyTorch: the same network, batches, loss and optimiser, for its speed beside ours.

As fast as PyTorch is on CPUs by itself: channels last, AdamW fused, ReLU in place, a thread for each core that the
process may use, which is what XLA takes, too. `torch.compile` is left out: it needs a C++ compiler on the machine.
"""

import os
from collections.abc import Iterable
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from flax import nnx
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Int
from torch.nn import functional

from badloss_jax.benchmarks.workload import Workload
from badloss_jax.models import ModelSpec
from badloss_jax.models.layers import ConvNorm, Head
from badloss_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from badloss_jax.training.state import AdamW, TrainState

# Of parameters and statistics; the modules that hold them are called as ours.
_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


class _ConvNorm(torch.nn.Module):
    """A convolution without bias, and batch norm.

    PyTorch keeps a running variance that is larger than ours, by n / (n - 1) of a batch's n pixels. Training does not
    use it.
    """

    def __init__(self, ours: ConvNorm):
        super().__init__()
        # Flax says of these attributes that they could be more than they are.
        conv: Any = ours.conv
        self.conv = torch.nn.Conv2d(
            conv.in_features,
            conv.out_features,
            conv.kernel_size,
            conv.strides,
            # Ours pads as much after the pixels as before them.
            padding=tuple(before for before, _ in conv.padding),
            bias=False,
        )
        norm = ours.norm
        self.norm = torch.nn.BatchNorm2d(norm.num_features, norm.epsilon, 1 - norm.momentum)

    def forward(self, x: Any) -> Any:
        return self.norm(self.conv(x))


class _Block(torch.nn.Module):
    """A residual block, basic or bottleneck."""

    def __init__(self, ours: BasicBlock | Bottleneck):
        super().__init__()
        self.layers = torch.nn.ModuleList(_ConvNorm(layer) for layer in ours.layers)
        self.shortcut = None
        if ours.shortcut is not None:
            self.shortcut = _ConvNorm(ours.shortcut)

    def forward(self, x: Any) -> Any:
        *inner, last = self.layers

        y = x
        for layer in inner:
            y = functional.relu(layer(y), inplace=True)
        y = last(y)

        if self.shortcut is not None:
            x = self.shortcut(x)
        return functional.relu(y.add_(x), inplace=True)


class _Head(torch.nn.Module):
    """The mean over pixels, and a linear layer."""

    def __init__(self, ours: Head):
        super().__init__()
        self.linear = torch.nn.Linear(ours.linear.in_features, ours.linear.out_features)

    def forward(self, x: Any) -> Any:
        return self.linear(x.mean((2, 3)))


class TorchResNet(torch.nn.Module):
    """The residual network of a spec, with its modules under the names of ours; maps [B, C, H, W] to logits [B, K].

    Args:
      spec: the network, one that `badloss_jax.models.resnet` makes.
    """

    def __init__(self, spec: ModelSpec):
        super().__init__()
        # Sizes, strides and padding are read from ours, of which only the shapes are made.
        ours: ResNet = nnx.eval_shape(lambda: spec.build(nnx.Rngs(0)))
        self.stem = _ConvNorm(ours.stem)
        self.max_pool = ours.max_pool
        self.blocks = torch.nn.ModuleList(_Block(block) for block in ours.blocks)
        self.head = _Head(ours.head)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Any) -> Any:
        """Returns the logits, float32 [B, K], of images in [0, 1], float32 [B, C, H, W]."""
        x = functional.relu(self.stem(images), inplace=True)
        if self.max_pool:
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def copy(self, state: TrainState) -> None:
        """Takes over the weights and running statistics of ours.

        Args:
          state: of the same network.
        """
        copied = {}
        for path, leaf in chain(*map(tree_leaves_with_path, (state.params.tree, state.batch_stats.tree))):
            *modules, name = (str(entry.key) for entry in path)
            values = np.asarray(leaf)
            if name == "kernel":
                # Ours ends with inputs and outputs, PyTorch's begins with outputs and inputs.
                values = np.moveaxis(values, (-1, -2), (0, 1))
            copied[".".join([*modules, _NAMES[name]])] = torch.tensor(values)

        # PyTorch counts batches, too, and refuses what misses a name or has one more.
        counters = {name: count for name, count in self.state_dict().items() if name.endswith("num_batches_tracked")}
        self.load_state_dict(copied | counters)


class TorchTraining:
    """One network in training; a `Peer`.

    Args:
      workload: what is trained, on images that are not poisoned.
      state: the weights to begin with.
    """

    name = "torch"

    def __init__(self, workload: Workload, state: TrainState):
        self.version = str(torch.__version__)
        self.threads = len(os.sched_getaffinity(0))
        self.loss = 0.0
        torch.set_num_threads(self.threads)

        self.network = TorchResNet(workload.spec)
        self.network.copy(state)
        self.network.train()

        # `check_workload` lets no other optimiser pass.
        recipe = workload.recipe
        adamw = cast(AdamW, recipe.optimizer)
        self._clamp = recipe.objective.clamp
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=recipe.learning_rate_at(0),
            betas=(adamw.b1, adamw.b2),
            eps=1e-8,
            weight_decay=adamw.weight_decay,
            fused=True,
        )

        self._images = torch.tensor(np.asarray(workload.data.images))
        self._labels = torch.tensor(np.asarray(workload.data.labels), dtype=torch.int64)

    def train(self, batches: Iterable[Int[np.ndarray, "B"]]) -> None:
        """Trains on some batches; see `Peer`.

        Padding shows the last example, as in ours, and counts: the step takes as long as ours, which leaves it out.

        Args:
          batches: int32 [B], the ids of each one's examples.
        """
        for ids in batches:
            losses = self.losses(torch.from_numpy(ids).clip(max=len(self._labels) - 1))
            loss = losses.clamp(max=self._clamp).mean()

            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()

            # On CPUs the step is done by now: there is no next one that could run meanwhile.
            self.loss = float(loss.detach())

    def losses(self, ids: Any) -> Any:
        """Returns the cross-entropy of examples, float32 [B], of whose ids, int [B], all are known."""
        # Bytes are copied, and then seen as [B, C, H, W], with the channels last in memory.
        images = self._images.index_select(0, ids).permute(0, 3, 1, 2)
        logits = self.network(images.to(torch.float32).div_(255))
        return functional.cross_entropy(logits, self._labels.index_select(0, ids), reduction="none")
