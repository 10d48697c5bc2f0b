"""The file format that outlives a run."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bayesfed.errors import InputError
from bayesfed.families import FAMILIES, DiagonalGaussian, FullGaussian, IsotropicGaussian, PointMass
from bayesfed.runs.posterior_file import load_posterior, save_posterior

MODEL = {"name": "linear", "input_shape": [2], "scaling": {"offset": 0.0, "factor": 0.0625}}
MEAN = torch.tensor([0.1, -0.2], dtype=torch.float64)
POSTERIORS = [
    IsotropicGaussian.from_mean_precision(MEAN, torch.tensor(3.0)),
    DiagonalGaussian.from_mean_precision(MEAN.float(), torch.tensor([1.0, 2.0])),
    FullGaussian.from_mean_precision(MEAN, torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    PointMass(MEAN),
]


@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda q: q.name)
def test_round_trip_keeps_bits_and_dtype(tmp_path, posterior):
    path = tmp_path / "posterior.safetensors"
    save_posterior(path, posterior, MODEL)
    loaded, description = load_posterior(path)
    assert type(loaded) is FAMILIES[posterior.name]
    assert loaded.mean.dtype == loaded.precision.dtype == posterior.mean.dtype
    assert torch.equal(loaded.mean, posterior.mean)
    assert torch.equal(loaded.precision, posterior.precision)
    assert description == MODEL


def test_tensors_and_the_one_metadata_key(tmp_path):
    path = tmp_path / "posterior.safetensors"
    save_posterior(path, POSTERIORS[3], MODEL)
    with safe_open(path, framework="pt") as file:
        assert sorted(file.keys()) == ["mean", "precision"]
        assert list(file.metadata()) == ["bayesfed"]
        text = file.metadata()["bayesfed"]
    content = json.loads(text)
    assert len(content.pop("xxh3")) == 16  # hexadecimal digits of the checksum
    assert content == {"family": "point", "format": 1, "model": MODEL}
    assert text == json.dumps(json.loads(text), sort_keys=True)


def test_equal_content_gives_equal_bytes_whatever_the_key_order(tmp_path):
    save_posterior(tmp_path / "a", POSTERIORS[1], MODEL)
    save_posterior(tmp_path / "b", POSTERIORS[1], dict(reversed(MODEL.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_views_of_one_buffer_are_saved(tmp_path):
    buffer = torch.arange(1.0, 9.0)
    posterior = DiagonalGaussian.from_mean_precision(buffer[::2], buffer[1::2])
    save_posterior(tmp_path / "a", posterior, MODEL)
    assert load_posterior(tmp_path / "a")[0].precision.tolist() == [2, 4, 6, 8]


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "posterior.safetensors"
    save_posterior(path, POSTERIORS[0], MODEL)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_posterior(path, POSTERIORS[1], MODEL)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["posterior.safetensors"]


def write(path, metadata, mean=MEAN):
    save_file({"mean": mean, "precision": torch.tensor(1.0)}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"nonsense"), "not a readable safetensors file"),
        (lambda path: write(path, None), "no metadata key 'bayesfed'"),
        (lambda path: write(path, {"bayesfed": "{"}), "not a valid posterior"),
        (lambda path: write(path, {"bayesfed": '{"format": 2}'}), "has format 2"),
        (lambda path: write(path, {"bayesfed": '{"format": 1, "family": "cauchy", "model": {}}'}), "unknown family"),
        (
            lambda path: write(path, {"bayesfed": '{"format": 1, "family": "isotropic", "model": {}}'}, MEAN / 0),
            "mean is not finite",
        ),
    ],
)
def test_what_is_no_posterior_is_named(tmp_path, make, message):
    path = tmp_path / "posterior.safetensors"
    make(path)
    with pytest.raises(InputError, match=message):
        load_posterior(path)
