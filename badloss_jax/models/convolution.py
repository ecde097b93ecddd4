"""Convolutions as each device computes them fastest: where XLA is slow at one on CPUs, it is written as something else.

Values and gradients are the same to rounding (configs/results/README.md has what each gains):

- A kernel of one pixel, and one whose output has few pixels, is a product of matrices. XLA knows only plain loops for
  the latter, which are a hundred times slower.
- A depthwise one is a sum of shifted images, each times one pixel of the kernel: up to fifty times faster.
- The gradient of any kernel is added up over a few images at a time, whose shifted copies stay in the cache: up to nine
  times faster.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

_FEW_PIXELS = 8  # of an output, up to which XLA takes plain loops on CPUs
_CACHED = 2**20  # bytes of shifted images at a time, the fastest of 2^18 to 2^24 on two machines' second-level cache


@dataclass(frozen=True)
class _Shape:
    """What tells one convolution from another, beside its arguments' shapes.

    Attributes:
      strides: of rows and columns.
      padding: zeros before and after each of them.
      groups: of channels.
    """

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]
    groups: int

    def output_size(self, images: Array, kernel: Array) -> tuple[int, int]:
        """Returns the rows and columns of the output."""
        rows, columns = (
            (images.shape[1 + axis] + sum(self.padding[axis]) - kernel.shape[axis]) // self.strides[axis] + 1
            for axis in range(2)
        )
        return rows, columns

    def is_product(self, images: Array, kernel: Array) -> bool:
        """Whether a CPU had better multiply matrices."""
        rows, columns = self.output_size(images, kernel)
        return self.groups == 1 and (rows * columns <= _FEW_PIXELS or kernel.shape[:2] == (1, 1))

    def is_depthwise(self, images: Array, kernel: Array) -> bool:
        """Whether every channel has a kernel of its own."""
        return self.groups == images.shape[-1] == kernel.shape[-1]


def convolve(
    images: Float[Array, "B H W C"],
    kernel: Float[Array, "h w D F"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **_: object,
) -> Float[Array, "B H2 W2 F"]:
    """As `jax.lax.conv_general_dilated` in two dimensions, channels last, without dilation: nnx.Conv takes it in its place.

    Args:
      images: float [B, H, W, C].
      kernel: float [h, w, D, F]; D is C, divided by the groups.
      strides: of rows and columns.
      padding: zeros before and after each of them.
      feature_group_count: groups of channels.

    Returns:
      float [B, H2, W2, F].
    """
    first, second = strides
    shape = _Shape((first, second), tuple((before, after) for before, after in padding), feature_group_count)
    return _convolve(shape, images, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(shape: _Shape, images: Array, kernel: Array) -> Array:
    return lax.platform_dependent(images, kernel, cpu=partial(_on_cpu, shape), default=partial(_usual, shape))


def _forward(shape: _Shape, images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(shape, images, kernel), (images, kernel)


def _backward(shape: _Shape, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    def usual(images: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        _, pull_back = jax.vjp(partial(_usual, shape), images, kernel)
        return pull_back(gradient)

    def on_cpu(images: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        _, pull_back = jax.vjp(partial(_on_cpu, shape), images, kernel)
        of_images, of_kernel = pull_back(gradient)
        if shape.is_product(images, kernel) and shape.strides == (1, 1):
            of_images = _images_gradient(shape, kernel, gradient)
        # Over several devices the sum of each few images would have to be exchanged.
        if shape.groups == 1 and jax.sharding.get_abstract_mesh().size <= 1:
            of_kernel = _kernel_gradient(shape, images, kernel, gradient)
        return of_images, of_kernel

    return lax.platform_dependent(*kept, gradient, cpu=on_cpu, default=usual)


_convolve.defvjp(_forward, _backward)


def _usual(shape: _Shape, images: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        shape.strides,
        shape.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape.groups,
    )


def _on_cpu(shape: _Shape, images: Array, kernel: Array) -> Array:
    """Convolves with what is fastest on a CPU."""
    if shape.is_depthwise(images, kernel):
        pixels = kernel.reshape(-1, kernel.shape[-1])
        return sum(seen * pixel for seen, pixel in zip(_seen(shape, images, kernel), pixels, strict=True))

    if shape.is_product(images, kernel):
        return jnp.tensordot(_side_by_side(shape, images, kernel), kernel.reshape(-1, kernel.shape[-1]), axes=1)
    return _usual(shape, images, kernel)


def _images_gradient(shape: _Shape, kernel: Array, gradient: Array) -> Float[Array, "B H W C"]:
    """Returns the gradient of the images, where strides are 1: a convolution with the kernel upside down.

    The product's own would add up shifted images, which takes longer than the product.
    """
    upside_down = kernel[::-1, ::-1].swapaxes(2, 3)
    padding = tuple((size - 1 - before, size - 1 - after) for size, (before, after) in zip(kernel.shape, shape.padding))
    return _on_cpu(_Shape((1, 1), padding, 1), gradient, upside_down)


def _kernel_gradient(shape: _Shape, images: Array, kernel: Array, gradient: Array) -> Float[Array, "h w C F"]:
    """Returns the gradient of the kernel, a sum over all pixels of all images, a few images at a time."""
    count = len(images)
    pixels = gradient.shape[1] * gradient.shape[2]
    bytes_an_image = pixels * kernel.size // kernel.shape[-1] * images.dtype.itemsize
    few = max((n for n in range(1, count + 1) if count % n == 0 and n * bytes_an_image <= _CACHED), default=1)

    def add(total: Array, some: tuple[Array, Array]) -> tuple[Array, None]:
        some_images, some_gradient = some
        seen = _side_by_side(shape, some_images, kernel).reshape(few * pixels, -1)
        return total + seen.T @ some_gradient.reshape(few * pixels, -1), None

    chunks = [array.reshape(count // few, few, *array.shape[1:]) for array in (images, gradient)]
    total, _ = lax.scan(add, jnp.zeros((kernel.size // kernel.shape[-1], kernel.shape[-1]), kernel.dtype), tuple(chunks))
    return total.reshape(kernel.shape)


def _side_by_side(shape: _Shape, images: Array, kernel: Array) -> Float[Array, "B H2 W2 hwC"]:
    """Returns what all pixels of the kernel see of the images, in the last axis."""
    return jnp.concatenate(list(_seen(shape, images, kernel)), axis=-1)


def _seen(shape: _Shape, images: Array, kernel: Array) -> Iterator[Float[Array, "B H2 W2 C"]]:
    """Yields what each pixel of the kernel sees of the images, in the kernel's order."""
    rows, columns = shape.output_size(images, kernel)
    down, right = shape.strides
    padded = jnp.pad(images, ((0, 0), *shape.padding, (0, 0)))
    for y in range(kernel.shape[0]):
        for x in range(kernel.shape[1]):
            yield padded[:, y : y + down * (rows - 1) + 1 : down, x : x + right * (columns - 1) + 1 : right]


def max_pool(images: Float[Array, "B H W C"], size: int, padding: int = 0) -> Float[Array, "B H2 W2 C"]:
    """Takes the largest of every `size` by `size` pixels, at strides of 2; the gradient goes to the first of equals.

    On CPUs one axis after the other, as XLA takes three times as long for both at once, above all for the gradient.

    Args:
      images: float [B, H, W, C].
      size: of the windows.
      padding: pixels before and after rows and columns, which are never the largest.

    Returns:
      float [B, H2, W2, C].
    """

    def usual(images: Array) -> Array:
        return nnx.max_pool(images, (size, size), strides=(2, 2), padding=((padding, padding),) * 2)

    def on_cpu(images: Array) -> Array:
        # Columns first: of equals the first row counts, as in the usual one, and then its first column.
        return _largest(_largest(images, 2, size, padding), 1, size, padding)

    return lax.platform_dependent(images, cpu=on_cpu, default=usual)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _largest(images: Array, axis: int, size: int, padding: int) -> Array:
    return reduce(jnp.maximum, _windows(images, axis, size, padding))


def _largest_forward(images: Array, axis: int, size: int, padding: int) -> tuple[Array, tuple[Array, Array]]:
    largest = _largest(images, axis, size, padding)
    return largest, (images, largest)


def _largest_backward(
    axis: int, size: int, padding: int, kept: tuple[Array, Array], gradient: Array
) -> tuple[Float[Array, "B H W C"]]:
    images, largest = kept
    seen, push_back = jax.vjp(lambda images: _windows(images, axis, size, padding), images)

    is_free = jnp.ones(largest.shape, bool)
    shares = []
    for window in seen:
        is_first = is_free & (window == largest)
        is_free &= ~is_first
        shares.append(jnp.where(is_first, gradient, 0))
    return push_back(shares)


_largest.defvjp(_largest_forward, _largest_backward)


def _windows(images: Array, axis: int, size: int, padding: int) -> list[Array]:
    """Returns the first, second, ... pixel of all windows along an axis, at strides of 2."""
    widths = [(padding, padding) if number == axis else (0, 0) for number in range(4)]
    padded = jnp.pad(images, widths, constant_values=-jnp.inf)
    count = (padded.shape[axis] - size) // 2 + 1
    return [lax.slice_in_dim(padded, start, start + 2 * (count - 1) + 1, 2, axis) for start in range(size)]
