"""What a run would take of a machine that need not be there: memory, hours, input, storage; and whether it fits.

Each figure is "compiled" (by the machine's own compiler), "arithmetic" (shapes, operations and the chips' published
peaks) or "measured here". A time "at least" is the largest of three: operations at the peak of the matrix units; bytes
at the memory's bandwidth, arguments read once, temporaries written and read once; and what devices exchange, at the
bandwidth of all links. "Expected" are the cycles of the TPUs' compiler, which nobody has calibrated, and the exchange
after them. Evaluations, the attacks' own networks, defences' special steps, compiling, waiting for images, reading and
writing are left out. Begin with `make_plan`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from badloss_jax.config import config_hash
from badloss_jax.core.mesh import check_batch_size
from badloss_jax.core.progress import Progress
from badloss_jax.report.plan import MEASURED
from badloss_jax.runs.compiling import Taken, seconds_of_call, take
from badloss_jax.runs.fitting import advice_of
from badloss_jax.runs.images import Images
from badloss_jax.runs.phases import planned_trainings, records
from badloss_jax.runs.programs import Machine, Program, Programs
from badloss_jax.trajectories.buffer import shapes_of_column

SCHEMA_VERSION = 1
COMPILED = "compiled"
ARITHMETIC = "arithmetic"
ASSUMED = "assumed"

# Images a second that a core decodes and resizes to 224 px (configs/results/README.md).
DECODED = {"JPEG files": 370, "prepared": 10_800}
_TAKE_IMAGES = ("training step", "sweep step", "retraining step")
_SWEEP = 1 / 3  # of an epoch of training, at the same rate
_HOUR = 3600
_AHEAD = 2  # batches that wait on the devices


def make_plan(
    config: ConfigDict,
    images: Images,
    machine: Machine,
    progress: Progress,
    *,
    steps: int = 0,
    rate: float | None = None,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Plans a run.

    Args:
      config: of the run.
      images: that it trains on.
      machine: that it would run on.
      progress: is told what takes minutes.
      steps: of each program that are timed, where the machine is this one; 0 times none.
      rate: images a second that a device is assumed to train with; None assumes nothing.
      kept: folder of what was read of programs that were compiled before; None keeps nothing.

    Returns:
      The plan, JSON-able, see `SCHEMA_VERSION`. `fits` says whether it fits, `advice` what would.

    Raises:
      UsageError: the devices cannot share a batch.
    """
    check_batch_size("recording.batch_size", config.recording.batch_size, machine.mesh)
    check_batch_size("retraining.batch_size", config.retraining.batch_size, machine.mesh)

    programs = Programs(config, images, machine)
    retrainings = planned_trainings(config) - records(config)
    taken = [take(program, machine, progress, kept) for program in programs.all(retrainings)]

    entries = []
    for each in taken:
        entry = _program_entry(each, programs)
        if steps and machine.topology.is_local and entry["memory"]["fits"]:
            with progress.waiting(f"timing the {each.program.name}"):
                entry["seconds"]["measured"] = seconds_of_call(each.program, steps)
        entries.append(entry)

    fits = all(entry["memory"]["fits"] for entry in entries)
    return {
        "schema_version": SCHEMA_VERSION,
        "config_hash": config_hash(config),
        "versions": {"jax": jax.__version__},
        "topology": machine.topology.facts(),
        "source": ARITHMETIC if machine.why_not else COMPILED,
        "why_not_compiled": machine.why_not,
        "images": {"examples": images.examples, "classes": images.classes, "shape": list(images.shape)},
        "network": _network_entry(programs),
        "recording": _recording_entry(programs),
        "trainings": {"recording": int(records(config)), "others": retrainings},
        "programs": entries,
        "phases": _phases(entries, programs, retrainings, rate),
        "rate": rate,
        "input": _input_entry(entries, programs, rate),
        "storage": _storage_entry(programs, retrainings),
        "fits": fits,
        "advice": [
            advice_of(each, entry["memory"], programs)
            for each, entry in zip(taken, entries, strict=True)
            if not entry["memory"]["fits"]
        ],
    }


# --- what is planned


def _network_entry(programs: Programs) -> dict[str, Any]:
    spec = programs.recording.spec
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(programs.state.params))
    return {"name": spec.name, "dtype": spec.dtype, "parameters": numbers}


def _recording_entry(programs: Programs) -> dict[str, Any]:
    recording = programs.recording
    return {
        "epochs": recording.recipe.epochs,
        "capture": recording.capture,
        "bytes_an_example_and_epoch": recording.kinds.widths(),
    }


def _program_entry(taken: Taken, programs: Programs) -> dict[str, Any]:
    """Returns what the plan says of a program."""
    program = taken.program
    topology = programs.machine.topology
    compiled = taken.compiled

    memory: dict[str, Any] = {
        "arguments": compiled.arguments if compiled else taken.arguments,
        "temporaries": compiled.temporaries if compiled else taken.temporaries,
        "peak": compiled.peak if compiled else taken.arguments + taken.temporaries,
        "beside": program.beside + _waiting_bytes(program, programs),
    }
    if compiled:
        # A program is not given what it does not look at, as a sweep the optimiser's state: it is there all the same.
        memory["beside"] += max(0, taken.arguments - compiled.arguments)
    memory["needed"] = max(memory["peak"], taken.wanted) + memory["beside"]
    memory["limit"] = topology.memory
    memory["refused"] = taken.refused
    memory["fits"] = not taken.refused and memory["needed"] <= topology.memory

    collectives: dict[str, dict[str, Any]] = {}
    if compiled:
        for kind, (count, size) in compiled.collectives.items():
            collectives[kind] = {"count": count, "bytes": size}
    elif topology.size > 1:
        # At the least one of each.
        for kind, size in (("all-reduce", program.sums), ("all-gather", program.gathers)):
            if size:
                collectives[kind] = {"count": 1, "bytes": size}

    entry: dict[str, Any] = {
        "name": program.name,
        "phase": program.phase,
        "rows": program.rows,
        "calls": program.calls,
        "source": COMPILED if compiled else ARITHMETIC,
        "memory": memory,
        "in_place": taken.in_place,
        "copies": {"count": compiled.copies[0], "bytes": compiled.copies[1]} if compiled else None,
        "moves": {"count": compiled.moves[0], "bytes": compiled.moves[1]} if compiled else None,
        "collectives": collectives,
        "flops": taken.flops,
        "compiled_flops": compiled.flops if compiled else None,
        "compiled_bytes": compiled.accessed if compiled else None,
    }
    entry["seconds"] = _seconds(entry, taken, programs)
    return entry


def _waiting_bytes(program: Program, programs: Programs) -> int:
    """Counts what lies on each device of images that no step has been given yet, or of the whole resident set."""
    images = programs.images
    if not images.is_streamed(programs.config):
        return images.examples * images.size
    if program.phase == "scoring":
        return 0
    return _AHEAD * program.rows * images.size // programs.machine.topology.size


def _seconds(entry: Mapping[str, Any], taken: Taken, programs: Programs) -> dict[str, Any]:
    """Returns the time bounds of a program, what its compiler expects, and which of the bounds is the largest."""
    topology = programs.machine.topology
    chip = topology.chip
    program = taken.program
    seconds: dict[str, Any] = {"compute": None, "memory": None, "network": 0.0, "expected": None, "measured": None}
    if chip is None:
        return seconds | {"at_least": None, "by": None}

    for kind, of_kind in entry["collectives"].items():
        seconds_of = topology.reduction_seconds if kind == "all-reduce" else topology.gathering_seconds
        seconds["network"] += seconds_of(of_kind["bytes"])

    # The scorer's operations are none of the matrix units', which on TPUs know no float64.
    peak = chip.flops.get(programs.recording.spec.dtype)
    if taken.flops and peak:
        seconds["compute"] = taken.flops / peak

    # Not what the compiler counts, in which is what lies in faster memory, and all of what is written to in places.
    moved = entry["memory"]["arguments"] + 2 * entry["memory"]["temporaries"]
    if program.gathers:
        moved = 2 * program.gathers  # of the column no more than the rows that are written
    seconds["memory"] = moved / chip.bandwidth

    compiled = taken.compiled
    if compiled and compiled.cycles and chip.clock:
        seconds["expected"] = compiled.cycles / chip.clock + seconds["network"]
    bounds = {name: seconds[name] for name in ("compute", "memory", "network") if seconds[name]}
    by = max(bounds, key=lambda name: bounds[name])
    return seconds | {"at_least": bounds[by], "by": by}


# --- phases, input, storage


def _phases(
    entries: Sequence[Mapping[str, Any]], programs: Programs, retrainings: int, rate: float | None
) -> list[dict[str, Any]]:
    """Returns the hours of each phase, and of all together at the end; None where nobody knows."""
    epochs = programs.recording.recipe.epochs
    passes = {
        "training step": epochs,
        "sweep step": epochs * _SWEEP,
        "retraining step": retrainings * programs.retraining.epochs,
    }
    a_pass = programs.images.examples / (rate * programs.machine.topology.size) / _HOUR if rate else None

    phases: list[dict[str, Any]] = []
    for name, members in _members(entries).items():
        at_rate = None
        if a_pass is not None and members[0]["phase"] != "scoring":
            at_rate = a_pass * sum(passes.get(entry["name"], 0) for entry in members)
        slowest = max(members, key=lambda entry: (entry["seconds"]["at_least"] or 0) * entry["calls"])
        phases.append(
            {
                "name": name,
                "at_least": _hours(members, lambda seconds: seconds["at_least"]),
                "expected": _hours(members, _likely),
                "at_rate": at_rate,
                "by": slowest["seconds"]["by"],
            }
        )

    def total(key: str) -> float | None:
        values = [phase[key] for phase in phases]
        return None if None in values else sum(values)

    whole = {key: total(key) for key in ("at_least", "expected")}
    # What only scores takes no time of training.
    whole["at_rate"] = sum(phase["at_rate"] or 0 for phase in phases) if rate else None
    key = next((key for key in ("expected", "at_least") if whole[key]), None)
    dominating = max(phases, key=lambda phase: phase[key])["name"] if key and phases else None
    for phase in phases:
        phase["share"] = phase[key] / whole[key] if key else None
    return [*phases, {"name": "the whole run"} | whole | {"by": dominating, "share": 1.0 if key else None}]


def _members(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups programs by what they are part of."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        name = entry["phase"]
        if name == "recording":
            name = "recording: sweeps" if "sweep" in entry["name"] else "recording: training"
        if name == "scoring":
            name = "scoring, once it is read"
        groups.setdefault(name, []).append(entry)
    return groups


def _hours(
    members: Iterable[Mapping[str, Any]], seconds_of: Callable[[Mapping[str, Any]], float | None]
) -> float | None:
    hours = 0.0
    for entry in members:
        seconds = seconds_of(entry["seconds"])
        if seconds is None:
            return None
        hours += entry["calls"] * seconds / _HOUR
    return hours


def _likely(seconds: Mapping[str, Any]) -> float | None:
    """Returns what was measured of a program, or else what its compiler expects."""
    return seconds["measured"] or seconds["expected"]


def _input_entry(entries: Sequence[Mapping[str, Any]], programs: Programs, rate: float | None) -> dict[str, Any]:
    """Returns how fast images have to come, for the devices never to wait, and what it takes to decode them."""
    images = programs.images
    streamed = images.is_streamed(programs.config)
    entry: dict[str, Any] = {
        "streamed": streamed,
        "bytes_an_epoch": images.examples * images.size,
        "images_a_second": {},
        "source": "at most",
    }
    for key, source in (("expected", "by the cycles"), ("measured", MEASURED)):
        if any(program["seconds"][key] for program in entries):
            entry["source"] = source
    for program in entries:
        seconds = _likely(program["seconds"]) or program["seconds"]["at_least"]
        if seconds and program["name"] in _TAKE_IMAGES and program["memory"]["fits"]:
            entry["images_a_second"][program["name"]] = program["rows"] / seconds
    if rate:
        entry["images_a_second"] = {"training": rate * programs.machine.topology.size}
        entry["source"] = ASSUMED
    if not streamed or not entry["images_a_second"]:
        return entry

    fastest = max(entry["images_a_second"].values())
    return entry | {
        "bytes_a_second": fastest * images.size,
        "cores": {how: math.ceil(fastest / of_core) for how, of_core in DECODED.items()},
    }


def _storage_entry(programs: Programs, retrainings: int) -> dict[str, Any]:
    """Returns the bytes that a run leaves on a disk, or reads from it."""
    recording = programs.recording
    state = programs.state
    widths = _recording_entry(programs)["bytes_an_example_and_epoch"]
    trajectories = programs.images.examples * recording.recipe.epochs * sum(widths.values())
    written = recording.kinds.layout()
    by_steps = shapes_of_column(
        recording.kinds,
        tuple(written) if recording.capture == "step" else tuple(kind for kind in written if kind == "step"),
        programs.images.examples,
        programs.machine.mesh,
    )
    network = _bytes((state.params, state.batch_stats))
    return {
        "trajectories": trajectories,
        "read_by_a_host_to_score": trajectories // programs.machine.topology.hosts,
        "checkpoint": _bytes(state) + _bytes(by_steps),
        "networks": (retrainings + records(programs.config)) * network,
    }


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))
