"""Trees of arrays that travel as few: all that have one axis, or none, are one vector.

JAX goes over every array at each call of a jitted function, and a checkpoint has a file for each. Two thirds of a
network's are scales, biases and statistics, which together are a thousandth of its numbers.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


@dataclass(frozen=True)
class Place:
    """Where an array of a tree is.

    Attributes:
      name: of the array, such as "stem/kernel".
      shape: likewise.
      dtype: likewise.
      start: where in the vector of its dtype it begins, if it has no more than one axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Where all arrays of a tree are; one object for all trees alike, so that comparing them is quick.

    Attributes:
      structure: of the tree.
      places: of its arrays, in order.
    """

    structure: jax.tree_util.PyTreeDef
    places: tuple[Place, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """A tree of arrays, packed; itself a tree of few.

    Attributes:
      kernels: name -> an array of two axes or more.
      vectors: dtype -> [n], all the others of it, one behind the other.
      layout: what is where.
    """

    kernels: dict[str, Array]
    vectors: dict[str, Shaped[Array, "n"]]
    layout: Layout = field(metadata={"static": True})

    @property
    def tree(self) -> Any:
        """The tree; within jit, where slices cost nothing."""
        return jax.tree.unflatten(self.layout.structure, map(self._leaf, self.layout.places))

    def _leaf(self, place: "Place") -> Array:
        if len(place.shape) > 1:
            return self.kernels[place.name]
        vector = self.vectors[place.dtype]
        return vector[place.start : place.start + math.prod(place.shape)].reshape(place.shape)


def pack(tree: Any) -> Packed:
    """Packs a tree of arrays; within jit.

    Args:
      tree: with any arrays.

    Returns:
      The same numbers.
    """
    leaves, structure = jax.tree.flatten(tree)
    layout = _layout_of(structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))

    kernels: dict[str, Array] = {}
    vectors: dict[str, list[Array]] = {}
    for leaf, place in zip(leaves, layout.places, strict=True):
        if leaf.ndim > 1:
            kernels[place.name] = leaf
        else:
            vectors.setdefault(place.dtype, []).append(leaf.ravel())
    return Packed(kernels, {dtype: jnp.concatenate(parts) for dtype, parts in vectors.items()}, layout)


@cache
def _layout_of(structure: jax.tree_util.PyTreeDef, arrays: tuple[tuple[tuple[int, ...], str], ...]) -> Layout:
    """Returns the layout of a tree of arrays of these shapes and dtypes."""
    numbered = jax.tree.unflatten(structure, range(len(arrays)))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(numbered)]

    places = []
    lengths: dict[str, int] = {}  # of the vectors
    for path, (shape, dtype) in zip(paths, arrays, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        start = lengths.setdefault(dtype, 0)
        places.append(Place(name, shape, dtype, start))
        if len(shape) < 2:
            lengths[dtype] += math.prod(shape)
    return Layout(structure, tuple(places))
