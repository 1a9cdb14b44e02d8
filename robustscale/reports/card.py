"""The model card: what a network is, how it was made, what it withstands, and how to check that."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from robustscale.config import component_name
from robustscale.evaluation.words import Attacker, name_of, norm_of, pixels, threat_of, training_attack
from robustscale.models.transfer import Transfer
from robustscale.reports.figures import source_name
from robustscale.reports.plan import plan_columns, plan_notes, plan_rows
from robustscale.reports.progress import duration, percent
from robustscale.reports.tables import attacker_of, draws_note, figure_row, seen_note, setting_note
from robustscale.run import Run
from robustscale.threat import Threat


def model_card(
    run: Run,
    data: Mapping[str, Any],
    result: Mapping[str, Any],
    versions: Mapping[str, str],
    wall_seconds: float,
    path_of_run: str,
    plan: Mapping[str, Any] | None = None,
) -> str:
    """Markdown. `data`, `result` and `plan` are the JSON files of these names; commands in it name `path_of_run`."""
    objective, model = component_name(run.objective), component_name(run.model)
    size = "{height} x {width}, channels: {channels}".format(**data["spec"])
    sections = [
        f"# {run.name}",
        f"A `{model}` network that tells {len(data['classes'])} classes apart in images of {source_name(run)} "
        f"({size}), trained with the objective `{objective}` by robustscale {versions['robustscale']}.",
        _figures(run, result),
        _threat(run, result),
        _training(run),
        _data(data),
        _selection(run, data, result),
        _commands(path_of_run, result["weights"]),
        _limits(run, result),
        _machine(versions, wall_seconds, result),
        *([] if plan is None else [_plan(plan)]),
    ]
    return "\n\n".join(sections) + "\n"


def threat_sentence(threat: Threat) -> str:
    """What an adversary may do, for somebody who knows no norms."""
    if norm_of(threat) == "linf":
        return (
            f"The adversary may change every pixel value of an image by at most {pixels(threat.eps)} of its range "
            f"[0, 1] ({255 * threat.eps:.3g} of 255 grey levels)"
        )
    if norm_of(threat) == "l2":
        return (
            f"The adversary may change an image by at most {pixels(threat.eps)} in Euclidean length, over all its "
            "pixel values, each in [0, 1]"
        )
    return f"The adversary may change an image by at most {pixels(threat.eps)} in {norm_of(threat)}"


def _figures(run: Run, result: Mapping[str, Any]) -> str:
    rows = [
        figure_row("SA, standard accuracy: clean images", result, "sa"),
        figure_row(f"RA, robust accuracy: `{name_of(attacker_of(result))}`", result, "ra"),
    ]
    text = _table(("on the test set", "accuracy", "95 % interval (Wilson)"), rows)
    count = result["nonfinite"]
    broken = f" {count:,} images met values that are not finite; they count as wrong." if count else ""
    broken += "".join(f" {note}" for note in setting_note(run) + draws_note(result))
    return (
        f"## Figures\n\n{text}\n\n{result['n']:,} images, each judged once, in float32.{broken} RA counts an image if "
        "it is classified correctly both clean and attacked."
    )


def _threat(run: Run, result: Mapping[str, Any]) -> str:
    attacker = attacker_of(result)
    threat = threat_of(attacker.attack)
    lines = [
        f"{threat_sentence(threat)}; the image stays within [0, 1]. It knows the network and its weights, and attacks "
        "each image on its own.",
        f"- Evaluation attack: `{name_of(attacker)}`" + _details(attacker.attack),
        f"- Monitor on the held-out part: `{name_of(Attacker(run.evaluation.monitor, run.evaluation.goal))}`",
    ]
    return "## Threat model\n\n" + lines[0] + "\n\n" + "\n".join(lines[1:])


def _training(run: Run) -> str:
    attack = training_attack(run.objective)
    formula = (inspect.getdoc(type(run.objective)) or "").partition("\n\n")[0].replace("\n", " ")
    lines = [
        f"- Objective: `{component_name(run.objective)}`{_details(run.objective, ('attack', 'goal'))}. {formula}",
        f"- Training attack: `{name_of(Attacker(attack))}`{_details(attack)}" if attack else "- Training attack: none",
        f"- Network: `{component_name(run.model)}`{_details(run.model)}",
        *_start(run.transfer),
        f"- Optimizer: `{component_name(run.optimizer)}`{_details(run.optimizer)}; schedule: "
        f"`{component_name(run.schedule)}`{_details(run.schedule)}",
        f"- {run.epochs} epochs at most, batches of {run.batch_size} images over all workers, {run.precision}, "
        f"augmentation `{_augmentation(run)}`, reduction `{run.reduction}`",
        f"- Seed: {run.seed}",
    ]
    return "## Training\n\n" + "\n".join(lines)


def _start(transfer: Transfer) -> list[str]:
    """Nothing of drawn weights."""
    if transfer.weights is None:
        return []
    parts = [f"the first {transfer.frozen} stages frozen"] if transfer.frozen else []
    if transfer.layer_decay < 1:
        parts.append(f"each stage at {transfer.layer_decay:g} times the rate of the one above it")
    return [", ".join([f"- Started from `{transfer.weights}` (SHA-256 {transfer.sha256[:16]}...)", *parts])]


def _augmentation(run: Run) -> str:
    data, mix = run.data, run.mix
    parts: list[str] = [data.augmentation]
    parts += [f"rand_augment {data.rand_augment} at magnitude {data.magnitude}"] if data.rand_augment else []
    parts += [f"{name} {getattr(mix, name):g}" for name in ("mixup", "cutmix") if mix.on and getattr(mix, name)]
    parts += [f"sides {', '.join(map(str, data.progressive))}"] if data.progressive else []
    return "; ".join(parts)


def _data(data: Mapping[str, Any]) -> str:
    parts = [part for part in ("train", "unlabelled", "test") if part in data]
    rows = [(part, f"{data[part]['num_examples']:,}", f"`{data[part]['fingerprint']}`") for part in parts]
    names = ", ".join(str(name) for name in data["classes"][:20])
    more = f", and {len(data['classes']) - 20} more" if len(data["classes"]) > 20 else ""
    table = _table(("part", "images", "fingerprint (SHA-256)"), rows)
    seen = "".join(f"\n- {sentence}" for sentence in seen_note(data))
    heading = "\n\nWhether the weights it started from had seen images of the test set:\n" if seen else ""
    return f"## Data\n\n{table}\n\nClasses: {names}{more}.{heading}{seen}"


def _selection(run: Run, data: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    if not data["held_out"]:
        how = f"Nothing was held out; these are the `{result['weights']}` weights, of epoch {result['epoch']}."
    else:
        figures = [
            f"{n} {percent(result[k])}" for n, k in (("SA", "held_out_sa"), ("RA", "held_out_ra")) if k in result
        ]
        scored = f" ({', '.join(figures)} there)" if figures else ""
        chosen = "the epoch with the best held-out RA" if result["weights"] == "best" else "the last epoch"
        how = (
            f"{data['held_out']:,} training images were held out and never trained on. These are the "
            f"`{result['weights']}` weights: of {chosen}, epoch {result['epoch']} of {run.epochs}, "
            f"step {result['step']}{scored}."
        )
    left_out = data.get("train", {}).get("left_out", {}).get("num_examples", 0)
    if left_out:
        how += f" {left_out:,} training images were neither trained on nor held out (data.without, data.leaks)."
    if run.data.share < 1:
        how += f" Of the training part, {100 * run.data.share:.3g} % was trained on."
    return f"## Selection\n\n{how} The test set was read once, after training, and chose nothing."


def _commands(path: str, weights: str) -> str:
    where = shlex.quote(path)
    config = shlex.quote(f"{path}/run.json")
    return f"""## Use

```sh
python -m robustscale.evaluate {where}                  # more attacks, and RA over eps
python -m robustscale.export {where} --format onnx      # for use elsewhere; images in [0, 1] in, logits out
python -m robustscale.pretrain --resume {where}         # go on, if it was interrupted
python -m robustscale.pretrain --config {config} --run-name again   # train it anew
```

```python
from robustscale.engine.folder import RunFolder

network = RunFolder({path!r}).network({weights!r})  # images (N, C, H, W) in [0, 1] -> logits
```"""


def _limits(run: Run, result: Mapping[str, Any]) -> str:
    name = name_of(attacker_of(result))
    norm = norm_of(threat_of(attacker_of(result).attack))
    lines = [
        f"- RA is measured with `{name}`. It is an upper bound on the network's robustness: a stronger attack can only "
        "lower it. It is not AutoAttack's figure, nor a certificate.",
        f"- It holds for {norm} perturbations of this size alone; for other norms, larger radii, rotations, blur or "
        "another camera it says nothing.",
        "- The intervals are about the images drawn, not about another seed of training.",
    ]
    if result["weights"] == "last" and run.data.held_out == 0:
        lines.append("- Without a held-out part robust overfitting goes unseen (Rice et al. 2020).")
    return "## Limits\n\n" + "\n".join(lines)


def _machine(versions: Mapping[str, str], wall_seconds: float, result: Mapping[str, Any]) -> str:
    workers = f" on {result['workers']} workers" if "workers" in result else ""
    rows = [(name, version) for name, version in versions.items()]
    return f"## Cost and versions\n\nWall time {duration(wall_seconds)}{workers}.\n\n" + _table(
        ("what", "version"), rows
    )


def _plan(plan: Mapping[str, Any]) -> str:
    table = _table(plan_columns(plan), plan_rows(plan))
    return "## Plan and what it took\n\n" + table + "\n\n" + "\n".join(f"- {note}" for note in plan_notes(plan))


def _details(value: Any, told: Sequence[str] = ("threat",)) -> str:
    """` (field=value, ...)`: every plain field, defaults included: a card must not depend on what defaults become."""
    fields = [f for f in dataclasses.fields(value) if f.name not in told]
    words = [
        f"{f.name}={getattr(value, f.name)}" for f in fields if not dataclasses.is_dataclass(getattr(value, f.name))
    ]
    return f" ({', '.join(words)})" if words else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
