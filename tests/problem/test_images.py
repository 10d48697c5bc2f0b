import io
import os
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bayesfed.errors import InputError
from bayesfed.problem.data import decoding

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
ROOT = os.environ.get("BAYESFED_DATA")
real = pytest.mark.skipif(not ROOT or not Path(ROOT, "cifar100").is_dir(), reason="BAYESFED_DATA is not set")


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def write(file, images, labels, image="image", label="label"):
    rows = [{"bytes": encoded, "path": None} for encoded in images]
    pq.write_table(pa.table({image: rows, label: pa.array(labels, pa.int64())}), file)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESFED_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "set"
    path.mkdir()
    write(path / "train.parquet", map(png, PIXELS), np.arange(12) % 10)
    write(path / "test.parquet", map(png, PIXELS[:3]), [0, 1, 2])
    return path


def mnist(folder, **options):
    return {"name": "mnist", "path": str(folder), **options}


def test_pixels_and_labels_survive_the_way_through_the_cache(folder, problem):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about read-only memory
        result = problem(data=mnist(folder, scaling="raw"), partition={"name": "iid", "num_clients": 1})
    x, y = result.clients[0].batch(slice(None), torch.float32, "cpu")
    assert np.array_equal(x, PIXELS[:, None])
    assert y.tolist() == [k % 10 for k in range(12)]
    assert result.input_shape == (1, 28, 28)
    assert result.num_classes == 10
    assert len(result.test) == 3


def test_images_are_decoded_once(folder, problem, monkeypatch, tmp_path):
    problem(data=mnist(folder))
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.suffix for file in files] == [".npy", ".npy"]  # and no temporary file
    monkeypatch.setattr(decoding, "_decode", None)
    problem(data=mnist(folder))
    write(folder / "test.parquet", map(png, PIXELS[:4]), [0, 1, 2, 3])
    monkeypatch.undo()
    monkeypatch.setenv("BAYESFED_CACHE", str(tmp_path / "cache"))
    assert len(problem(data=mnist(folder)).test) == 4  # a changed file is another entry


def test_writing_to_a_loaded_array_leaves_the_cache_alone(folder, problem):
    result = problem(data=mnist(folder))
    result.test.x[:] = 0
    assert problem(data=mnist(folder)).test.x.sum() == int(PIXELS[:3].sum())


def test_an_unwritable_cache_is_only_a_warning(folder, problem, monkeypatch, caplog):
    monkeypatch.setenv("BAYESFED_CACHE", str(folder / "train.parquet" / "no"))
    assert len(problem(data=mnist(folder)).test) == 3
    assert len(caplog.messages) == 2  # train and test
    assert all("set BAYESFED_CACHE" in said for said in caplog.messages)


def test_colour_images_are_channels_first(tmp_path, problem):
    pixels = np.random.default_rng(1).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    for split in ("train", "test"):
        write(tmp_path / f"{split}.parquet", map(png, pixels), np.arange(10), "img", "fine_label")
    result = problem(data={"name": "cifar100", "path": str(tmp_path), "scaling": "raw"}, model="resnet20")
    assert np.array_equal(result.test.x, pixels.transpose(0, 3, 1, 2))
    assert result.num_outputs == 100


def test_root_of_all_sets(folder, problem, monkeypatch):
    folder.rename(folder.parent / "mnist")
    monkeypatch.setenv("BAYESFED_DATA", str(folder.parent))
    assert len(problem(data="mnist").test) == 3
    with pytest.raises(InputError, match=r"data\.path=.*fashion_mnist: no such folder; needs a folder with train"):
        problem(data="fashion_mnist")


def test_download_failures_say_what_to_do_offline(problem, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.delenv("BAYESFED_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=offline))
    with pytest.raises(
        InputError, match=r"ylecun/mnist.*\(no route to host\)\. Offline: set data\.path=DIR.*ROOT/mnist"
    ):
        problem(data="mnist")


def test_download_through_datasets(problem, monkeypatch):
    import datasets

    def fetch(repository, split):
        assert repository == "ylecun/mnist"
        rows = {"image": [Image.fromarray(p) for p in PIXELS], "label": [k % 10 for k in range(12)]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.delenv("BAYESFED_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", fetch)
    result = problem(data="mnist")
    assert np.array_equal(result.test.x, PIXELS[:, None])
    assert len(result.test) == 12


def test_image_errors(folder, problem, tmp_path):
    def check(message):
        with pytest.raises(InputError, match=message):
            problem(data=mnist(folder))

    train = folder / "train.parquet"
    write(train, [png(PIXELS[0]), b"no image"], [0, 1])
    check("image in row 1 cannot be decoded")
    write(train, [png(PIXELS[0]), png(PIXELS[1, :5])], [0, 1])
    check(r"image in row 1 has shape \(1, 5, 28\), the first one \(1, 28, 28\)")
    write(train, [png(PIXELS[0])] * 2, [0, 10])
    check(r"label of row 1 is 10; mnist has whole-number labels 0\.\.9")
    write(train, [png(PIXELS[0])], [0], image="picture")
    check("no column image or img; columns: picture, label")
    write(train, [png(PIXELS[0])], [0], label="digit")
    check("no column fine_label or label; columns: image, digit")
    write(train, [], [])
    check("holds no images")
    write(train, [png(PIXELS[0, :5])], [0])
    check(r"training images have shape \(1, 5, 28\), test images \(1, 28, 28\)")
    train.write_text("no table")
    check("not a readable Parquet table")
    train.unlink()
    check(r"train\.parquet is missing; needs a folder with train\.parquet and test\.parquet")


@real
@pytest.mark.parametrize(
    ("name", "shape", "classes", "model"),
    [("cifar10", (3, 32, 32), 10, "cnn_zenke"), ("cifar100", (3, 32, 32), 100, "resnet20")],
)
def test_real_colour_images(problem, name, shape, classes, model):
    result = problem(data=name, partition="dirichlet_sizes_and_classes", model=model)
    assert result.input_shape == shape
    assert result.num_outputs == classes
    assert (len(result.clients), sum(map(len, result.clients)), len(result.test)) == (10, 10_000, 2_000)
    assert result.label_counts.sum(axis=0).tolist() == [10_000 // classes] * classes
    assert torch.bincount(result.test.targets()).tolist() == [2_000 // classes] * classes
    x, _ = result.clients[0].batch(torch.arange(8), torch.float32, "cpu")
    assert 0 <= x.min() < x.max() <= 1
    assert 0.2 < x.mean() < 0.8


@real
@pytest.mark.slow
def test_real_fashion_mnist_at_ten_percent(problem):
    """The settings of fmnist_het10: 600 images a class over 10 clients, pixels 0..255."""
    data = {"name": "fashion_mnist", "fraction": 0.1, "scaling": "raw"}
    mlp = {"name": "mlp", "hidden": [200, 100], "activation": "sigmoid"}
    result = problem(data=data, partition="dirichlet_sizes_and_classes", model=mlp)
    assert result.label_counts.sum(axis=0).tolist() == [600] * 10
    assert len(result.test) == 10_000
    assert sum(parameter.numel() for parameter in result.build_model(1).parameters()) == 178_110
    x, _ = result.clients[0].batch(slice(None), torch.float32, "cpu")
    assert x.max() == 255
    assert result.scaling.is_identity
