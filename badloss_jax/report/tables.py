"""The headline tables, from results.json alone: one for the terminal, the same and more in report.md."""

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
    attacks = list(next(iter(models.values()))["attack_success_rate"]) if models else _attack_names(results)
    rows = [["model", "removed", "clean lost", "CA", "mean ASR", *attacks]]
    return rows + [_model_row(name, results["variants"].get(name), model, attacks) for name, model in models.items()]


def trained_models(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the figures of each trained network: of the undefended one, if that was shown, then of the variants'."""
    undefended = {"undefended": results["undefended"]} if "undefended" in results else {}
    variants = results["variants"].items()
    return undefended | {name: variant["retrained"] for name, variant in variants if "retrained" in variant}


def short_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows for a terminal: the trained models, the AUROC of their kind, their worst attack."""
    rows = [["model", "removed", "clean lost", "AUROC", "CA", "mean ASR", "worst attack"]]
    for name, removed, lost, accuracy, mean, *_ in headline(results)[1:]:
        variant, model = results["variants"].get(name, {}), trained_models(results)[name]
        auroc = _number(variant["detection"]["auroc"]["overall"]) if "detection" in variant else ""
        worst = max(model["attack_success_rate"].items(), key=lambda item: item[1], default=None)
        told = f"{worst[0]} {100 * worst[1]:.0f} %" if worst else ""
        rows.append([name, removed, lost, auroc, accuracy, mean, told])
    return rows


def detection_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per kind and defence AUROC, average precision, TPR at 1 % FPR, AUROC per attack."""
    attacks = _attack_names(results)
    rows = [["scored by", "AUROC", "avg. precision", "TPR at 1 % FPR", *attacks]]
    for name, variant in results["variants"].items():
        kind = name.partition("/")[0]
        if "detection" not in variant or any(row[0] == kind for row in rows):
            continue  # every rule of a kind stands on the same ranks
        auroc = variant["detection"]["auroc"]
        cells = [variant["detection"][metric]["overall"] for metric in ("auroc", "average_precision", "tpr_at_1_fpr")]
        rows.append([kind, *(_number(cell) for cell in cells), *(_number(auroc.get(attack)) for attack in attacks)])
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
        rows.append([name, *(_percent(share) for share in shares)])
    return rows


def threshold_table(scoring: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows of a scoring.json: per kind and rule the threshold, and how many it removes."""
    rows = [["scored by", "k", "left out", "removed", "of all", "threshold"]]
    for kind, found in scoring["kinds"].items():
        for rule, cut in found["rules"].items():
            threshold = "in an attack"
            if cut["distance"] is not None:
                threshold = f"distance {cut['distance']:.6g}"
            elif cut["p_value"] is not None:
                threshold = f"p <= {cut['p_value']:.4g}" if cut["p_value"] else "none: no p-value is small enough"
            removed = f"{cut['removed']:,}", _percent(cut["removed"] / scoring["num_examples"])
            rows.append(
                [f"{kind}/{rule}", ",".join(map(str, found["k"])), f"{found['excluded']:,}", *removed, threshold]
            )
    return rows


def summary(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows over the results.json of several seeds: per trained model mean +- standard deviation.

    The deviation is the sample's (n - 1), and is left out for one seed. Recall, the share of the poison that was
    removed, is a mean over attacks; the rates per attack are means over seeds.

    Raises:
      UsageError: the runs differ in more than their seed, or two have the same.
    """
    for run in runs[1:]:
        changed = differences(run["config"], runs[0]["config"])
        if changed.keys() != {"seed"}:
            told = "; ".join(f"{key}: {change}" for key, change in changed.items() if key != "seed")
            raise UsageError(f"the runs must differ in their seed alone, and these differ in {told or 'nothing'}")
    if len({run["config"]["seed"] for run in runs}) < len(runs):
        raise UsageError(f"two runs have the same seed: {', '.join(str(run['config']['seed']) for run in runs)}")
    attacks = list(runs[0]["undefended"]["attack_success_rate"])
    rows = [["model", "removed", "clean lost", "AUROC", "recall", "CA", "mean ASR", *attacks]]
    trained = [name for name, variant in runs[0]["variants"].items() if "retrained" in variant]
    for name in ("undefended", *trained):
        variants = [{"retrained": run["undefended"]} if name == "undefended" else run["variants"][name] for run in runs]
        models = [variant["retrained"] for variant in variants]
        aurocs = [variant["detection"]["auroc"]["overall"] for variant in variants if "detection" in variant]
        aurocs = [auroc for auroc in aurocs if auroc is not None]
        rates = [model["attack_success_rate"] for model in models]
        rows.append([
            name,
            _spread([100 * variant.get("removed_share", 0) for variant in variants], 1),
            _spread([100 * variant.get("clean_removed_share", 0) for variant in variants], 1),
            _spread(aurocs, 3),
            _spread([100 * _mean(variant["recall"]) for variant in variants if variant.get("recall")], 1),
            _spread([100 * model["clean_accuracy"] for model in models], 1),
            _spread([100 * _mean_asr(model) for model in models], 1),
            *(f"{100 * statistics.fmean(rate[attack] for rate in rates):.1f}" for attack in attacks),
        ])  # fmt: skip
    return rows


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    deviation = f"{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean} ± {deviation}" if deviation.strip("0.") else mean


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

{attacks}
## Models

{headline}

CA: clean accuracy. ASR: attack success rate, per attack and in the mean. All models are trained from scratch by the
same recipe; they differ in what was removed{cleansed}. What is left after `oracle`, which removes exactly
the poison, is the trigger's own doing.

"""

_ROC = """
![ROC per attack](roc.png)

"""

_TRAJECTORIES = """
## Trajectories

![Loss over the epochs](trajectories.png)

"""

_REPORT = """\
# BaDLoss report

{models}## Detection

AUROC overall and per attack, before any threshold; probes are left out.

{detection}
{roc}## Removal

What each rule removes: of all examples, of the clean ones, and of each attack's.

{removal}
{trajectories}## Run

{source}, seed {seed}, config {config_hash}, {devices}.{kept}

{seconds}
"""


def report_markdown(results: Mapping[str, Any]) -> str:
    """Renders report.md: the verdict, the tables, the plots, how it was made."""
    config = results["config"]
    attacked, models, detection = bool(results["attacks"]), "", detection_table(results)
    if trained_models(results):
        alone = trained_alone(results)
        models = _MODELS.format(
            verdict=verdict(results), headline=as_markdown(headline(results)),
            cleansed=f"; {', '.join(alone)} removed nothing, and trained a network in its own way" if alone else "",
            attacks=f"{as_markdown(attack_table(results))}\n" if attacked else "",
        )  # fmt: skip
    seconds = [[phase, f"{spent:.1f}"] for phase, spent in results["seconds"].items()]
    kept, epochs = len(results["epochs_kept"]), config["recording"]["epochs"]
    recorded = "recording" in results["seconds"] or "rescored_from" in results
    return _REPORT.format(
        models=models,
        detection=as_markdown(detection),
        removal=as_markdown(removal_table(results)),
        roc=_ROC if attacked and len(detection) > 1 else "",
        trajectories=_TRAJECTORIES if attacked and recorded and len(detection) > 1 else "",
        source=config["data"]["source"],
        seed=config["seed"],
        config_hash=results["config_hash"],
        devices=", ".join(results["environment"]["devices"]),
        kept=f" Epochs scored: {kept} of {epochs}." if kept else "",
        seconds=as_markdown([["phase", "seconds"], *seconds]),
    )


def trained_alone(results: Mapping[str, Any]) -> list[str]:
    """Names the defences that trained a network themselves, and removed nothing."""
    return [name for name, variant in results["variants"].items() if "recall" not in variant]


def verdict(results: Mapping[str, Any]) -> str:
    """Says in three sentences what the attacks did, and what the first and the last defence of the config leave.

    Which ones are told was settled before the run, by the order of `retraining.variants`: no winner is picked. Defences
    that trained a network themselves are told, too.
    """
    attacks = results["attacks"]
    if not attacks:
        return (
            "No attack was simulated, so there is nothing to detect and nothing to measure: what the rules removed is"
            " clean data, as far as anybody knows. This is no scan of the training set."
        )
    poisoned, size = sum(attack["examples"] for attack in attacks.values()), results["num_examples"]
    several = "attacks" if len(attacks) > 1 else "attack"
    told = [
        f"{len(attacks)} {several} poisoned {poisoned:,} of {size:,} training images ({_percent(poisoned / size)})."
    ]
    if "undefended" in results:
        undefended = results["undefended"]
        told.append(
            f"Undefended, {_percent(_mean_asr(undefended))} of the triggered test images are classified as the attacker"
            f" wants; clean accuracy is {_percent(undefended['clean_accuracy'])}."
        )
    named = results["config"]["retraining"]["variants"]
    trained = [name for name in named if "retrained" in results["variants"].get(name, {})]
    for name in dict.fromkeys([*trained[:1], *trained[-1:]]):
        model, title = results["variants"][name]["retrained"], variant_title(name, results["config"])
        told.append(
            f"Removing by {title} and retraining leaves {_percent(_mean_asr(model))}, at a clean accuracy of"
            f" {_percent(model['clean_accuracy'])}."
        )
    for name in trained_alone(results):
        model = results["variants"][name]["retrained"]
        told.append(
            f"The network that {name} trained itself leaves {_percent(_mean_asr(model))}, at a clean accuracy of"
            f" {_percent(model['clean_accuracy'])}."
        )
    return " ".join(told)


def variant_title(name: str, config: Mapping[str, Any]) -> str:
    """Says a variant's name in words: "combined/fraction@0.1" is "combined (10 %)"."""
    kind, _, text = name.partition("/")
    if not text:
        return {"oracle": "oracle (exactly the poison)"}.get(kind, kind)
    if text == OWN:
        return f"{kind} (its own rule)"
    rule, level = parse_rule(text, config["rejection"])
    titles = {
        "clusters": "clusters",
        "fraction": f"{100 * level:g} %",
        "alpha": f"p ≤ {level:g}",
        "fdr": f"false discovery rate {level:g}",
    }
    return f"{kind} ({titles[rule]})"


def attack_table(results: Mapping[str, Any]) -> list[list[str]]:
    """Returns header and rows: per attack its target class, the images it poisons, whether it keeps their labels."""
    rows = [["attack", "target class", "images", "share", "labels"]]
    for name, attack in results["attacks"].items():
        share = _percent(attack["examples"] / results["num_examples"])
        labels = "kept" if attack["clean_label"] else "changed"
        rows.append([name, attack["target_name"], f"{attack['examples']:,}", share, labels])
    return rows


def _model_row(name: str, variant: Mapping[str, Any] | None, model: Mapping[str, Any], attacks: list[str]) -> list[str]:
    shares = [variant["removed_share"], variant["clean_removed_share"]] if variant else [0.0, 0.0]
    measured = [model["clean_accuracy"], _mean_asr(model), *(model["attack_success_rate"][a] for a in attacks)]
    return [name, *(_percent(share) for share in shares + measured)]


def _attack_names(results: Mapping[str, Any]) -> list[str]:
    """Returns the attacks in the order of the manifest."""
    return list(results["attacks"])


def _mean_asr(model: Mapping[str, Any]) -> float:
    return _mean(model["attack_success_rate"])


def _mean(per_attack: Mapping[str, float]) -> float:
    return statistics.fmean(per_attack.values()) if per_attack else 0.0


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _escape(text: str) -> str:
    """Leaves nothing that Markdown would turn into HTML, a link or a picture."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return re.sub(r"[\\|\[\]!`]", r"\\\g<0>", text)


def cluster_table(results: Mapping[str, Any], most: int = 20) -> list[list[str]]:
    """Returns what a scan says of the attacks that it found, the most certain first, at most so many."""
    rows = [["attack", "class", "images", "of the class", "certainty", "p-value"]]
    images = {entry["name"]: entry["images"] for entry in results["classes"]}
    for number, entry in enumerate(results["attacks"][:most], start=1):
        rows.append([str(number), entry["class"], f"{entry['images']:,}",
                     f"{100 * entry['images'] / max(images[entry['class']], 1):.0f} %",
                     "certain" if entry["certain"] else "possible", f"{entry['p_value']:.1g}"])  # fmt: skip
    if len(results["attacks"]) > most:
        rows.append(["...", f"{len(results['attacks']) - most} more in the report", "", "", "", ""])
    return rows
