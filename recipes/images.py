"""Images with one label each: data sets with the columns "image" (PIL) and "label" (a class), and the rows
`{"pixel_values": [3, S, S], "labels"}` that image classifiers take.
"""

from __future__ import annotations

import gzip
import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_layerpar.errors import ConfigurationError
from recipes.offline import FASHION_MNIST, NAME_OFFLINE, OFFLINE, DownloadError, fetch, hub_dataset

DIGITS = "digits"
"""What the recipe calls scikit-learn's digits, which need no download."""

CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

HIDDEN = {-1, None}
"""What stands for a label that a data set doesn't tell."""


@dataclass(frozen=True)
class Pictures:
    """Splits with the columns "image" and "label"; test is None where a data set has no labelled one."""

    train: Dataset
    validation: Dataset
    test: Dataset | None

    @property
    def labels(self) -> list[str]:
        return self.train.features["label"].names


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: two zero bytes, 8 for uint8, the number of axes, their sizes as big-endian
    uint32, the values.

    Raises DownloadError for anything else.
    """
    try:
        content = gzip.decompress(path.read_bytes())
        axes = content[3]
        shape = tuple(np.frombuffer(content, ">u4", count=axes, offset=4).tolist())
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
        if content[:3] != b"\0\0\x08" or len(values) != math.prod(shape):
            raise ValueError(f"head {content[:4]!r} and shape {shape} for {len(values)} bytes")
    except (OSError, EOFError, zlib.error, IndexError, ValueError) as error:
        raise DownloadError(f"{path} can't be read as an IDX file: {error}; delete {path.parent}") from error
    return values.reshape(shape)


def grey_images(values: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dataset:
    """values: uint8 `[rows, height, width]`; labels: numbers `[rows]` of the names."""
    head = b"P5 %d %d 255\n" % (values.shape[2], values.shape[1])  # as PGM files, which cost nothing to write
    images = [{"bytes": head + image.tobytes(), "path": None} for image in values]
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def fashion_mnist() -> DatasetDict:
    """60,000 and 10,000 grey images of 28 x 28 pixels, ten classes."""
    folder = fetch(FASHION_MNIST)
    return DatasetDict(
        {
            split: grey_images(
                read_idx(folder / f"{file}-images-idx3-ubyte.gz"),
                read_idx(folder / f"{file}-labels-idx1-ubyte.gz"),
                CLOTHES,
            )
            for split, file in {"train": "train", "test": "t10k"}.items()
        }
    )


def digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; a fifth of them, always the same, is the test split."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    values = (found.images * (255 / 16)).round().astype(np.uint8)
    return grey_images(values, found.target, [str(n) for n in found.target_names]).train_test_split(0.2, seed=0)


def hub_images(name: str, config: str | None, image_column: str | None, label_column: str | None) -> DatasetDict:
    """The splits of a hub data set, its columns renamed to "image" and "label".

    image_column, label_column: needed where it has not just one column of images and one of class labels.
    Raises DownloadError where the hub or its cache don't have the data, ConfigurationError where its columns don't do.
    """
    data = hub_dataset(name, config, NAME_OFFLINE)
    if "train" not in data:
        raise ConfigurationError(f"dataset_name={name!r} has the splits {sorted(data)}; it needs one called 'train'")
    features = data["train"].features
    asked_for = {"image_column": (image_column, datasets.Image), "label_column": (label_column, ClassLabel)}
    columns = []
    for option, (column, kind) in asked_for.items():
        fitting = [key for key, feature in features.items() if isinstance(feature, kind)]
        found = [key for key in fitting if column in (None, key)]
        if len(found) != 1:
            raise ConfigurationError(
                f"{option}={column!r}: of the columns {list(features)} of {name!r}, {fitting} are of type "
                f"{kind.__name__}; --{option} must name one of these"
            )
        columns += found
    data = data.select_columns(columns)
    return data.rename_columns({old: new for old, new in zip(columns, ("image", "label"), strict=True) if old != new})


def labelled_test(data: DatasetDict) -> Dataset | None:
    """The split "test", or "validation" where "test" is missing or hides its labels, as ImageNet's does."""
    for split in ("test", "validation"):
        if split in data and len(data[split]) and HIDDEN.isdisjoint(data[split]["label"][:]):
            return data[split]
    return None


def load_images(
    name: str,
    config: str | None,
    image_column: str | None,
    label_column: str | None,
    validation_rows: int,
    seed: int,
) -> Pictures:
    """Fashion-MNIST ("offline"), "digits" or a hub data set; `seed` draws the validation rows from the train split."""
    if name == OFFLINE:
        data = fashion_mnist()
    elif name == DIGITS:
        data = digits()
    else:
        data = hub_images(name, config, image_column, label_column)
    rows = len(data["train"])
    if not 1 <= validation_rows < rows:
        raise ConfigurationError(
            f"validation_rows={validation_rows} must be at least 1 and leave some of the {rows} train rows of {name!r}"
        )
    parts = data["train"].train_test_split(validation_rows, seed=seed)
    return Pictures(parts["train"], parts["test"], labelled_test(data))


def pixel_rows(rows: Dataset, processor: ViTImageProcessorPil, augment: Callable[[Any], Any] | None = None) -> Dataset:
    """The rows `{"pixel_values": [3, S, S], "labels"}`, made as they are read.

    augment: makes one PIL image of another, before the processor; its random numbers must be those of `random`,
        which the Trainer seeds for every batch.
    """

    def read(batch: dict[str, list]) -> dict[str, list]:
        images = batch["image"] if augment is None else [augment(image) for image in batch["image"]]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch["label"]}

    return rows.with_transform(read)


def crop_and_mirror(image: Image.Image) -> Image.Image:
    """A random part of 8 to 100 % of the image, at most a third wider or higher than that shape, mirrored half of the
    time: what ImageNet networks are trained on since Szegedy et al., *Going deeper with convolutions*."""
    width, height = image.size
    part = random.uniform(0.08, 1)
    stretch = math.exp(random.uniform(-0.5, 0.5) * math.log(4 / 3))
    w = min(width, max(1, round(width * math.sqrt(part) * stretch)))
    h = min(height, max(1, round(height * math.sqrt(part) / stretch)))
    x, y = random.randint(0, width - w), random.randint(0, height - h)
    image = image.crop((x, y, x + w, y + h))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image
