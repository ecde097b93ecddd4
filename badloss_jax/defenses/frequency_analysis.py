"""Frequency analysis (Zeng et al., ICCV 2021, section 4): triggers leave marks in an image's spectrum.

A small network learns to tell the 2-D DCTs of the probes from those of the probes with a random block on each; training
images that it calls altered go. No other network, and no label, is looked at.

The paper trains on all of a clean data set, this, as the authors' program of BaDLoss, on the probes. Of the paper's
alterations (white and noise blocks, noise everywhere, shadows, blends) that program takes the two blocks, and so does
this: from 100 probes of digits the network does not learn the other three, and takes clean images for altered. Sizes
are those for 32 px images and grow with the image. The paper's dropout is missing, see `models.frequency_cnn`.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from badloss_jax.core.mesh import by_rows, jit_on, round_up
from badloss_jax.core.seeding import generator
from badloss_jax.defenses.context import Context, Suspicion
from badloss_jax.models import ModelSpec
from badloss_jax.training.batch import Batch
from badloss_jax.training.loop import Recipe
from badloss_jax.training.resident import ResidentData
from badloss_jax.training.state import Adadelta, TrainState
from badloss_jax.training.step import network_of

_NAME = "frequency_analysis"
_STAGES = (32, 64, 128)
_CONSTANT = 10**9  # epochs of a schedule whose beginning is flat
_PAPER_SIDE = 32  # px


def dct_matrix(size: int) -> Float[np.ndarray, "S S"]:
    """Returns the orthonormal DCT-II, a frequency a row, in float64."""
    frequency, position = np.mgrid[:size, :size]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * frequency * (position + 0.5) / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def dct2(images: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Returns the orthonormal 2-D DCT-II of each channel."""
    height, width = images.shape[1:3]
    rows = jnp.asarray(dct_matrix(height), images.dtype)
    columns = jnp.asarray(dct_matrix(width), images.dtype)
    return jnp.einsum("uh,bhwc,vw->buvc", rows, images, columns, precision=jax.lax.Precision.HIGHEST)


def add_blocks(images: Float[np.ndarray, "P H W C"], draw: np.random.Generator) -> Float[np.ndarray, "P H W C"]:
    """Puts a block on each image, white or of noise, 2 to 7 px a side and 0 to 5 px from a corner at 32 px.

    Args:
      images: in [0, 1].
      draw: which block and where.

    Returns:
      float32, in [0, 1].
    """
    altered = images.astype(np.float32)
    scale = min(images.shape[1:3]) / _PAPER_SIDE

    for image in altered:
        sides = draw.integers(2, 8, 2)
        height = max(1, round(scale * sides[0]))
        width = max(1, round(scale * sides[1]))
        margin = int(scale * draw.integers(6))

        # Turned so that the chosen corner is the first one; the block is a view of the image.
        down, right = draw.choice((-1, 1), 2)
        block = image[::down, ::right][margin : margin + height, margin : margin + width]

        noise = draw.integers(2)
        if noise:
            block[:] = draw.random(block.shape)
        else:
            block[:] = 1
    return altered


@lru_cache(maxsize=8)
def _make_judge(spec: ModelSpec, mesh: Mesh) -> Callable[[Batch, TrainState], Array]:
    """Compiles (batch, detector) -> by how much the logit of "altered" exceeds that of "clean"."""

    def judge(batch: Batch, detector: TrainState) -> Float[Array, "B"]:
        logits = network_of(spec, detector)(dct2(batch.images))
        return logits[:, 1] - logits[:, 0]

    return jit_on(judge, mesh, out_shardings=by_rows(mesh))


def detector_data(probes: Float[np.ndarray, "P H W C"], draw: np.random.Generator, mesh: Mesh) -> ResidentData:
    """Returns the spectra of the probes, label 0, and of the probes with blocks, label 1, as a training set.

    Args:
      probes: in [0, 1].
      draw: which blocks and where.
      mesh: the devices that it is put on.
    """
    transform = jax.jit(dct2)
    clean = np.asarray(transform(probes))
    altered = np.asarray(transform(add_blocks(probes, draw)))

    # Spectra are no uint8 images, so each stands in for a black one.
    spectra = np.concatenate([clean, altered])
    black = np.zeros(spectra.shape, np.uint8)
    labels = np.repeat(np.arange(2, dtype=np.int32), len(probes))
    return ResidentData.place(mesh, black, labels, np.arange(len(spectra)), spectra)


def frequency_analysis(context: Context, settings: Mapping[str, Any]) -> Suspicion:
    """Trains the detector on the probes, and removes what it calls altered.

    Args:
      context: what every defence is given.
      settings: `config.defenses.frequency_analysis`.

    Returns:
      Scores: the probability of "altered", 0 to 1.
    """
    from scipy.special import expit

    probes = context.images(context.probe_ids)
    data = detector_data(probes, generator(context.seed, _NAME), context.mesh)

    spec = ModelSpec("frequency_cnn", probes.shape[1:], 2, _STAGES)
    recipe = Recipe(
        epochs=settings["epochs"],
        schedule_epochs=_CONSTANT,
        batch_size=round_up(settings["batch_size"], context.mesh),
        learning_rate=settings["learning_rate"],
        optimizer=Adadelta(weight_decay=settings["weight_decay"]),
    )
    detector = context.train("detector", recipe, data=data, spec=spec)

    margins = context.map(_make_judge(spec, context.mesh), detector, title=_NAME)
    scores = expit(margins.astype(np.float64))  # float32 would call many of them exactly 1
    return Suspicion(scores, removed=scores >= settings["threshold"])
