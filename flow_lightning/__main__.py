"""The command `flow-lightning`, also `python -m flow_lightning`: answers `--help` at once, runs everything else.

In: the process's arguments. Out: the help text, or a run.
Next: `cli.py`.
"""

import sys
from collections.abc import Sequence

from flow_lightning.configurations import OptionError, method_names, shipped, with_files

_HELP = """\
usage: flow-lightning {{fit,score,compare,validate,test,predict}} -c NAME [-c NAME ...] [options]

commands:
  fit         train, then report what the model learned and what it kept
  score       compute, report and draw the weights of the training set, without training
  compare     fit one configuration by several methods and seeds, side by side
  validate    measure on the validation set, with --ckpt_path on a checkpoint
  test        measure on the test set, with --ckpt_path on a checkpoint
  predict     write the most likely class of each test image to predictions.csv

options that matter most:
  -c NAME                         a shipped configuration, or a YAML file; later ones change earlier ones
  --method NAME                   how to train (default: standard, plain fine-tuning)
  --learning_rate RATE            peak rate; one number, or "{{standard: 0.005, flow: 0.001}}"
  --model.model NAME              the pre-trained model
  --data.root FOLDER              where the data is; --data.download true fetches it
  --retention.images FOLDER       images of the pre-trained task, to measure what the model kept
  --trainer.max_epochs NUMBER     and all other arguments of Lightning's Trainer
  --trainer.default_root_dir DIR  where runs go
  --ckpt_path FILE                continue from a checkpoint
  --methods "[standard, flow]" --seeds "[1, 2, 3]" --output DIR    for compare

configurations:
  {configurations}
methods:
  {methods}

every option:        flow-lightning fit --help-all
options of a class:  flow-lightning fit --model.help flow_lightning.ImageClassificationModule
first try:           flow-lightning compare -c quickstart
"""


def help_text() -> str:
    """Return what `--help` prints."""
    configurations = [name for name in shipped() if not name.startswith("methods/")]
    return _HELP.format(configurations="\n  ".join(configurations), methods=", ".join(method_names()))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, by default the process's own.
    """
    arguments = sys.argv[1:] if args is None else list(args)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(help_text(), end="")
        return
    try:
        with_files(arguments)
    except OptionError as error:  # a wrong name needs no seconds of imports
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    from flow_lightning.cli import main as run  # imports Lightning, which takes seconds

    run(arguments)


if __name__ == "__main__":
    main()
