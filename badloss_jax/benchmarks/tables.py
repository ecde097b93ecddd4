"""The tables that `badloss bench` prints, of the figures that it keeps."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def training_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per network and mode seconds a step, examples a second, and the costs of recording."""
    rows = [
        ["network", "px", "dtype", "recording", "ms/step", "examples/s", "of a step", "95 % interval", "of an epoch"]
    ]
    for figure in figures:
        model, side = figure["model"], str(figure["model"]["image_shape"][0])
        for mode, seconds in figure["step_seconds"].items():
            costs = ["", "", ""]
            if mode != "off":
                of_epoch = f"{figure['epoch_overhead_percent'][mode]:+.1f} %"
                costs = [*_told(figure["step_overhead"][mode]), of_epoch]
            rows.append([model["name"], side, model["dtype"], mode, f"{1000 * seconds['median']:.2f}",
                         f"{figure['examples_per_second'][mode]:,.0f}", *costs])  # fmt: skip
        if figure["scan"]:
            spent = figure["scan"]["scan_seconds"]["median"]
            rows.append([model["name"], side, model["dtype"], "off, scanned",
                         f"{1000 * spent / figure['steps_per_epoch']:.2f}", f"{figure['examples'] / spent:,.0f}",
                         *_told(figure["scan"]["overhead"]), ""])  # fmt: skip
    return rows


def _told(cost: Mapping[str, Any]) -> list[str]:
    low, high = cost["interval"]
    return [f"{cost['percent']:+.2f} %", f"{low:+.2f} to {high:+.2f}"]


def buffer_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: sizes, memory against the arithmetic, seconds of each part."""
    (figure,) = figures
    seconds, rss, held = figure["seconds"], figure["peak_rss_bytes"], figure["bytes_per_device"]
    low, high = min(held["measured"]), max(held["measured"])
    temporary = figure["write_temporary_bytes"]
    rows = [["part", "measured"]]
    rows += [[name, f"{dtype} {shape}"] for name, (shape, dtype) in figure["layout"].items()]
    rows += [
        ["devices", str(figure["devices"])],
        ["bytes on each device", f"{low:,}" if low == high else f"{low:,} to {high:,}"],
        ["bytes expected", f"{held['expected']:,}"],
        [f"bytes beside it to write {figure['batch_size']} ids", "unknown" if temporary is None else f"{temporary:,}"],
    ]
    rows += [[f"peak RSS, {when}", f"{value / 2**20:,.0f} MiB"] for when, value in rss.items()]
    rows += [
        ["allocate", f"{seconds['allocate']:.3f} s"],
        [f"write {figure['batch_size']} ids (median)", f"{1000 * seconds['write_batch']['median']:.3f} ms"],
        ["write an epoch in such batches", f"{seconds['write_epoch']:.2f} s"],
        ["read a column (median)", f"{seconds['read_column']['median']:.3f} s"],
        [f"score, P = {figure['probes']}, k = {figure['k']} (median)", f"{seconds['score']['median']:.2f} s"],
        ["rows scored a second", f"{figure['rows_per_second']:,.0f}"],
    ]
    return rows


def input_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per form kB an image, and images a second of a core and of the stream."""
    rows = [["stored as", "images", "px", "kB/image", "per core-second", "and cropped there", "streamed/s"]]
    for figure in figures:
        rates = figure["images_per_core_second"]
        rows.append([figure["form"], f"{figure['images']:,}", str(figure["image_size"]),
                     f"{figure['bytes_per_image'] / 1000:.1f}", f"{rates['read']:,.0f}",
                     f"{rates['read_and_cropped']:,.0f}", f"{figure['streamed_per_second']:,.0f}"])  # fmt: skip
    return rows


def scorer_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per N, dtype and method seconds, rates, memory and errors."""
    rows = [["N", "method", "dtype", "seconds", "vs numba", "examples/s", "GB/s", "GFLOP/s", "MiB", "error", "offset"]]
    ours = {(figure["examples"], figure["dtype"]): figure["seconds"]["median"] for figure in figures
            if figure["method"] == "numba"}  # fmt: skip
    for figure in figures:
        seconds, base = figure["seconds"]["median"], ours.get((figure["examples"], figure["dtype"]))
        rows.append([f"{figure['examples']:,}", figure["method"], figure["dtype"], f"{seconds:.4f}",
                     f"{seconds / base:.1f}" if base else "", f"{figure['examples_per_second']:,.0f}",
                     f"{figure['bytes_per_second'] / 1e9:.2f}", f"{figure['flops_per_second'] / 1e9:.1f}",
                     f"{figure['memory_bytes'] / 2**20:.0f}", f"{figure['error']:.0e}",
                     f"{figure['offset_error']:.0e}"])  # fmt: skip
    limits = figures[0]["limits"]
    rows.append(["", "limit: copy, matmul", "float32", "", "", "", f"{limits['copy_bytes_per_second'] / 1e9:.2f}",
                 f"{limits['matmul_flops_per_second'] / 1e9:.1f}", "", "", ""])  # fmt: skip
    return rows


def detectors_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per detector seconds, AUROC, and what storing float16 in place of float32 changes."""
    rows = [["detector", "examples", "seconds", "examples/s", "AUROC", "as float16", "rank corr.", "removed, changed"]]
    for figure in figures:
        half = figure["float16"]
        auroc = ["" if found is None or found["auroc"] is None else f"{found['auroc']:.4f}" for found in (figure, half)]
        changes = [f"{half['rank_correlation']:.7f}", f"{100 * half['removed_changed']:.3f} %"] if half else ["", ""]
        rows.append([figure["detector"], f"{figure['examples']:,}", f"{figure['seconds']['median']:.4f}",
                     f"{figure['examples_per_second']:,.0f}", *auroc, *changes])  # fmt: skip
    return rows


def store_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per store its size, seconds per phase, and the peak of anonymous memory."""
    rows = [["N", "T", "dtype", "stored", "distances", "clusters", "all", "examples/s", "anonymous memory"]]
    for figure in figures:
        seconds, clusters = figure["seconds"], figure["seconds"].get("clusters")
        rows.append([f"{figure['examples']:,}", str(figure["epochs"]), figure["dtype"],
                     f"{figure['stored_bytes'] / 1e9:.2f} GB", f"{seconds['distances']:.2f} s",
                     "" if clusters is None else f"{clusters:.2f} s",
                     f"{seconds['all']:.2f} s", f"{figure['examples_per_second']:,.0f}",
                     f"{figure['anonymous_bytes'] / 2**20:,.0f} MiB"])  # fmt: skip
    return rows


def scan_table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows, one a regime: means over its seeds, and the range of what was found.

    "Found" is what the scan removes of the poison; the TPR are of its ranking. "Counted" are attacks, certain ones of
    all; "missed" and "added" classes that were attacked and not called so, and the other way round, of all seeds; "in
    interval" says of how many seeds the scan's interval holds the poisoned share.
    """
    lost = list(next((figure["found_at"] for figure in figures if figure["attacks"]), {}))  # shares of the clean images
    rates = [f"TPR at {100 * float(share):g} %" for share in lost]
    rows = [["regime", "seeds", "poisoned", "found", "clean removed", *rates, "counted", "missed",
             "added", "in interval", "minutes"]]  # fmt: skip
    for regime in dict.fromkeys(figure["regime"] for figure in figures):
        of_regime = [figure for figure in figures if figure["regime"] == regime]
        poisoned = [figure for figure in of_regime if figure["attacks"]]
        held = sum(f["estimate"]["low"] <= f["poisoned_share"] <= f["estimate"]["high"] for f in of_regime)
        certain, attacks = (sum(f[key] for f in of_regime) for key in ("certain_attacks", "attacks"))
        missed, added = (sum(len(f[key]) for f in of_regime) for key in ("missed_classes", "added_classes"))
        rows.append([regime or "config", str(len(of_regime)), _mean(f["poisoned_share"] for f in of_regime),
                     _mean_and_range([f["found_share"] for f in poisoned]),
                     _mean((f["clean_removed_share"] for f in of_regime), 2),
                     *(_mean(f["found_at"][share] for f in poisoned) for share in lost),
                     f"{certain} of {attacks}", str(missed), str(added), f"{held} of {len(of_regime)}",
                     f"{statistics.fmean(f['seconds'] for f in of_regime) / 60:.0f}"])  # fmt: skip
    return rows


def _mean(shares: Iterable[float], digits: int = 1) -> str:
    values = list(shares)
    return f"{100 * statistics.fmean(values):.{digits}f} %" if values else ""


def _mean_and_range(shares: Sequence[float]) -> str:
    if len(shares) < 2:
        return _mean(shares)
    return f"{_mean(shares)} ({100 * min(shares):.0f} to {100 * max(shares):.0f})"
