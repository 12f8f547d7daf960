"""The command `flow-lightning`, also `python -m flow_lightning`: answers `--help` at once, runs everything else.

In: the process's arguments. Out: the help text, or a run.
Next: `cli.py` and `compare.py`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from flow_lightning.configurations import OptionError, names_of, nearest, shipped, with_files

COMMANDS = ("fit", "score", "compare", "report", "validate", "test", "predict")

_HELP = """\
usage: flow-lightning {{fit,score,compare,validate,test,predict}} -c NAME [-c NAME ...] [options]
       flow-lightning report DIRECTORY [--output FILE]

  fit         train, then report what the model learned and what it kept
  score       compute, report and draw the weights of the training set, without training
  compare     fit one configuration by several methods and seeds, side by side
  report      write report.html, one page of a run or of a board, from its files
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
  --trainer.max_epochs NUMBER     like all arguments of Lightning's Trainer
  --ckpt_path FILE                continue from a checkpoint
  --drop-issues FILE              leave out what label_issues.csv of an earlier run calls an issue
  --relabel FILE                  that table with a column action: drop, keep or the right label

for compare, or in a YAML file for --board FILE; a board that was killed makes what is missing:
  --methods "[standard, flow]"    --seeds "[1, 2, 3]"    --rates "[0.001, 0.002, 0.004]"
  --optimizers "[sgd, adamw, adamw8bit]"              --noise "[0, 0.3]", shares of wrong labels
  --output FOLDER                 --jobs NUMBER of processes, one per GPU             --part 0/4

configurations:
  {configurations}
methods: {methods}

every option:        flow-lightning fit --help-all
options of a class:  flow-lightning fit --model.help flow_lightning.ImageClassificationModule
first try:           flow-lightning compare -c quickstart
"""


def help_text() -> str:
    """Return what `--help` prints."""
    configurations = "\n  ".join(name for name in shipped() if not name.startswith(("methods/", "optimizers/")))
    return _HELP.format(configurations=configurations, methods=", ".join(names_of("methods")))


def main(args: Sequence[str] | None = None) -> Any:
    """Run a command line, by default that of the process, and return its `FlowCLI`; None for help and `compare`."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or {"-h", "--help"} & set(words):
        print(help_text(), end="")
        return None
    try:
        _check_command(words)
        if words[0] == "report":
            from flow_lightning.report.page.render import command

            return command(words[1:])
        words = with_files(words)
        if words[0] == "compare":
            from flow_lightning.compare import compare as run  # imports Lightning, which takes seconds
        else:
            from flow_lightning.cli import run  # type: ignore[assignment]
        return run(words)
    except OptionError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def script() -> None:
    """Be the console script: anything that it returned would count as an error of the process."""
    main()


def _check_command(words: list[str]) -> None:
    """Check that a command comes first, and that it has a configuration, or at least a model."""
    command = words[0]
    if command not in COMMANDS:
        hint = nearest(command, COMMANDS)
        raise OptionError(f"The first word must be a command: {', '.join(COMMANDS)}. {hint}".strip())
    if command != "report" and not any(word.startswith(("-c", "--config", "--model", "--help")) for word in words):
        raise OptionError(
            f"{command} needs a configuration: flow-lightning {command} -c quickstart. Names: flow-lightning --help"
        )
    if command == "compare" and any(word.partition("=")[0] == "--method" for word in words):
        raise OptionError('compare takes its methods from --methods, such as --methods "[standard, flow]".')


if __name__ == "__main__":
    main()
