"""What the processes of a run or a scan do together: hold its folder, and find out that they are of one mind."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from ml_collections import ConfigDict

from badloss_jax.config import settled
from badloss_jax.core.hashing import code_hash
from badloss_jax.core.processes import agree, on_first
from badloss_jax.runs.workdir import claim
from badloss_jax.runs.writers import Writer, open_writers


@contextmanager
def claimed(workdir: Path, config: ConfigDict, free: Sequence[str] = ()) -> Iterator[Sequence[Writer]]:
    """Holds the folder and opens the writers, in the first process; checks that all processes see the folder.

    Args:
      workdir: the folder.
      config: of the run.
      free: groups of settings that may have changed; see `claim`.

    Yields:
      The writers; in other processes there are none.

    Raises:
      UsageError, DataError: see `claim`; or some process sees another folder.
    """
    writers: list[Writer] = []
    with ExitStack() as stack:

        def hold() -> None:
            stack.enter_context(claim(workdir, config, free))
            writers.extend(stack.enter_context(open_writers(workdir, config)))

        on_first(hold)
        # Every process looks for what the first has just written.
        content = "a run" if (workdir / "config.json").is_file() else "nothing"
        agree({f"what is in --workdir {workdir}, which has to be one folder that all processes share,": content})
        yield writers


def facts_of(config: ConfigDict) -> dict[str, str]:
    """Returns what all processes have to agree on, whatever they do, for `processes.agree`."""
    facts = {f"config.{key}": str(value) for key, value in settled(config).items()}
    return facts | {"the code of badloss_jax (a hash)": code_hash(), "the version of jax": jax.__version__}
