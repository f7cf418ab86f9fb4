"""Images with labels: offline, scikit-learn's, and shaped like the hub's."""

from __future__ import annotations

import gzip
import random

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTImageProcessorPil

from hf_layerpar.errors import ConfigurationError
from recipes import images
from recipes.images import crop_and_mirror, grey_images, labelled_test, load_images, pixel_rows, read_idx
from recipes.offline import DownloadError

LABELS = ClassLabel(names=["cat", "dog"])


def coloured(rows: int, hidden: bool = False) -> Dataset:
    """Row i is of the colour (i, 2i, 3i), its class i % 2; with ImageNet's kind of hidden labels, -1."""
    pictures = [Image.new("RGB", (6, 4), (i, 2 * i, 3 * i)) for i in range(rows)]
    content = {"id": list(range(rows)), "img": pictures, "kind": [-1 if hidden else i % 2 for i in range(rows)]}
    features = Features({"id": datasets.Value("int64"), "img": datasets.Image(), "kind": LABELS})
    return Dataset.from_dict(content, features=features)


def hub(monkeypatch, **splits: Dataset) -> None:
    def load_dataset(name, config):
        assert (name, config) == ("some/pets", "small")
        return DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def load(image_column: str | None = None, label_column: str | None = None, validation_rows: int = 4, seed: int = 0):
    return load_images("some/pets", "small", image_column, label_column, validation_rows, seed)


def test_digits_are_scikit_learns_split_by_seed():
    found = load_images("digits", None, None, None, 100, seed=1)
    assert found.test is not None
    assert [len(found.train), len(found.validation), len(found.test)] == [1337, 100, 360]
    assert found.labels == [str(i) for i in range(10)]
    content = {np.asarray(image).tobytes() for part in (found.train, found.validation) for image in part["image"]}
    everything = {(image * 255 / 16).round().astype(np.uint8).tobytes() for image in load_digits().images}
    assert content | {np.asarray(image).tobytes() for image in found.test["image"]} == everything
    other = load_images("digits", None, None, None, 100, seed=2)
    assert other.test is not None
    assert other.test["label"][:] == found.test["label"][:]
    assert other.validation["label"][:] != found.validation["label"][:]


def test_pixels_are_the_processors():
    values = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    rows = grey_images(values, np.array([2, 0, 1]), ["a", "b", "c"])
    assert [np.asarray(image).tolist() for image in rows["image"]] == values.tolist()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, do_convert_rgb=True)
    found = pixel_rows(rows, processor)
    assert [found[i]["labels"] for i in range(3)] == [2, 0, 1]
    for i in range(3):
        expected = torch.from_numpy(values[i] / 127.5 - 1).float().expand(3, 8, 8)
        torch.testing.assert_close(found[i]["pixel_values"], expected, atol=1e-6, rtol=0)
    mirrored = pixel_rows(rows, processor, lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert torch.equal(mirrored[0]["pixel_values"], found[0]["pixel_values"].flip(-1))


def test_crops_are_parts_of_the_image():
    width, height = 40, 30
    picture = np.stack([*np.meshgrid(np.arange(width), np.arange(height)), np.zeros((height, width))], -1)
    image = Image.fromarray(picture.astype(np.uint8))  # every pixel tells its place
    random.seed(0)
    shares, stretches, mirrored = [], [], 0
    for _ in range(300):
        crop = np.asarray(crop_and_mirror(image)).astype(int)
        columns, lines = crop[0, :, 0], crop[:, 0, 1]
        mirrored += columns[0] > columns[-1]
        assert set(np.abs(np.diff(columns))) <= {1}
        assert set(np.diff(lines)) <= {1}
        shares.append(crop.shape[0] * crop.shape[1] / (width * height))
        stretches.append(crop.shape[1] / crop.shape[0] / (width / height))
    assert 100 < mirrored < 200
    assert min(shares) < 0.15
    assert max(shares) > 0.9
    assert 0.6 < min(stretches) < 0.85 < 1.15 < max(stretches) < 1.6


def test_hub_columns_are_found_by_their_type(monkeypatch):
    hub(monkeypatch, train=coloured(20), test=coloured(6))
    found = load()
    assert found.labels == ["cat", "dog"]
    assert [part.column_names for part in (found.train, found.validation)] == [["image", "label"]] * 2
    assert found.test is not None
    assert (len(found.train), len(found.validation), len(found.test)) == (16, 4, 6)
    colours = sorted(
        part[i]["image"].getpixel((0, 0)) for part in (found.train, found.validation) for i in range(len(part))
    )
    assert colours == [(i, 2 * i, 3 * i) for i in range(20)], "a row was lost, or is in two splits"


def test_hidden_labels_are_no_test_split(monkeypatch):
    names = {"img": "image", "kind": "label"}  # as ImageNet's columns are called
    splits = {"train": coloured(20), "validation": coloured(5), "test": coloured(6, hidden=True)}
    hub(monkeypatch, **{split: rows.rename_columns(names) for split, rows in splits.items()})
    found = load()
    assert found.test is not None
    assert len(found.test) == 5
    assert labelled_test(DatasetDict(train=coloured(3), test=Dataset.from_dict({"label": [None]}))) is None


def test_hub_faults_name_the_remedy(monkeypatch):
    two = coloured(9).add_column("breed", [0] * 9).cast_column("breed", LABELS)
    hub(monkeypatch, train=two)
    with pytest.raises(ConfigurationError, match=r"label_column=None.*\['kind', 'breed'\].*--label_column must"):
        load()
    with pytest.raises(ConfigurationError, match=r"image_column='id'.*\['img'\] are of type Image"):
        load(image_column="id")
    assert load(label_column="breed").validation["label"][:] == [0] * 4
    with pytest.raises(ConfigurationError, match=r"validation_rows=9 must .* the 9 train rows"):
        load(label_column="breed", validation_rows=9)
    hub(monkeypatch, everything=coloured(3))
    with pytest.raises(ConfigurationError, match=r"splits \['everything'\]"):
        load()

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DownloadError, match="--dataset_name offline"):
        load()


WHOLE = b"\0\0\x08\x02" + b"\0\0\0\x02\0\0\0\x03" + bytes(range(6))
DAMAGED = {
    "cut": gzip.compress(WHOLE[:-1]),
    "cut head": gzip.compress(WHOLE[:6]),
    "floats": gzip.compress(b"\0\0\x0d" + WHOLE[3:]),
    "no gzip": WHOLE,
    "cut gzip": gzip.compress(WHOLE)[:-9],
    "other block": gzip.compress(WHOLE)[:10] + b"\xff" + gzip.compress(WHOLE)[11:],
    "empty": b"",
}


def test_idx_files(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(WHOLE))
    assert read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_idx_file_is_named(damage, tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(DAMAGED[damage])
    with pytest.raises(DownloadError, match=r"x\.gz can't be read as an IDX file"):
        read_idx(path)


def test_real_fashion_mnist():
    found = images.fashion_mnist()
    assert {split: len(rows) for split, rows in found.items()} == {"train": 60_000, "test": 10_000}
    assert np.bincount(found["test"]["label"]).tolist() == [1000] * 10
    assert np.bincount(found["train"]["label"]).tolist() == [6000] * 10
    first = found["train"][0]
    assert (first["image"].size, found["train"].features["label"].int2str(first["label"])) == ((28, 28), "Ankle boot")
