"""What loggers are given, of those that take it, and that no other breaks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib import image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flow_lightning.method.weights import SampleWeights
from flow_lightning.report.loggers import log_page, log_picture, log_weights
from flow_lightning.report.pictures import plot_weights


class Comet:
    """A logger whose `experiment` has the methods of `comet_ml.Experiment`."""

    def __init__(self, taken):
        def log_image(image_data, name=None, overwrite=False, image_format="png", step=None):
            taken.append((image_data, name))

        def log_artifact(artifact):
            raise AssertionError("takes an Artifact, no file")

        def log_asset(file_data, file_name=None, overwrite=False, copy_to_tmp=True, step=None, metadata=None):
            taken.append((file_data, file_name))

        self.experiment = SimpleNamespace(
            log_image=log_image, log_artifact=log_artifact, log_figure=log_artifact, log_asset=log_asset
        )


class MLflow:
    """A logger whose `experiment` has the methods of `mlflow.MlflowClient`."""

    run_id = "7"

    def __init__(self, taken):
        def log_image(run_id, image, artifact_file=None, key=None, step=None):
            raise AssertionError("takes pixels and a name in the run")

        def log_artifact(run_id, local_path, artifact_path=None):
            taken.append((run_id, local_path))

        self.experiment = SimpleNamespace(log_image=log_image, log_artifact=log_artifact, log_figure=log_image)


class Run(dict):
    """Keeps what it is given by key, as `neptune.Run` does, which has no method for a picture."""


def refuse(picture):
    """Take the place of a method with arguments that nobody knows."""
    raise AssertionError("no one knows how to call this")


OTHERS = [
    SimpleNamespace(experiment=Run()),
    SimpleNamespace(),  # Lightning asks no logger for an `experiment`
    SimpleNamespace(experiment=None, log_image=refuse),
    SimpleNamespace(
        experiment=SimpleNamespace(add_image=refuse, add_histogram=refuse, log_artifact=refuse, save=refuse)
    ),
]


def test_histograms_go_to_the_loggers_that_take_them_and_break_no_other():
    scored, board, client, taken = SampleWeights.from_losses(torch.rand(9)), TensorBoardLogger("board"), Comet([]), []
    client.experiment.add_histogram = lambda tag, values, global_step: taken.append((tag, values))
    log_weights([board, client, MLflow([]), CSVLogger("logs"), *OTHERS], scored, None)
    board.experiment.flush()
    assert {"flow/weights", "flow/losses"} == {*EventAccumulator(board.log_dir).Reload().Tags()["histograms"]}
    (_, weights), (_, losses) = taken
    torch.testing.assert_close(weights, scored.weights)
    np.testing.assert_allclose(losses.numpy(), np.log10(scored.losses.numpy()), rtol=1e-5)


def test_a_picture_goes_to_the_loggers_that_take_pictures_and_breaks_no_other():
    plot_weights(SampleWeights.from_losses(torch.rand(9)), "weights.png")
    taken, path, board = [], Path("weights.png"), TensorBoardLogger("board")
    wandb = SimpleNamespace(log_image=lambda key, images: taken.append((key, images)))
    log_picture([wandb, Comet(taken), MLflow(taken), board, CSVLogger("logs"), *OTHERS], "weights", path)
    assert taken == [("weights", ["weights.png"]), ("weights.png", "weights"), ("7", "weights.png")]
    board.experiment.flush()
    (logged,) = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload().Images("weights")
    assert (logged.height, logged.width) == image.imread(path).shape[:2]


def test_a_page_goes_to_the_loggers_that_keep_files_and_breaks_no_other():
    taken, path, board = [], Path("run/report.html"), TensorBoardLogger("board")
    run = SimpleNamespace(
        save=lambda glob_str, base_path=None, policy="live": taken.append((glob_str, base_path, policy))
    )
    log_page([SimpleNamespace(experiment=run), Comet(taken), MLflow(taken), board, CSVLogger("logs"), *OTHERS], path)
    assert taken == [("run/report.html", "run", "now"), ("run/report.html", "report.html"), ("7", "run/report.html")]
