"""Images per second of a training loader, from image files and from a file of decoded images, in turns.

    python -m tests.benchmarks.decoded --images FOLDER [--size 224 --transforms resize_flip --rounds 5]

One process reads and transforms; nothing trains. Files are in the system's cache, and times are those of the processor.
"""

import tempfile
import time
from pathlib import Path
from statistics import median

from jsonargparse import auto_cli

from flow_lightning import ImageDataModule
from tests.benchmarks.measure import in_turn, spread

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
    """Time both in turns; `images` holds `train/<class>` and `test/<class>`, or images alone."""
    with tempfile.TemporaryDirectory() as folder:
        root, file = as_classes(images, Path(folder)), Path(folder) / "images.npy"
        settings = {"image_size": size, "transforms": transforms, "mean": HALF, "std": HALF}
        settings |= {"num_workers": 0, "validation_fraction": 0, "batch_size": 64}
        modules, setups = {}, []
        for name, decoded in (("files", None), ("decoded", file), ("again", file)):
            modules[name] = ImageDataModule("folder", root, decoded=decoded, **settings)
            started = time.perf_counter()
            modules[name].setup()
            setups.append(time.perf_counter() - started)
        speeds: dict[str, list[float]] = {"files": [], "decoded": []}
        for order in in_turn("files", "decoded", rounds):
            for name in order:
                started = time.process_time()
                count = sum(len(batch["index"]) for batch in modules[name].train_dataloader())
                speeds[name].append(count / (time.process_time() - started))
        ratios = [fast / slow for fast, slow in zip(speeds["decoded"], speeds["files"])]
        print(f"{count} training images at {size} pixels")
        print(f"images per second: {median(speeds['files']):.0f} from files, {median(speeds['decoded']):.0f} decoded")
        print(f"ratio: {spread(ratios)}, {rounds} rounds; {file.stat().st_size / 1e6:.0f} MB")
        print("setup: {:.2f} s from files, {:.2f} s with decoding, {:.2f} s with the file there".format(*setups))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
