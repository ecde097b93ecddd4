"""report.md of a run: the verdict in sentences, the tables, the plots, how it was made; from results.json alone."""

from collections.abc import Mapping
from typing import Any

from badloss_jax.report.tables import (
    as_markdown,
    attack_table,
    detection_table,
    epochs_recorded,
    has_recording,
    headline,
    mean_asr,
    percent,
    recorded_part,
    removal_table,
    trained_alone,
    trained_models,
    variant_title,
)

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
    detection = detection_table(results)

    # The plots exist where an attack was simulated and something scored: a table has more than its header then.
    roc = ""
    trajectories = ""
    if results["attacks"] and len(detection) > 1:
        roc = _ROC
        if has_recording(results):
            trajectories = _TRAJECTORIES

    kept = ""
    if results["epochs_kept"]:
        kept = f" Epochs scored: {len(results['epochs_kept'])} of {epochs_recorded(results)}."
    if recorded_part(results):
        kept += f" {recorded_part(results)}"
    seconds = [[phase, f"{spent:.1f}"] for phase, spent in results["seconds"].items()]
    return _REPORT.format(
        models=_models(results),
        detection=as_markdown(detection),
        removal=as_markdown(removal_table(results)),
        roc=roc,
        trajectories=trajectories,
        source=config["data"]["source"],
        seed=config["seed"],
        config_hash=results["config_hash"],
        devices=", ".join(results["environment"]["devices"]),
        kept=kept,
        seconds=as_markdown([["phase", "seconds"], *seconds]),
    )


def _models(results: Mapping[str, Any]) -> str:
    """Renders what the trained networks do; nothing where none was trained to be shown."""
    if not trained_models(results):
        return ""

    attacks = ""
    if results["attacks"]:
        attacks = f"{as_markdown(attack_table(results))}\n"
    cleansed = ""
    alone = trained_alone(results)
    if alone:
        cleansed = f"; {', '.join(alone)} removed nothing, and trained a network in its own way"
    return _MODELS.format(
        verdict=verdict(results),
        attacks=attacks,
        headline=as_markdown(headline(results)),
        cleansed=cleansed,
    )


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

    size = results["num_examples"]
    poisoned = sum(attack["examples"] for attack in attacks.values())
    noun = "attacks" if len(attacks) > 1 else "attack"
    sentences = [
        f"{len(attacks)} {noun} poisoned {poisoned:,} of {size:,} training images ({percent(poisoned / size)})."
    ]

    if "undefended" in results:
        undefended = results["undefended"]
        sentences.append(
            f"Undefended, {percent(mean_asr(undefended))} of the triggered test images are classified as the attacker"
            f" wants; clean accuracy is {percent(undefended['clean_accuracy'])}."
        )

    named = results["config"]["retraining"]["variants"]
    trained = [name for name in named if "retrained" in results["variants"].get(name, {})]
    for name in dict.fromkeys([*trained[:1], *trained[-1:]]):  # a single one, if both are the same
        title = variant_title(name, results["config"])
        sentences.append(f"Removing by {title} and retraining {_outcome(results['variants'][name]['retrained'])}")

    for name in trained_alone(results):
        model = results["variants"][name]["retrained"]
        sentences.append(f"The network that {name} trained itself {_outcome(model)}")
    return " ".join(sentences)


def _outcome(model: Mapping[str, Any]) -> str:
    """Ends a sentence with what a defence leaves of the attacks, and what it costs."""
    return f"leaves {percent(mean_asr(model))}, at a clean accuracy of {percent(model['clean_accuracy'])}."
