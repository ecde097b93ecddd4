"""XLA on CPUs: what is known to be wrong or slow is switched off, and wrong sums are looked for.

From jaxlib 0.10 on XLA hands sums, products and convolutions to a library, YNNPACK. It leaves sums out, silently, in
0.10: of those of (A @ row).sum() for each of 32,769 rows of three numbers the last is wrong (jax-ml/jax#39103 is of
0.10.2; 0.10.0 and 0.10.1 have it, too). Nothing of this package was seen to be, but nobody could know of all. And it
took twice to twelve times as long for the gradients of large kernels, in 0.10.2 and in 0.11.2.
"""

import os
from collections.abc import Callable
from functools import lru_cache

import jax
import jaxlib
import numpy as np
from jaxtyping import Array, Float

from badloss_jax.core.errors import UsageError

_NAME = "--xla_cpu_experimental_ynn_fusion_type"
_ROWS = 32_769  # the fewest that come out wrong


def avoid_ynnpack() -> None:
    """Tells XLA to compute by itself, if XLA_FLAGS does not speak of it.

    XLA reads its flags once, when JAX first looks for devices: whoever does so first has to set them.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _NAME not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_NAME}=".lstrip()


avoid_ynnpack()


@lru_cache(maxsize=1)
def check_sums() -> None:
    """Checks, once a process and in some 50 ms, that XLA computes on the CPU what earlier versions got wrong.

    Raises:
      UsageError: it does not.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        check_sums_of(jax.jit(jax.vmap(lambda row: (np.eye(3, dtype=np.float32) @ row).sum())))


def check_sums_of(sums: Callable[[Float[np.ndarray, "N 3"]], Float[Array, "N"]]) -> None:
    """Checks some sums.

    Args:
      sums: rows of three numbers -> the sum of each.

    Raises:
      UsageError: a sum is wrong; what to do is said.
    """
    rows = np.zeros((_ROWS, 3), np.float32)
    rows[:, 0] = np.arange(_ROWS)
    wrong = np.flatnonzero(np.asarray(sums(rows)) != rows[:, 0])
    if len(wrong):
        raise UsageError(
            f"jaxlib {jaxlib.__version__} computes {len(wrong)} of {_ROWS} sums wrong on this CPU (jax-ml/jax#39103)."
            f" Import badloss_jax before JAX is first used, or start with XLA_FLAGS={_NAME}= in the environment; or"
            " install another version: pip install 'jax>=0.11.1,<0.12', with Python 3.12 or newer"
        )
