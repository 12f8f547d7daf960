"""A data set of 62 classes for boards: the letters and digits of printed fonts, test fonts of families of their own.

Packages hold the fonts: matplotlib, and those of the command below. Each image has colours, a rotation, a size and a
place drawn from a seed. Capital and small letters of one shape differ in height alone, and some not at all.

    pip install --no-deps --target fonts font-roboto font-source-sans-pro font-source-serif-pro font-hanken-grotesk \
        font-manrope font-caladea font-amatic-sc font-fredoka-one font-intuitive font-lato
    python -m tests.benchmarks.characters fonts data/characters
"""

import random
import string
from pathlib import Path

import matplotlib
from jsonargparse import auto_cli
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = string.digits + string.ascii_letters
#: Families that are in the test set alone, by the beginning of a file's name. "Display" fonts have no letters.
TEST = ("Lato", "Caladea", "DejaVuSerif", "Fredoka", "Intuitive", "Manrope")
TRAIN = ("Roboto", "SourceS", "Hanken", "Amatic", "DejaVuSans", "STIXGeneral", "cmr", "cmss", "cmtt", "cmb")
_SIZE, _TRAIN_FONTS, _TEST_FONTS = 64, 32, 16


def image_of(character: str, font: Path, draw: random.Random) -> Image.Image:
    """Return a character in one of two colours that differ enough, on the other one."""
    back = [draw.randint(0, 255) for _ in range(3)]
    front = [(value + draw.choice((-1, 1)) * draw.randint(90, 165)) % 256 for value in back]
    picture = Image.new("RGB", (_SIZE, _SIZE), tuple(back))
    layer = Image.new("L", (_SIZE, _SIZE))
    place = (_SIZE / 2 + draw.randint(-6, 6), _SIZE * 0.72 + draw.randint(-4, 4))
    letters = ImageFont.truetype(str(font), draw.randint(40, 52))
    ImageDraw.Draw(layer).text(place, character, fill=255, font=letters, anchor="ms")
    picture.paste(tuple(front), mask=layer.rotate(draw.uniform(-12, 12), Image.Resampling.BICUBIC))
    return picture


def write(files: list[Path], folder: Path, draw: random.Random) -> None:
    """Write each character of each font as `<number of the class>/<font>.png`."""
    for number, character in enumerate(CHARACTERS):
        (folder / f"{number:02}").mkdir(parents=True)
        for font in files:
            image_of(character, font, draw).save(folder / f"{number:02}" / f"{font.stem}.png")


def main(fonts: Path, out: Path, seed: int = 0) -> None:
    """Draw training and test images.

    Args:
        fonts: Folder of font files, at any depth.
        out: Folder for `train` and `test`, with a folder for each class.
        seed: Of the choice of fonts, and of colours, rotation, size and place.
    """
    packaged = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    by_name = {file.stem: file for folder in (packaged, fonts) for file in sorted(folder.rglob("*.[to]tf"))}
    draw = random.Random(seed)
    for name, families, most in (("train", TRAIN, _TRAIN_FONTS), ("test", TEST, _TEST_FONTS)):
        found = sorted(font for font in by_name if font.startswith(families) and not font.endswith("Display"))
        chosen = draw.sample(found, min(most, len(found)))
        write([by_name[font] for font in chosen], out / name, draw)
        print(f"{out / name}: {len(CHARACTERS)} classes of {len(chosen)} images")


if __name__ == "__main__":
    auto_cli(main)
