"""Run all projects that are installed, and print their table: `python -m tests.foreign [WORD of a name]`."""

import logging
import sys
import traceback
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from tests.foreign import basic, extra_pictures, extra_sequences, pictures, trainers
from tests.foreign.project import Project, measure

TENSORS, ALL_PAIRS = (
    "written in tensor operations, not with a loss of torch",
    "each sample against all others of its batch",
)
#: What a reader of the table should know, by the name of a project.
NOTES = {
    "BoringModel, its own train_dataloader": "the samples are drawn anew at each call",
    "GPT2LMHeadModel, padded": "a sample's loss is the mean of its own tokens",
    "the hardest half of a batch": "which losses count depends on the others of the batch",
    "GRU, its losses time by time": "rows of losses in the order of time, not of samples",
    "contrastive cross_entropy, B x B": ALL_PAIRS,
    pictures.IN_TRAINING: "a mixed image has the weight of the sample in its row",
    "test_resnet, Mixup, SoftTargetCrossEntropy": TENSORS,
    "test_resnet, mixup in evaluation, too": "mixup only `if self.training` is one line",
    "sigmoid_focal_loss": "scored: the mean of the elements, weighted by their focal factors",
    "SemanticSegmentationTask, jaccard": TENSORS,
    "ObjectDetectionTask": "in evaluation mode the network gives boxes, no losses",
    "Unet, DiceLoss": TENSORS,
    "Unet, FocalLoss": "not linear in the losses that it calls",
    "NTXentLoss": ALL_PAIRS,
    "UNet, DiceLoss": TENSORS,
    "UNet, DiceCELoss": "the dice term is no loss of torch: it is not weighted, and the callback says so",
    "Ganomaly": "in evaluation mode the network gives scores, no images",
    "GIN, one class for each node": "graphs have different numbers of nodes",
    "TemporalFusionTransformer, PoissonLoss": "negative losses",
    "TemporalFusionTransformer, QuantileLoss": TENSORS,
    "ContrastiveLoss of pairs": TENSORS,
    "SFTTrainer, one step of two micro-batches": "the example of `score`",
    "MultipleNegativesRankingLoss": ALL_PAIRS,
}


def row(project: Project) -> str:
    """Measure a project, and return its line of the table."""
    start = f"| {project.package} | {version(project.package)} | {project.name}"
    lines, losses, gradient, note = project.lines + bool(project.sample_losses), "-", "-", NOTES.get(project.name, "")
    try:
        losses, gradient = (f"{error:.0e}" for error in measure(project))
    except Exception as error:
        lines = "refused"
        if not project.refused or project.refused not in str(error):
            traceback.print_exc()
            note = f"FAILED: {type(error).__name__}: {error}"
    return f"{start} | {lines} | {losses} | {gradient} | {note} |"


def main(word: str = "") -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = [
        "| package | version | module and loss | lines | losses | gradient | note |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for project in [p for part in (basic, pictures, extra_pictures, extra_sequences, trainers) for p in part.PROJECTS]:
        with suppress(PackageNotFoundError):
            if word in f"{project.package} {project.name}":
                rows.append(row(project))
                print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
