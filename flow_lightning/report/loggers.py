"""Pictures, histograms and pages for Lightning's loggers, each by the methods that it has.

In: loggers of a trainer, and a file or values. Out: calls of those that take them. Next: none; `callbacks/` call this.
"""

from collections.abc import Iterable
from inspect import signature
from pathlib import Path
from typing import Any

from matplotlib import image

from flow_lightning.report.pictures import some_values


def log_weights(loggers: Iterable[Any], scored: Any, picture: Path | None) -> None:
    """Give the distribution of losses and weights to loggers that draw histograms, the picture to those of images."""
    losses, weights = some_values(scored)
    for tag, values in (("flow/weights", weights), ("flow/losses", losses.clamp_min(1e-8).log10())):
        for logger in loggers:
            given = {"tag": tag, "values": values.cpu(), "global_step": 0}
            _call_first((getattr(logger, "experiment", None), "add_histogram", given))
    if picture is not None:
        log_picture(loggers, "flow/weights", picture)


def log_picture(loggers: Iterable[Any], name: str, path: Path) -> None:
    """Give a PNG to the loggers that take pictures: W&B, TensorBoard, Comet, MLflow, and those with their methods.

    A logger that has methods of these names with other arguments, or none of them, is left alone.
    """
    file, pixels = str(path), {"img_tensor": image.imread(path), "global_step": 0, "dataformats": "HWC"}
    for logger in loggers:
        experiment = getattr(logger, "experiment", None)
        _call_first(
            (logger, "log_image", {"key": name, "images": [file]}),  # W&B
            (experiment, "add_image", {"tag": name, **pixels}),  # TensorBoard
            (experiment, "log_image", {"image_data": file, "name": name}),  # Comet
            (experiment, "log_artifact", {"run_id": getattr(logger, "run_id", None), "local_path": file}),  # MLflow
        )


def log_page(loggers: Iterable[Any], path: Path) -> None:
    """Give a file, such as the page of a run, to the loggers that keep files: W&B, Comet, MLflow, and those like them.

    A logger without such a method, or with other arguments, is left alone.
    """
    file = str(path)
    for logger in loggers:
        experiment = getattr(logger, "experiment", None)
        _call_first(
            (experiment, "save", {"glob_str": file, "base_path": str(path.parent), "policy": "now"}),  # W&B
            (experiment, "log_asset", {"file_data": file, "file_name": path.name}),  # Comet
            (experiment, "log_artifact", {"run_id": getattr(logger, "run_id", None), "local_path": file}),  # MLflow
        )


def _call_first(*ways: tuple[Any, str, dict[str, Any]]) -> None:
    """Call the first method that exists and takes its arguments; each way is its owner, its name and the arguments."""
    for owner, method, given in ways:
        call: Any = getattr(owner, method, None)
        try:
            signature(call).bind(**given)
        except (TypeError, ValueError):  # no function, other arguments, or no signature
            continue
        call(**given)
        return
