"""`python -m badloss_jax` is the command `badloss`."""

import gc
import sys

from badloss_jax.cli import main


def process() -> int:
    """Runs the command line as a process of its own, which looks for garbage rarely, and no more when it ends.

    JAX, scikit-learn and Matplotlib make a million objects that stay. Looking through them took a quarter of the
    shortest runs.

    Returns:
      The exit code.
    """
    gc.set_threshold(10_000, 100)
    try:
        return main()
    finally:
        gc.freeze()


if __name__ == "__main__":
    sys.exit(process())
