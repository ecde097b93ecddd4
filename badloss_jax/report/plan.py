"""What `badloss plan` prints, from the plan's JSON alone.

A plan is tables of cells that are texts, and lines between them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from badloss_jax.report.tables import as_text

MEASURED = "measured here"
_LEGEND = (
    "Operations and compute are arithmetic; memory and network are by what the last column says, and published peaks;",
    "expected are the cycles of the TPUs' compiler, which nobody has calibrated, and the network after them.",
)
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def as_lines(plan: Mapping[str, Any]) -> list[str]:
    """Returns the lines to print of a plan."""
    lines = [*_introduction(plan), ""]
    lines += [as_text(memory_table(plan)), ""]
    if any(program["collectives"] for program in plan["programs"]):
        lines += [as_text(exchange_table(plan)), ""]
    lines += [as_text(time_table(plan)), *_LEGEND, ""]
    lines += [as_text(phase_table(plan)), ""]
    lines += [as_text(needs_table(plan))]
    lines += ["", *_verdict(plan)]
    return lines


def _introduction(plan: Mapping[str, Any]) -> list[str]:
    images = plan["images"]
    network = plan["network"]
    recording = plan["recording"]
    widths = recording["bytes_an_example_and_epoch"]
    height, width, _ = images["shape"]
    lines = [
        f"{plan['topology']['description']}, {size(plan['topology']['memory'])} each;"
        f" {images['examples']:,} images of {height} x {width} px in {images['classes']:,} classes",
        f"{network['name']} in {network['dtype']}, {number(network['parameters'])} parameters;"
        f" {recording['epochs']} epochs recorded by {recording['capture']}: {', '.join(widths)}"
        f" ({sum(widths.values())} bytes an image and epoch)",
    ]
    if plan["why_not_compiled"]:
        lines.append(f"All is arithmetic, nothing compiled: {plan['why_not_compiled']}")
    return lines


def memory_table(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: what each program takes of a device's memory, and what becomes of its arrays."""
    rows = [
        [
            "memory of a device",
            "arguments",
            "temporaries",
            "peak",
            "beside",
            "of it",
            "in place",
            "copies",
            "moves",
            "how",
        ]
    ]
    for program in plan["programs"]:
        memory = program["memory"]
        row = [f"{program['name']}, {program['rows']:,} rows"]
        if memory["refused"]:
            row += [size(memory["arguments"]), "", "", size(memory["beside"]), "too much", "", "", "", "compiled"]
        else:
            row += [size(memory[key]) for key in ("arguments", "temporaries", "peak", "beside")]
            row += [_percent(memory["needed"] / memory["limit"]), _yes_or_no(program["in_place"])]
            row += [_copied(program["copies"]), _copied(program["moves"]), program["source"]]
        rows.append(row)
    return rows


def exchange_table(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: how many exchanges of each kind a call has, and their bytes; none is left empty."""
    kinds = sorted({kind for program in plan["programs"] for kind in program["collectives"]})
    rows = [["exchanged at a call", *kinds, "how"]]
    for program in plan["programs"]:
        cells = []
        for kind in kinds:
            of_kind = program["collectives"].get(kind)
            cells.append(f"{of_kind['count']}: {size(of_kind['bytes'])}" if of_kind else "")
        rows.append([program["name"], *cells, program["source"]])
    return rows


def time_table(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: how long a call of each program takes; operations are always arithmetic."""
    timed = any(program["seconds"]["measured"] for program in plan["programs"])
    rows = [["a call", "operations", "compute", "memory", "network", "at least", "expected", "how"]]
    if timed:
        rows[0].append(MEASURED)
    for program in plan["programs"]:
        seconds = program["seconds"]
        row = [program["name"], number(program["flops"])]
        row += [time(seconds[key]) for key in ("compute", "memory", "network", "at_least", "expected")]
        row.append(program["source"])
        if timed:
            row.append(time(seconds["measured"]))
        rows.append(row)
    return rows


def phase_table(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: the hours of each phase, and what they are by."""
    rows = [["phase", "at least", "by", "expected", "share"]]
    if plan["rate"]:
        rows[0].append(f"at {plan['rate']:,g} images/s a device")
    for phase in plan["phases"]:
        row = [phase["name"], duration(phase["at_least"]), phase["by"] or "", duration(phase["expected"])]
        row.append("" if phase["share"] is None else _percent(phase["share"]))
        if plan["rate"]:
            row.append(duration(phase["at_rate"]))
        rows.append(row)
    return rows


def needs_table(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: what has to come in, and what is kept, all by arithmetic."""
    entry = plan["input"]
    storage = plan["storage"]
    rows = [["input and storage", "", "how"]]
    for name, rate in entry["images_a_second"].items():
        rows.append([f"images a second, {name}", f"{rate:,.0f}", entry["source"]])
    if entry["streamed"] and entry["images_a_second"]:
        rows.append(["pixels a second", size(entry["bytes_a_second"]), entry["source"]])
        for how, cores in entry["cores"].items():
            rows.append([f"cores that decode {how}", f"{cores:,}", entry["source"]])
    rows.append(["pixels an epoch", size(entry["bytes_an_epoch"]), "arithmetic"])
    for name, count in storage.items():
        rows.append([name.replace("_", " "), size(count), "arithmetic"])
    return rows


def comparison_table(plans: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: what a run takes of several machines.

    Args:
      plans: title -> plan, each with the same `rate`, whose recording sweeps.
    """
    rate = next(iter(plans.values()))["rate"]
    rows = [["", *plans]]

    def add(title: str, cell: Callable[[Mapping[str, Any]], str]) -> None:
        rows.append([title, *(cell(plan) for plan in plans.values())])

    def memory(name: str, key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda plan: size(_program(plan, name)["memory"][key])

    def phase(number: int, key: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda plan: duration(plan["phases"][number][key]) or "-"

    def cores(how: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda plan: f"{plan['input']['cores'][how]:,}"

    add("images", lambda plan: f"{plan['images']['examples']:,}")
    add("images in a batch", lambda plan: f"{_program(plan, 'training step')['rows']:,}")
    add("trajectories, in all", lambda plan: size(plan["storage"]["trajectories"]))
    add("the column of an epoch, on each device", lambda plan: size(_column_of(plan)))
    add("a checkpoint", lambda plan: size(plan["storage"]["checkpoint"]))
    add(
        "exchanges of a training step, and their bytes",
        lambda plan: _exchanged(_program(plan, "training step")["collectives"]),
    )
    add(
        "exchanges of a write, and their bytes",
        lambda plan: _exchanged(_program(plan, "write of a sweep")["collectives"]),
    )
    add("memory of a device", lambda plan: size(plan["topology"]["memory"]))
    add("arguments of the training step", memory("training step", "arguments"))
    add("its temporaries", memory("training step", "temporaries"))
    add("arguments of the write", memory("write of a sweep", "arguments"))
    add("its temporaries", memory("write of a sweep", "temporaries"))
    add("recording and sweeps, at least", lambda plan: duration(_recording_hours(plan, "at_least")))
    add("the same, expected", lambda plan: duration(_recording_hours(plan, "expected")) or "-")
    add("retraining, at least", phase(-2, "at_least"))
    add("the same, expected", phase(-2, "expected"))
    add("pixels an epoch", lambda plan: size(plan["input"]["bytes_an_epoch"]))
    assumed = f"at {rate:,g} images/s a device"
    add(f"recording and sweeps, {assumed}", lambda plan: duration(_recording_hours(plan, "at_rate")))
    add(f"retraining, {assumed}", phase(-2, "at_rate"))
    add(f"pixels a second, {assumed}", lambda plan: size(plan["input"]["bytes_a_second"]))
    for how in next(iter(plans.values()))["input"]["cores"]:
        add(f"cores that decode {how}, {assumed}", cores(how))
    return rows


def scoring_table(plan: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: what scoring takes of a host and of a device, for each kind of trajectory."""
    widths = plan["recording"]["bytes_an_example_and_epoch"]
    scorers = [program for program in plan["programs"] if program["phase"] == "scoring"]
    kinds = [scorer["name"].removeprefix("scorer of ") for scorer in scorers]
    devices = plan["topology"]["devices"]

    examples = plan["images"]["examples"] // plan["topology"]["hosts"]
    read = [examples * plan["recording"]["epochs"] * widths[kind] for kind in kinds]
    expected = [scorer["seconds"]["expected"] for scorer in scorers]
    return [
        ["", *kinds],
        ["read by a host", *map(size, read)],
        ["from storage that gives it 1 GB/s", *(duration(count / 1e9 / 3600) for count in read)],
        ["rows of a chunk", *(f"{scorer['rows'] // devices:,}" for scorer in scorers)],
        ["chunks of a device", *(f"{scorer['calls']:,}" for scorer in scorers)],
        ["memory for a chunk and the next", *(size(scorer["memory"]["needed"]) for scorer in scorers)],
        ["a chunk, expected", *map(time, expected)],
        ["all of them", *(time(s["calls"] * each) for s, each in zip(scorers, expected, strict=True))],
    ]


def _program(plan: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(program for program in plan["programs"] if program["name"] == name)


def _column_of(plan: Mapping[str, Any]) -> int:
    """Returns what a device has of an epoch, up to the padding of its rows."""
    width = sum(plan["recording"]["bytes_an_example_and_epoch"].values())
    return -(-plan["images"]["examples"] // plan["topology"]["devices"]) * width


def _recording_hours(plan: Mapping[str, Any], key: str) -> float | None:
    hours = [phase[key] for phase in plan["phases"] if phase["name"].startswith("recording")]
    return None if None in hours else sum(hours)


def _verdict(plan: Mapping[str, Any]) -> list[str]:
    if plan["fits"]:
        return ["It fits."]
    lines = ["It does not fit:"]
    for advice in plan["advice"]:
        helps = [f"    {text}" for text in advice["helps"]]
        lines += [f"  {advice['says']}{'; what helps:' if helps else ''}", *helps]
    return lines


def _yes_or_no(value: bool | None) -> str:
    if value is None:
        return ""
    return "yes" if value else "NO"


def _copied(copies: Mapping[str, int] | None) -> str:
    if copies is None:
        return ""
    if not copies["count"]:
        return "none"
    return f"{copies['count']}: {size(copies['bytes'])}"


def _exchanged(collectives: Mapping[str, Mapping[str, Any]]) -> str:
    if not collectives:
        return "nothing"
    count = sum(of_kind["count"] for of_kind in collectives.values())
    return f"{count}: {size(sum(of_kind['bytes'] for of_kind in collectives.values()))}"


def _percent(share: float) -> str:
    if share > 0.1:
        return f"{100 * share:.0f} %"
    return f"{100 * share:.2g} %"


def size(count: float) -> str:
    """Returns a number of bytes, in thousands of thousands."""
    power = 0
    while count >= 999.5 and power < len(_UNITS) - 1:
        count /= 1000
        power += 1
    return f"{count:.3g} {_UNITS[power]}"


def number(count: float) -> str:
    """Returns a large number, in thousands of thousands."""
    return size(count)[:-1].strip() if count else "0"


def time(seconds: float | None) -> str:
    """Returns a short time; "" if there is none."""
    if seconds is None:
        return ""
    for unit, name in ((1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-6:.3g} µs"


def duration(hours: float | None) -> str:
    """Returns hours as days, hours, minutes or seconds, whichever suits; "" if there are none."""
    if hours is None:
        return ""
    if hours >= 48:
        return f"{hours / 24:,.3g} days"
    if hours >= 1:
        return f"{hours:.2g} h" if hours < 10 else f"{hours:.0f} h"
    if hours >= 1 / 60:
        return f"{60 * hours:.2g} min"
    return f"{3600 * hours:.2g} s"
