"""Convolution and pooling as each device computes them fastest: where XLA is slow on CPUs, something else stands.

Values and gradients are the same to rounding. What each gains was seen on one core of an AMD EPYC, jaxlib 0.10.2:

- A convolution with few channels computes two or four neighbouring columns of its output at once, with a wider kernel
  that has zeros in between: what a kernel sees is copied first, and that takes longer than the sums.
- A convolution whose output has few pixels is one product of matrices: XLA has only plain loops for it, a hundred times
  slower.
- The gradient of a kernel is a convolution of transposed images by a transposed gradient. As XLA transposes them it
  computes anew all that they were made by, up to the last convolution: that took a tenth of a small network's step.
- A depthwise one is a sum of shifted images, each times one pixel of the kernel: up to fifty times faster.
- A max-pool takes one axis after the other: three to fourteen times faster in its gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, Float

_FEW_PIXELS = 8  # of an output, up to which XLA takes plain loops on CPUs
# Input channels -> channels of two or four columns of the output, beyond which one column at a time is as fast.
_WIDEST = {4: 128, 1 << 30: 32}


@dataclass(frozen=True)
class _Steps:
    """How a kernel goes over images.

    Attributes:
      strides: of rows and columns.
      padding: zeros before and after each of them.
    """

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]

    def output_size(self, images: Array, kernel: Array) -> tuple[int, int]:
        """Returns the rows and columns of the output."""
        rows, columns = (
            (images.shape[1 + axis] + sum(self.padding[axis]) - kernel.shape[axis]) // self.strides[axis] + 1
            for axis in range(2)
        )
        return rows, columns

    def turned(self, kernel: Array) -> tuple["_Steps", Array]:
        """Returns what makes the gradient of the images from that of the output, at strides of 1."""
        padding = tuple(
            (size - 1 - before, size - 1 - after)
            for size, (before, after) in zip(kernel.shape, self.padding, strict=False)
        )
        return _Steps((1, 1), padding), kernel[::-1, ::-1].swapaxes(2, 3)


def convolve(
    images: Float[Array, "B H W C"],
    kernel: Float[Array, "h w D F"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **_: object,
) -> Float[Array, "B H2 W2 F"]:
    """As `jax.lax.conv_general_dilated` in two dimensions, channels last and not dilated; nnx.Conv takes it instead.

    Args:
      images: float [B, H, W, C].
      kernel: float [h, w, D, F]; D is C, divided by the groups.
      strides: of rows and columns.
      padding: zeros before and after each of them.
      feature_group_count: groups of channels.

    Returns:
      float [B, H2, W2, F].
    """
    down, right = strides
    steps = _Steps((down, right), tuple((before, after) for before, after in padding))
    usual = partial(_usual, steps, groups=feature_group_count)

    rows, columns = steps.output_size(images, kernel)
    on_cpu: Callable[[_Steps, Array, Array], Array]
    if feature_group_count == images.shape[-1] == kernel.shape[-1]:
        on_cpu = _depthwise
    elif feature_group_count > 1:
        return usual(images, kernel)
    else:
        on_cpu = _product if rows * columns <= _FEW_PIXELS else _by_columns
    return lax.platform_dependent(images, kernel, cpu=partial(on_cpu, steps), default=usual)


def _usual(steps: _Steps, images: Array, kernel: Array, groups: int = 1) -> Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        steps.strides,
        steps.padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _with_own_gradients(
    function: Callable[[_Steps, Array, Array], Array],
    gradients: Callable[[_Steps, Array, Array, Array], tuple[Array, Array]] | None = None,
) -> Callable[[_Steps, Array, Array], Array]:
    """Gives a way to convolve its gradients; at strides of 1 that of the images is found in the same way.

    Args:
      function: (steps, images, kernel) -> output.
      gradients: (steps, images, kernel, gradient of the output) -> those of the images and of the kernel; by default
        what JAX derives, which at strides of 1 would add up shifted images.

    Returns:
      The function, differentiable once.
    """
    convolution = jax.custom_vjp(function, nondiff_argnums=(0,))

    def forward(steps: _Steps, images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return convolution(steps, images, kernel), (images, kernel)

    def backward(steps: _Steps, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        images, kernel = kept
        if gradients is None:
            _, pull_back = jax.vjp(partial(function, steps), images, kernel)
            of_images, of_kernel = pull_back(gradient)
        else:
            of_images, of_kernel = gradients(steps, images, kernel, gradient)
        if steps.strides == (1, 1):
            turned, kernel = steps.turned(kernel)
            of_images = convolution(turned, gradient, kernel)
        return of_images, of_kernel

    convolution.defvjp(forward, backward)
    return convolution


def _usual_gradients(steps: _Steps, images: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
    """Returns what JAX would derive, and has nothing computed anew for it."""
    _, pull_back = jax.vjp(lambda images: _usual(steps, images, kernel), images)
    (of_images,) = pull_back(gradient)

    # By a call that XLA may not inline: it would fuse the transposition with all that made the images.
    with set_xla_metadata(inlineable="false"):
        images, gradient = _transposed(images, gradient)

    # The gradient, spread by the strides, slides over the images; it has as many places as the kernel has pixels.
    padding = []
    for axis, (before, _) in enumerate(steps.padding):
        seen = steps.strides[axis] * (gradient.shape[axis] - 1) + kernel.shape[axis]
        padding.append((before, seen - before - images.shape[1 + axis]))
    of_kernel = lax.conv_general_dilated(
        images, gradient, (1, 1), padding, rhs_dilation=steps.strides, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return of_images, of_kernel.transpose(1, 2, 0, 3)


@jax.jit
def _transposed(images: Array, gradient: Array) -> tuple[Float[Array, "C H W B"], Float[Array, "H2 W2 B F"]]:
    return images.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)


def _columns_at_once(steps: _Steps, images: Array, kernel: Array) -> int:
    """Returns how many columns of the output are best computed at once: 1, 2 or 4."""
    _, width, channels, features = kernel.shape
    rows, columns = steps.output_size(images, kernel)
    widest = next(widest for most, widest in _WIDEST.items() if channels <= most)
    for count in (4, 2):
        if width > 1 and count * features <= widest and columns % count == 0 and rows * columns > count * _FEW_PIXELS:
            return count
    return 1


@partial(_with_own_gradients, gradients=_usual_gradients)
def _by_columns(steps: _Steps, images: Array, kernel: Array) -> Array:
    """Convolves with a kernel that is wide enough for some columns of the output, whose channels lie side by side."""
    count = _columns_at_once(steps, images, kernel)
    if count == 1:
        return _usual(steps, images, kernel)
    down, right = steps.strides

    moved = [
        jnp.pad(kernel, ((0, 0), (right * column, right * (count - 1 - column)), (0, 0), (0, 0)))
        for column in range(count)
    ]
    wider = _Steps((down, right * count), steps.padding)
    side_by_side = _usual(wider, images, jnp.concatenate(moved, axis=-1))
    return side_by_side.reshape(*images.shape[:1], *steps.output_size(images, kernel), kernel.shape[-1])


def _depthwise(steps: _Steps, images: Array, kernel: Array) -> Array:
    """Convolves each channel with its own kernel."""
    pixels = kernel.reshape(-1, kernel.shape[-1])
    return sum(seen * pixel for seen, pixel in zip(_seen(steps, images, kernel), pixels, strict=True))


@_with_own_gradients
def _product(steps: _Steps, images: Array, kernel: Array) -> Array:
    """Convolves by one product: what all pixels of the kernel see, side by side, with the kernel."""
    side_by_side = jnp.concatenate(list(_seen(steps, images, kernel)), axis=-1)
    return jnp.tensordot(side_by_side, kernel.reshape(-1, kernel.shape[-1]), axes=1)


def _seen(steps: _Steps, images: Array, kernel: Array) -> Iterator[Float[Array, "B H2 W2 C"]]:
    """Yields what each pixel of the kernel sees of the images, in the kernel's order."""
    rows, columns = steps.output_size(images, kernel)
    down, right = steps.strides
    padded = jnp.pad(images, ((0, 0), *steps.padding, (0, 0)))
    for y in range(kernel.shape[0]):
        for x in range(kernel.shape[1]):
            yield padded[:, y : y + down * (rows - 1) + 1 : down, x : x + right * (columns - 1) + 1 : right]


def max_pool(images: Float[Array, "B H W C"], size: int, padding: int = 0) -> Float[Array, "B H2 W2 C"]:
    """Takes the largest of every `size` by `size` pixels, at strides of 2; the gradient goes to the first of equals.

    On CPUs one axis after the other: of both at once XLA's gradient takes at least three times as long.

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
