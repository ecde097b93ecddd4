"""What commands share: the end of a help text, arguments that are lists, JAX set up, errors explained."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from badloss_jax.core.errors import BadlossError, PreemptedError, UsageError

_SETTINGS = """\
settings:
  --config.GROUP.KEY=VALUE changes one setting, repeatedly; `badloss_jax/settings.py` lists all with their meaning.
  An unknown key or an impossible value is refused, with the nearest valid one, before any work starts.

examples:
{examples}

exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by SIGTERM with all saved (run it again), 130 interrupted
"""

# What stands for the path that an option names; None leaves the option out.
_PATH_NAMES = {"--out": None, "--workdir": "OUT", "--from": "DIR", "--config.data.dir": "DIR"}


def settings_and(examples: Sequence[str]) -> str:
    """Returns the end of a help text: how settings are changed, examples, exit codes."""
    return _SETTINGS.format(examples="\n".join(f"  {example}" for example in examples))


def integers(text: str) -> tuple[int, ...]:
    """Takes an argument such as 0,1,2 apart; raises ValueError if it is none, which argparse explains."""
    return tuple(int(number) for number in text.split(","))


def words(text: str) -> tuple[str, ...]:
    """Takes an argument such as patch,blend_r apart."""
    return tuple(text.split(","))


def cache_folder(name: str) -> Path:
    """Returns the user's own folder for what can be made again; raises UsageError if the user has no home."""
    try:
        return Path("~/.cache/badloss_jax", name).expanduser()
    except RuntimeError as error:
        raise UsageError("this user has no home folder: export HOME=FOLDER, one where things can be kept") from error


def set_up_jax(trains: bool = False) -> None:
    """Keeps compiled programs in the user's own cache folder, and off the screen what orbax and libtpu log.

    Args:
      trains: keep memory for the next step, too, which takes as much again.
    """
    import logging

    import absl.logging
    import jax

    from badloss_jax.core.environment import leave_out_absent_tpus
    from badloss_jax.core.memory import keep_memory

    leave_out_absent_tpus()
    if trains:
        keep_memory()
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # JAX's own limit is a second, and a short run has a dozen programs that take less.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def explain(error: BadlossError) -> int:
    """Says on the screen what happened; returns the exit code."""
    kind = "" if isinstance(error, PreemptedError) else "error: "
    print(f"badloss: {kind}{error}", file=sys.stderr)
    return error.exit_code


def out_of_memory(error: Exception) -> BadlossError | None:
    """Returns the error to show in place of one that says that memory is exhausted; None if it is of something else."""
    from badloss_jax.core.memory import explained  # here, as it imports JAX

    return explained(error)


def without_paths(command: Sequence[str]) -> list[str]:
    """Leaves out where the file lies, and names other folders by what they are: they mean nothing elsewhere."""
    recorded = []
    words = iter(command)
    for word in words:
        option, equals, _ = word.partition("=")
        if option not in _PATH_NAMES:
            recorded.append(word)
            continue

        if not equals:
            # The path is the next word.
            next(words, None)
        name = _PATH_NAMES[option]
        if name is None:
            continue
        if equals:
            recorded.append(f"{option}={name}")
        else:
            recorded += [option, name]
    return recorded
