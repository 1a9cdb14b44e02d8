"""`python -m robustscale.finetune RUN [RECIPE] [options]`: goes on from trained weights, on other data or another
objective."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from robustscale import cli, recipes
from robustscale.cli import door
from robustscale.config import unknown
from robustscale.engine.folder import RunFolder
from robustscale.engine.remote import joined, name_in
from robustscale.engine.start import START, model_of, tuned
from robustscale.fields import require
from robustscale.run import Run
from robustscale.untrusted import expanded, is_there

PROG = "python -m robustscale.finetune RUN [RECIPE]"
DESCRIPTION = """\
Trains on from the weights of RUN: a run of pretrain or finetune (its folder, URL or name), or a file of weights, which
may be a run's weights/epoch-0007.safetensors, what export wrote as safetensors, or a .pth file with a plain state_dict,
torchvision's included. RECIPE and options are pretrain's, and say all about the new run but three things, which are
RUN's unless options say otherwise:

  the network          (--model NAME for another)
  the normalisation    RUN's mean and std, which its weights expect (--data.mean dataset --data.std dataset for those of
                       the new data). A plain state_dict does not say; torchvision's weights expect
                       --data.mean 0.485 0.456 0.406 --data.std 0.229 0.224 0.225
  the last layer       where the classes have the same names in the same order; else it is drawn anew
                       (--transfer.head new or keep)

A tuning usually has a lower rate and fewer epochs than its recipe, and a rate that stays. 5 epochs at 0.001 after
downsampled ImageNet; the best of the MIT thesis (2019), 100 after CINIC-10 by TRADES 5; and a quick one on digits:

  python -m robustscale.finetune imagenet32 cifar10_pgd_at --epochs 5 --optimizer.lr 0.001 --schedule constant
  python -m robustscale.finetune cinic10_trades cifar10_adversarial_regularization --objective trades \\
      --objective.beta 5 --objective.attack.step-size 0.007 --optimizer.lr 0.001 --schedule constant
  python -m robustscale.finetune digits --objective trades --epochs 5 --optimizer.lr 0.001

Where the images are few, less can be trained. A stage is the stem, a block or the head; stages counts from the stem:

  python -m robustscale.finetune RUN RECIPE --stages                       what the stages are, and their rates
  python -m robustscale.finetune RUN RECIPE --transfer.frozen 9            of ResNet-18: the head alone is trained
  python -m robustscale.finetune RUN RECIPE --transfer.layer-decay 0.75    the nearer to the stem, the slower
  python -m robustscale.finetune RUN RECIPE --checkpoints.snapshots 1      keeps every epoch, for what is forgotten:
                                                                           python -m robustscale.forgetting

Before the first step the images that RUN was trained on, and those held out that chose its weights, are compared with
the test set of the new run; if some are in it, nothing is trained, and leaks.png in the new run's folder shows them.
Where RUN's prepared file is gone it is prepared anew from its source.

  --weights NAME    which of RUN's: best, last or epoch-0007 (default: those that it reports)
  --leaks ignore    tune all the same
  --run-name NAME   the new run's folder (default: the recipe's name, then -from- and RUN's); the same command goes on
                    from its last checkpoint. Where RUN is gone: python -m robustscale.pretrain --resume NAME
  --config FILE, --threat NAME, --storage PLACE, --print-config, --plan, --price EUR, --plan-seconds S
                    as of pretrain

Recipes:
{recipes}

Every field below can be set. A part that has alternatives is exchanged by its name (--objective trades):
{choices}
"""


def main() -> int:
    args = sys.argv[1:]
    description = DESCRIPTION.format(recipes=cli.recipe_list(), choices=cli.choices())
    if not args or args[0] in ("--help", "-h"):
        cli.parse_run(["--help"], PROG, description, recipes.get("digits"))
    storage = cli.storage(args)
    flags = {name: cli.take_flag(args, f"--{name}") for name in ("print-config", "stages")}
    asked, leaks = cli.take_plan(args), cli.take_option(args, "--leaks", "refuse")
    if leaks not in ("refuse", "ignore"):
        raise unknown("leaks", leaks, ("refuse", "ignore"))
    weights, name = _weights(args.pop(0), cli.take_option(args, "--weights"))
    run = cli.parse_run(args, PROG, description, _base(args, weights, name), ("--leaks", "--weights", "--stages"))
    if flags["print-config"]:
        print(cli.as_yaml(run), end="")
        return 0
    if flags["stages"]:
        return _show_stages(run)
    folder = RunFolder(joined(storage, run.name))
    if asked is not None:
        from cluster.planning import plan

        folder.pull()
        plan(run, folder, asked)
        return 0
    from cluster.training import train_and_show

    return train_and_show(run, folder, leaks)  # type: ignore[arg-type]  # it is one of both


def _weights(source: str, which: str | None) -> tuple[Path, str]:
    """The file, and a name for what it is of."""
    require(not source.startswith("-"), f"RUN: {source!r} is an option; name the run to go on from first")
    file = expanded(source)
    if is_there(file) and file.is_file():
        require(which is None, f"weights: {which!r} of a file of weights; leave it out, or give a run")
        of_run = file.parent.name == "weights"
        return file.absolute(), f"{file.absolute().parent.parent.name}-{file.stem}" if of_run else file.stem
    folder = cli.existing_run(source)
    path = folder.weights_path(which or folder.reported_weights())
    # But for what it started from itself, which is of other classes and other images.
    there = sorted({entry.stem for entry in path.parent.glob("*.safetensors")} - {START})
    if path.stem not in there:
        raise unknown("weights", path.stem, there)
    return path, name_in(folder.where)


def _base(args: list[str], weights: Path, name: str) -> Run:
    """What options are applied to; takes the recipe, or --config, off the arguments."""
    config = cli.take_option(args, "--config")
    if config is not None:
        base = cli.read_file(expanded(config))
    else:
        base = recipes.get(args.pop(0) if args and not args[0].startswith("-") else "digits")
        base = dataclasses.replace(base, name=re.sub(r"[^A-Za-z0-9._-]", "-", f"{base.name}-from-{name}")[:64])
    if config is not None:
        return tuned(base, weights)
    base = dataclasses.replace(base, model=model_of(weights) or base.model)
    # A recipe's normalisation is for weights that are drawn.
    found = tuned(
        dataclasses.replace(base, data=dataclasses.replace(base.data, mean="dataset", std="dataset")), weights
    )
    return tuned(base, weights) if found.data.mean == "dataset" else found


def _show_stages(run: Run) -> int:
    from data_loaders.splits import Splits
    from data_loaders.write import ensure
    from robustscale.models.network import shapes
    from robustscale.models.stages import stages
    from robustscale.run import require_fit

    spec = Splits.of(run, *ensure(run.data)).spec(run)
    network = shapes(run.model, spec)
    row, transfer = stages(network), run.transfer
    require_fit(run, spec)
    transfer.require_stages(len(row))
    for number, stage in enumerate(row):
        rate = "frozen" if number < transfer.frozen else f"{transfer.layer_decay ** (len(row) - 1 - number):.3g} lr"
        print(f"{number:>4}  {rate:<10}  {', '.join(stage)}")
    return 0


if __name__ == "__main__":
    door(main, "interrupted; the same command goes on from the last checkpoint")
