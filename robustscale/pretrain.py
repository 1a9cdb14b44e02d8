"""`python -m robustscale.pretrain [RECIPE] [options]`: adversarial training on a Ray cluster."""

from __future__ import annotations

import sys

from robustscale import cli, recipes
from robustscale.cli import door
from robustscale.engine.folder import RunFolder
from robustscale.engine.plan import Asked
from robustscale.engine.remote import joined
from robustscale.errors import InputError
from robustscale.run import Run

PROG = "python -m robustscale.pretrain [RECIPE]"
DESCRIPTION = """\
Adversarially trains an image classifier on a Ray cluster: the one it is in (a Ray job, or RAY_ADDRESS), else one that
it starts on this machine and shuts down again. Without a RECIPE: handwritten digits, two workers, about a minute.

  python -m robustscale.pretrain
  python -m robustscale.pretrain cifar10 --cluster.workers 8 --objective trades --objective.beta 6
  python -m robustscale.pretrain --config my.yaml --objective.attack.threat.eps 4/255 --print-config
  ray job submit --working-dir . -- python -m robustscale.pretrain cifar10

  --config FILE     YAML or JSON: a configuration as --print-config shows it, or `recipe: NAME` and what differs
  --run-name NAME   the run's folder; the same name goes on from its last checkpoint (default: the recipe's name)
  --resume [RUN]    go on with the run of this name, or with a run's folder; nothing to go on with is an error
  --threat NAME, --threat.eps EPS
                    the threat model of training, held-out and final attack alike (each has its own field, too)
  --storage PLACE   where runs are kept (default: $ROBUSTSCALE_STORAGE, ./runs, or ~/robustscale-runs inside a Ray job,
                    whose folder is temporary): a folder, which workers on other nodes must see too; or a URL that they
                    can reach, s3://bucket/runs, gs://bucket/runs, file:///mnt/runs or another that pyarrow or fsspec
                    knows, with credentials from the environment. Each node keeps a copy in $ROBUSTSCALE_MIRRORS
  --print-config    show the configuration and exit
  --plan            train nothing: measure, in a minute on the run's workers, what the whole run will cost; plan.json in
                    its folder. A run that is trained there later has what it took put beside it
  --price EUR       of an hour of a GPU, or of a worker on CPUs: the plan says what the run costs
  --plan-seconds S  for measuring, at most (default: 60)
  --plan-data TRAIN+TESTxCHANNELSxHEIGHTxWIDTH/CLASSES
                    plan without the data: 1281167+50000x3x224x224/1000 for ImageNet; loading is not measured then

Recipes:
{recipes}

Every field below can be set. A part that has alternatives is exchanged by its name (--objective trades,
--model wide_resnet, --objective.attack fgsm, --objective.attack.threat l2, --optimizer adamw, --schedule cosine):
{choices}
"""


def description() -> str:
    return DESCRIPTION.format(recipes=cli.recipe_list(), choices=cli.choices())


def main() -> int:
    args = sys.argv[1:]
    storage = cli.storage(args)
    print_config = cli.take_flag(args, "--print-config")
    asked = cli.take_plan(args)
    resume = cli.take_optional(args, "--resume")
    if resume is None:
        run = cli.parse_run(args, PROG, description(), recipes.get("digits"))
        folder = RunFolder(joined(storage, run.name))
    else:
        folder, base = _resumed(resume, args, storage)
        run = cli.parse_run(args, PROG, description(), base)
    if print_config:
        print(cli.as_yaml(run), end="")
        return 0
    if asked is not None:
        return _plan(run, folder, asked)
    from cluster.training import train_and_show

    return train_and_show(run, folder)


def _plan(run: Run, folder: RunFolder, asked: Asked) -> int:
    from cluster.planning import plan

    folder.pull()
    plan(run, folder, asked)
    return 0


def _resumed(value: str, args: list[str], storage: str) -> tuple[RunFolder, Run]:
    """The folder to go on with, by path or by name, and its own configuration."""
    recipe = args.pop(0) if args and not args[0].startswith("-") else "digits"
    name = cli.take_option(args, "--run-name")
    folder = RunFolder.existing(value if "/" in value else joined(storage, value or name or recipe))
    if not (folder.path / "result.json").exists() and not folder.has_checkpoint():
        where = joined(folder.where, "checkpoints")
        raise InputError(f"{where}: no checkpoint to go on with; without --resume the run starts anew")
    return folder, folder.run()


if __name__ == "__main__":
    door(main, "interrupted; the same command goes on from the last checkpoint")
