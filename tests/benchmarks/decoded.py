"""Images per second of a training loader, from image files, decoded images, and these finished in batches, in turns.

    python -m tests.benchmarks.decoded --images FOLDER [--size 224 --transforms resize_flip --rounds 5]

One process reads and transforms; nothing trains. Files are in the system's cache, and times are those of the processor.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

from jsonargparse import auto_cli

from flow_lightning import ImageDataModule
from flow_lightning.data.on_device import finish
from tests.benchmarks.measure import spread

HALF = [0.5, 0.5, 0.5]


def as_classes(images: Path, folder: Path) -> Path:
    """Return a folder of two splits; one of links, if there are only images."""
    if (images / "train").is_dir():
        return images
    for split in ("train", "test"):
        (folder / split).mkdir()
        (folder / split / "all").symlink_to(images.absolute())
    return folder


def main(images: Path, size: int = 224, transforms: str = "resize_flip", rounds: int = 5) -> None:
    """Time all in turns; `images` holds `train/<class>` and `test/<class>`, or images alone."""
    with tempfile.TemporaryDirectory() as folder:
        root, file = as_classes(images, Path(folder)), Path(folder) / "images.npy"
        settings = {"image_size": size, "transforms": transforms, "mean": HALF, "std": HALF}
        settings |= {"num_workers": 0, "validation_fraction": 0, "batch_size": 64}
        modules, setups = {}, []
        for name, decoded in (("files", None), ("decoded", file), ("in batches", file)):
            on_device = name == "in batches"
            modules[name] = ImageDataModule("folder", root, decoded=decoded, on_device=on_device, **settings)
            started = time.perf_counter()
            modules[name].setup()
            setups.append(time.perf_counter() - started)
        speeds: dict[str, list[float]] = {name: [] for name in [*modules, "in batches, loader alone"]}
        for round_ in range(rounds):
            for name in [*modules][round_ % 3 :] + [*modules][: round_ % 3]:
                count, finishing, started = 0, 0.0, time.process_time()
                for batch in modules[name].train_dataloader():
                    read = time.process_time()
                    count += len(finish(batch)["image"])
                    finishing += time.process_time() - read
                seconds = time.process_time() - started
                speeds[name].append(count / seconds)
                if name == "in batches":  # a device would finish them meanwhile
                    speeds[f"{name}, loader alone"].append(count / (seconds - finishing))
        print(f"{count} training images at {size} pixels, {rounds} rounds, {file.stat().st_size / 1e6:.0f} MB")
        for name, found in speeds.items():
            ratios = [fast / slow for fast, slow in zip(found, speeds["files"])]
            print(f"{name}: {median(found):.0f} images per second, {spread(ratios)} times those of files")
        print("setup: {:.2f} s from files, {:.2f} s with decoding, {:.2f} s with the file there".format(*setups))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
