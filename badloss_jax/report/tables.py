"""The tables of a run, from results.json alone: some for the terminal, the same and more in report.md.

A table is its header and rows, of cells that are texts.
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from badloss_jax.config import differences
from badloss_jax.core.errors import UsageError
from badloss_jax.defenses.context import OWN
from badloss_jax.settings import parse_rule


def headline(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per trained model what was removed, clean accuracy and attack success rates."""
    models = trained_models(results)
    attacks = _attack_names(results)
    if models:
        attacks = list(next(iter(models.values()))["attack_success_rate"])

    rows = [["model", "removed", "clean lost", "CA", "mean ASR", *attacks]]
    for name, model in models.items():
        variant = results["variants"].get(name)
        shares = [0.0, 0.0]  # of the undefended network, which is no variant
        if variant:
            shares = [variant["removed_share"], variant["clean_removed_share"]]
        rates = [model["attack_success_rate"][attack] for attack in attacks]
        figures = [*shares, model["clean_accuracy"], mean_asr(model), *rates]
        rows.append([name, *(percent(figure) for figure in figures)])
    return rows


def trained_models(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the figures of each trained network: of the undefended one, if that was shown, then of the variants'."""
    models = {}
    if "undefended" in results:
        models["undefended"] = results["undefended"]
    for name, variant in results["variants"].items():
        if "retrained" in variant:
            models[name] = variant["retrained"]
    return models


def trained_alone(results: Mapping[str, Any]) -> list[str]:
    """Names the defences that trained a network themselves, and removed nothing."""
    return [name for name, variant in results["variants"].items() if "recall" not in variant]


def has_recording(results: Mapping[str, Any]) -> bool:
    """Whether the run, or the one that was scored again, recorded trajectories."""
    return "recording" in results["seconds"] or "rescored_from" in results


def epochs_recorded(results: Mapping[str, Any]) -> int:
    """Counts the epochs whose trajectories were there to be scored."""
    return results.get("epochs_recorded", results["config"]["recording"]["epochs"])


def recorded_part(results: Mapping[str, Any]) -> str:
    """Says how much of a recording was scored that was not at its end; nothing of a whole one."""
    recorded = epochs_recorded(results)
    planned = results["config"]["recording"]["epochs"]
    if recorded == planned:
        return ""
    return f"The recording was not at its end: {recorded} of {planned} epochs were recorded."


def short_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows for a terminal: the trained models, the AUROC of their kind, their worst attack."""
    models = trained_models(results)
    rows = [["model", "removed", "clean lost", "AUROC", "CA", "mean ASR", "worst attack"]]
    for name, removed, lost, accuracy, mean, *_ in headline(results)[1:]:
        variant = results["variants"].get(name, {})
        auroc = ""
        if "detection" in variant:
            auroc = _number(variant["detection"]["auroc"]["overall"])

        worst = ""
        rates = models[name]["attack_success_rate"]
        if rates:
            attack, rate = max(rates.items(), key=lambda item: item[1])
            worst = f"{attack} {100 * rate:.0f} %"
        rows.append([name, removed, lost, auroc, accuracy, mean, worst])
    return rows


def detection_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per kind and defence AUROC, average precision, TPR at 1 % FPR, AUROC per attack."""
    attacks = _attack_names(results)
    rows = [["scored by", "AUROC", "avg. precision", "TPR at 1 % FPR", *attacks]]
    for name, variant in results["variants"].items():
        kind = name.partition("/")[0]
        # Every rule of a kind stands on the same ranks.
        if "detection" not in variant or any(row[0] == kind for row in rows):
            continue

        metrics = variant["detection"]
        overall = [metrics[metric]["overall"] for metric in ("auroc", "average_precision", "tpr_at_1_fpr")]
        per_attack = [metrics["auroc"].get(attack) for attack in attacks]
        rows.append([kind, *(_number(figure) for figure in [*overall, *per_attack])])
    return rows


def removal_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per kind, or defence, and rule the shares removed and the recall of each attack."""
    attacks = _attack_names(results)
    rows = [["variant", "removed", "clean lost", *attacks]]
    for name, variant in results["variants"].items():
        if "recall" not in variant:
            continue  # a defence that trained a network itself, and removed nothing
        recall = [variant["recall"][attack] for attack in attacks]
        shares = [variant["removed_share"], variant["clean_removed_share"], *recall]
        rows.append([name, *(percent(share) for share in shares)])
    return rows


def threshold_table(scoring: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows of a scoring.json: per kind and rule the threshold, and how many it removes."""
    rows = [["scored by", "k", "left out", "removed", "of all", "threshold"]]
    for kind, entry in scoring["kinds"].items():
        neighbours = ",".join(str(k) for k in entry["k"])
        excluded = f"{entry['excluded']:,}"
        for rule, cut in entry["rules"].items():
            removed = f"{cut['removed']:,}"
            share = percent(cut["removed"] / scoring["num_examples"])
            rows.append([f"{kind}/{rule}", neighbours, excluded, removed, share, _threshold(cut)])
    return rows


def _threshold(cut: Mapping[str, Any]) -> str:
    """Says where a rule cuts: at a distance, at a p-value, or, as "clusters" does, along attacks."""
    if cut["distance"] is not None:
        return f"distance {cut['distance']:.6g}"
    if cut["p_value"] is None:
        return "in an attack"
    if not cut["p_value"]:
        return "none: no p-value is small enough"
    return f"p <= {cut['p_value']:.4g}"


def attack_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per attack its target class, the images it poisons, whether it keeps their labels."""
    rows = [["attack", "target class", "images", "share", "labels"]]
    for name, attack in results["attacks"].items():
        share = percent(attack["examples"] / results["num_examples"])
        labels = "kept" if attack["clean_label"] else "changed"
        rows.append([name, attack["target_name"], f"{attack['examples']:,}", share, labels])
    return rows


def cluster_table(results: Mapping[str, Any], most: int = 20) -> list[list[str]]:
    """Returns what a scan says of the attacks that it found, the most certain first.

    Args:
      results: what scan.json holds.
      most: attacks, at most; a last row says how many more there are.

    Returns:
      Header and rows.
    """
    rows = [["attack", "class", "images", "of the class", "certainty", "p-value"]]
    class_sizes = {entry["name"]: entry["images"] for entry in results["classes"]}
    for number, entry in enumerate(results["attacks"][:most], start=1):
        share = 100 * entry["images"] / max(class_sizes[entry["class"]], 1)
        certainty = "certain" if entry["certain"] else "possible"
        images = f"{entry['images']:,}"
        rows.append([str(number), entry["class"], images, f"{share:.0f} %", certainty, f"{entry['p_value']:.1g}"])

    more = len(results["attacks"]) - most
    if more > 0:
        rows.append(["...", f"{more} more in the report", "", "", "", ""])
    return rows


def summary(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows over the results.json of several seeds: per trained model mean +- standard deviation.

    The deviation is the sample's (n - 1), and is left out for one seed. Recall, the share of the poison that was
    removed, is a mean over attacks; the rates per attack are means over seeds.

    Raises:
      UsageError: the runs differ in more than their seed, or two have the same.
    """
    _check_seeds_alone_differ(runs)

    # The runs agree in all but their seed, so that the first one names attacks and variants for all.
    attacks = list(runs[0]["undefended"]["attack_success_rate"])
    rows = [["model", "removed", "clean lost", "AUROC", "recall", "CA", "mean ASR", *attacks]]

    undefended = [{"retrained": run["undefended"]} for run in runs]
    rows.append(_summary_row("undefended", undefended, attacks))
    for name, variant in runs[0]["variants"].items():
        if "retrained" in variant:
            rows.append(_summary_row(name, [run["variants"][name] for run in runs], attacks))
    return rows


def _check_seeds_alone_differ(runs: Sequence[Mapping[str, Any]]) -> None:
    """Refuses runs whose mean would mean nothing."""
    for run in runs[1:]:
        changed = differences(run["config"], runs[0]["config"])
        if changed.keys() != {"seed"}:
            others = "; ".join(f"{key}: {change}" for key, change in changed.items() if key != "seed")
            raise UsageError(f"the runs must differ in their seed alone, and these differ in {others or 'nothing'}")

    seeds = [run["config"]["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"two runs have the same seed: {', '.join(str(seed) for seed in seeds)}")


def _summary_row(name: str, variants: Sequence[Mapping[str, Any]], attacks: Sequence[str]) -> list[str]:
    """Returns a row of `summary`, of one variant's entries, a seed each; what was not measured has an empty cell."""
    models = [variant["retrained"] for variant in variants]
    # Without any poison the AUROC is None; the undefended network and controls have no detection.
    aurocs = [variant["detection"]["auroc"]["overall"] for variant in variants if "detection" in variant]
    recalls = [100 * _mean(variant["recall"]) for variant in variants if variant.get("recall")]

    rates = []
    for attack in attacks:
        mean = statistics.fmean(model["attack_success_rate"][attack] for model in models)
        rates.append(f"{100 * mean:.1f}")
    return [
        name,
        mean_and_deviation([100 * variant.get("removed_share", 0) for variant in variants], 1),
        mean_and_deviation([100 * variant.get("clean_removed_share", 0) for variant in variants], 1),
        mean_and_deviation([auroc for auroc in aurocs if auroc is not None], 3),
        mean_and_deviation(recalls, 1),
        mean_and_deviation([100 * model["clean_accuracy"] for model in models], 1),
        mean_and_deviation([100 * mean_asr(model) for model in models], 1),
        *rates,
    ]


def mean_and_deviation(values: Sequence[float], digits: int, factor: int = 1) -> str:
    """Writes mean and sample standard deviation, which is left out if it is none or rounds to none.

    Args:
      values: of the seeds; none gives an empty text.
      digits: behind the point.
      factor: what both are multiplied by: 100 for shares in percent.

    Returns:
      "85.0 ± 7.1", or "85.0".
    """
    if not values:
        return ""

    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    # A deviation of 0.0 would claim more than one digit can show.
    deviation = f"{factor * statistics.stdev(values):.{digits}f}"
    if not deviation.strip("0."):
        return mean
    return f"{mean} ± {deviation}"


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Aligns columns for a terminal."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    lines = []
    for row in rows:
        # Figures stand to the right, names to the left.
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    header, *body = ("| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows)
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def _escape(text: str) -> str:
    """Leaves nothing that Markdown would turn into HTML, a link or a picture."""
    # Names of attacks and classes come from files of others.
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return re.sub(r"[\\|\[\]!`]", r"\\\g<0>", text)


def variant_title(name: str, config: Mapping[str, Any]) -> str:
    """Says a variant's name in words.

    Args:
      name: KIND/RULE, or a control's or defence's name: "combined/fraction@0.1".
      config: of the run, for levels that the rule does not name.

    Returns:
      The title: "combined (10 %)".
    """
    kind, _, rule_text = name.partition("/")
    if kind == "oracle" and not rule_text:
        return "oracle (exactly the poison)"
    if not rule_text:
        return kind
    if rule_text == OWN:
        return f"{kind} (its own rule)"

    rule, level = parse_rule(rule_text, config["rejection"])
    titles = {
        "clusters": "clusters",
        "fraction": f"{100 * level:g} %",
        "alpha": f"p ≤ {level:g}",
        "fdr": f"false discovery rate {level:g}",
    }
    return f"{kind} ({titles[rule]})"


def _attack_names(results: Mapping[str, Any]) -> list[str]:
    """Returns the attacks in the order of the manifest."""
    return list(results["attacks"])


def mean_asr(model: Mapping[str, Any]) -> float:
    """Returns the attack success rate in the mean over attacks; 0 without any."""
    return _mean(model["attack_success_rate"])


def _mean(per_attack: Mapping[str, float]) -> float:
    if not per_attack:
        return 0.0
    return statistics.fmean(per_attack.values())


def percent(share: float) -> str:
    """Writes a share of 1 in percent, with one digit behind the point."""
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}"
