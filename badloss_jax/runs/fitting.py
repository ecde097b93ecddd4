"""What would make a program fit that does not: estimates, by what its memory grows with.

Some of it every device has, whatever their number and the batch; the column of an epoch is shared by the devices; the
rest goes with the images that a device has of a batch.
"""

from collections.abc import Mapping
from typing import Any

from badloss_jax.core.memory import gib
from badloss_jax.core.mesh import abstract_mesh, pass_batch_size
from badloss_jax.core.program import bytes_on_device
from badloss_jax.runs.compiling import Taken
from badloss_jax.runs.programs import Program, Programs

_MOST_DOUBLINGS = 16
_MATTERS = 1 / 10  # of the whole: less is not worth a word


def advice_of(taken: Taken, memory: Mapping[str, Any], programs: Programs) -> dict[str, Any]:
    """Says what a program needs that does not fit, and what would make it fit.

    Args:
      taken: what the program takes.
      memory: what the plan says of it, see `badloss_jax.runs.plan`.
      programs: of the run.

    Returns:
      JSON-able: "says", a sentence without its full stop, and "helps", a list of what would, one or the other.
    """
    program = taken.program
    needed, limit = memory["needed"], memory["limit"]
    says = f"the {program.name} needs {gib(needed)} of the {gib(limit)} of a device"
    if taken.refused:
        says = f"the compiler refuses the {program.name}: {taken.refused}"
    helps: list[str] = []
    if program.phase == "scoring":
        return {"says": says, "helps": helps}

    fixed = bytes_on_device(programs.state, programs.machine.topology.size)
    if not programs.images.is_streamed(programs.config):
        fixed += programs.images.examples * programs.images.size
    column = program.beside if program.keeps else taken.arguments
    of_images = max(0, needed - fixed - column)

    if program.keeps and of_images > _MATTERS * needed:
        helps += _spared_by_images(program, programs, room=limit - fixed - column, of_images=of_images)
    helps += _spared_by_devices(program, programs, room=limit - fixed, column=column, of_images=of_images)

    widths = programs.recording.kinds.widths()
    if column > _MATTERS * needed and len(widths) > 1:
        sizes = ", ".join(f"{kind} {width}" for kind, width in widths.items())
        helps.append(f"fewer --config.recording.kinds (bytes an example: {sizes})")
    return {"says": says, "helps": helps}


def _spared_by_images(program: Program, programs: Programs, room: float, of_images: float) -> list[str]:
    """Returns what to do about what goes with the images of a batch: less of each, or fewer."""
    helps = []
    if programs.recording.spec.dtype == "float32":
        helps.append("--config.model.dtype=bfloat16 (halves what layers leave)")

    size = programs.machine.topology.size
    of_a_device = program.rows // size
    key = f"--config.{program.phase}.batch_size"
    fewer = min(int(room / of_images * of_a_device), of_a_device - 1)
    if fewer < 1:
        return helps
    if program.name == "sweep step":
        return [*helps, f"--config.evaluation.batch_size={fewer} (images of a device) or less"]
    return [*helps, f"{key}={fewer * size} or less, in place of {program.rows}"]


def _spared_by_devices(program: Program, programs: Programs, room: float, column: float, of_images: float) -> list[str]:
    """Returns how many devices would have room, if any number would."""
    size = programs.machine.topology.size
    for doublings in range(1, _MOST_DOUBLINGS):
        count = size << doublings
        rows = program.rows
        if program.name == "sweep step":
            rows = pass_batch_size(programs.config.evaluation.batch_size, abstract_mesh(count))
        if rows % count:
            return []
        if column * size / count + of_images * rows * size / (program.rows * count) <= room:
            return [f"{count:,} devices in place of {size:,}"]
    return []
