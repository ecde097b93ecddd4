"""`python -m badloss_jax` is the command `badloss`."""

import sys

from badloss_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
