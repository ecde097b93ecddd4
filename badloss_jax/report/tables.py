"""The headline tables, from results.json alone: one for the terminal, the same and more in report.md."""

from collections.abc import Mapping, Sequence
from typing import Any


def headline(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per trained model what was removed, clean accuracy and attack success rates."""
    attacks = list(results["undefended"]["attack_success_rate"])
    rows = [["model", "removed", "clean lost", "CA", "mean ASR", *attacks]]
    rows.append(_model_row("undefended", None, results["undefended"], attacks))
    for name, variant in results["variants"].items():
        if "retrained" in variant:
            rows.append(_model_row(name, variant, variant["retrained"], attacks))
    return rows


def detection_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per kind of trajectory AUROC, average precision, TPR at 1 % FPR, AUROC per attack."""
    rows: list[list[str]] = []
    for name, variant in results["variants"].items():
        kind, _, rule = name.partition("/")
        if "detection" not in variant or rule != "fraction":
            continue
        auroc = variant["detection"]["auroc"]
        attacks = [attack for attack in auroc if attack != "overall"]
        if not rows:
            rows.append(["trajectories", "AUROC", "avg. precision", "TPR at 1 % FPR", *attacks])
        cells = [variant["detection"][metric]["overall"] for metric in ("auroc", "average_precision", "tpr_at_1_fpr")]
        rows.append([kind, *(_number(cell) for cell in cells), *(_number(auroc[attack]) for attack in attacks)])
    return rows


def removal_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per kind and rule the shares removed and the recall of each attack."""
    rows: list[list[str]] = []
    for name, variant in results["variants"].items():
        if not rows:
            rows.append(["variant", "removed", "clean lost", *variant["recall"]])
        shares = [variant["removed_share"], variant["clean_removed_share"], *variant["recall"].values()]
        rows.append([name, *(_percent(share) for share in shares)])
    return rows


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    header, *body = ("| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows)
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


_MODELS = """\
{verdict}

## Models

{headline}

CA: clean accuracy. ASR: attack success rate, per attack and in the mean. All models are trained from scratch by the
same recipe; they differ in what was removed. What is left after `oracle`, which removes exactly the poison, is the
trigger's own doing.

"""

_REPORT = """\
# BaDLoss report

{models}## Detection

AUROC overall and per attack, before any threshold; probes are left out.

{detection}

![ROC per attack](roc.png)

## Removal

What each rule removes: of all examples, of the clean ones, and of each attack's.

{removal}

## Trajectories

![Loss over the epochs](trajectories.png)

## Run

{source}, seed {seed}, config {config_hash}, {devices}. Epochs scored: {kept} of {epochs}.

{seconds}
"""


def report_markdown(results: Mapping[str, Any]) -> str:
    """Renders report.md: the verdict, the tables, the plots, how it was made."""
    config = results["config"]
    models = ""
    if "undefended" in results:
        models = _MODELS.format(verdict=verdict(results), headline=as_markdown(headline(results)))
    seconds = [[phase, f"{spent:.1f}"] for phase, spent in results["seconds"].items()]
    return _REPORT.format(
        models=models,
        detection=as_markdown(detection_table(results)),
        removal=as_markdown(removal_table(results)),
        source=config["data"]["source"],
        seed=config["seed"],
        config_hash=results["config_hash"],
        devices=", ".join(results["environment"]["devices"]),
        kept=len(results["epochs_kept"]),
        epochs=config["recording"]["epochs"],
        seconds=as_markdown([["phase", "seconds"], *seconds]),
    )


def verdict(results: Mapping[str, Any]) -> str:
    """Says in a sentence or two what was found and what it was worth."""
    undefended = results["undefended"]
    retrained = {name: v for name, v in results["variants"].items() if "retrained" in v and "detection" in v}
    start = f"Undefended, the attacks succeed on {_percent(_mean_asr(undefended))} of the triggered test images"
    if not retrained:
        return f"{start} at a clean accuracy of {_percent(undefended['clean_accuracy'])}."
    name, best = min(retrained.items(), key=lambda item: _mean_asr(item[1]["retrained"]))
    cost = undefended["clean_accuracy"] - best["retrained"]["clean_accuracy"]
    return (
        f"{start}; after removing {_percent(best['removed_share'])} of the examples by {name} and retraining, on"
        f" {_percent(_mean_asr(best['retrained']))}. Clean accuracy {'falls' if cost >= 0 else 'rises'} by"
        f" {abs(100 * cost):.1f} points to {_percent(best['retrained']['clean_accuracy'])}."
    )


def _model_row(name: str, variant: Mapping[str, Any] | None, model: Mapping[str, Any], attacks: list[str]) -> list[str]:
    shares = [variant["removed_share"], variant["clean_removed_share"]] if variant else [0.0, 0.0]
    measured = [model["clean_accuracy"], _mean_asr(model), *(model["attack_success_rate"][a] for a in attacks)]
    return [name, *(_percent(share) for share in shares + measured)]


def _mean_asr(model: Mapping[str, Any]) -> float:
    rates = list(model["attack_success_rate"].values())
    return sum(rates) / len(rates) if rates else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
