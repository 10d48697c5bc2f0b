import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bayesfed.errors import InputError

RNG = np.random.default_rng(0)
X, LABELS, TARGETS = RNG.normal(size=(60, 4)), np.arange(60) % 3, RNG.normal(size=60)


@pytest.fixture
def npz(tmp_path):
    def save(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return {"name": "npz", "path": str(path)}

    return save


@pytest.fixture
def table(tmp_path):
    def save(columns, **options):
        path = tmp_path / "data.parquet"
        pq.write_table(pa.table(columns), path)
        return {"name": "parquet", "path": str(path), **options}

    return save


def test_npz_holds_out_a_seeded_stratified_test_set(npz, problem):
    data = npz(x=X, y=LABELS)
    result = problem(data=data, partition={"name": "iid", "num_clients": 4})
    assert len(result.test) == 12
    assert sum(map(len, result.clients)) == 48
    assert torch.bincount(result.test.targets()).tolist() == [4, 4, 4]
    assert result.num_outputs == result.num_classes == 3
    assert result.input_shape == (4,)
    again, other = problem(data=data), problem(data=data, seed=2)
    assert torch.equal(result.test.index, again.test.index)
    assert not torch.equal(result.test.index, other.test.index)
    held = problem(data={**data, "test_fraction": 0.5})
    assert len(held.test) == 30


def test_npz_with_a_test_set_trains_on_every_row(npz, problem):
    result = problem(data=npz(x=X, y=LABELS, x_test=X[:5], y_test=LABELS[:5]))
    assert sum(map(len, result.clients)) == 60
    x, y = result.test.batch(slice(None), torch.float64, "cpu")
    assert np.array_equal(x, X[:5])
    assert y.tolist() == [0, 1, 2, 0, 1]


def test_client_column_decides_the_split(npz, problem):
    client = np.array([7, 3, 5])[np.arange(60) % 3]
    data = npz(x=X, y=TARGETS, client=client, x_test=X[:1], y_test=TARGETS[:1])
    result = problem(data=data, partition="natural_id", likelihood="gaussian")
    assert [set(client[examples.index]) for examples in result.clients] == [{3}, {5}, {7}]
    assert sum(map(len, result.clients)) == 60
    assert result.label_counts is None
    assert result.num_classes is None
    same = problem(data=data, partition={"name": "iid", "num_clients": 3}, likelihood="gaussian")
    assert len(same.clients) == 3
    with pytest.raises(InputError, match=r"partition\.num_clients=4: .*3 distinct ids"):
        problem(data=data, partition={"name": "iid", "num_clients": 4}, likelihood="gaussian")


def test_a_client_that_lost_every_row_is_dropped_with_a_warning(npz, problem, caplog):
    client = np.minimum(np.arange(60), 1)  # client 0 holds one row
    data = npz(x=X, y=TARGETS, client=client, x_test=X[:1], y_test=TARGETS[:1])
    result = problem(data={**data, "fraction": 0.25}, likelihood="gaussian")
    assert caplog.messages == ["1 of 2 clients got no example and are left out (0); 1 remain"]
    assert [len(examples) for examples in result.clients] == [15]
    assert result.client_names == ["1"]


def test_two_dimensional_targets(npz, problem):
    result = problem(data=npz(x=X, y=RNG.normal(size=(60, 2))), likelihood="gaussian")
    x, y = result.clients[0].batch(slice(0, 3), torch.float32, "cpu")
    assert result.num_outputs == 2
    assert y.shape == (3, 2)
    assert result.likelihood.loss(result.build_model(1)(x), y).shape == ()


def test_npz_keeps_float32_and_bytes(npz, problem):
    assert problem(data=npz(x=X.astype(np.float32), y=LABELS)).test.x.dtype == torch.float32
    data = npz(x=np.full((60, 1, 2, 2), 255, dtype=np.uint8), y=LABELS)
    result = problem(data={**data, "scaling": "unit"})
    assert result.test.x.dtype == torch.uint8
    assert result.test.batch(slice(0, 1), torch.float32, "cpu")[0].tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


def test_scaling_statistics_come_from_training_rows_only(npz, problem):
    data = npz(x=X, y=TARGETS, x_test=X + 100, y_test=TARGETS)
    result = problem(data={**data, "scaling": "standardize"}, likelihood="gaussian", validation=0.25)
    train = np.concatenate([examples.index for examples in result.clients])
    np.testing.assert_allclose(result.scaling.offset, X[train].mean(0), rtol=1e-12)
    np.testing.assert_allclose(1 / result.scaling.factor, X[train].std(0), rtol=1e-12)


def bad(array, row):
    array = array.astype(np.float64).copy()
    array[row] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "likelihood", "message"),
    [
        ({"x": X}, "gaussian", "holds no array 'y'; found: x"),
        ({"x": X, "y": TARGETS, "clients": LABELS}, "gaussian", "unknown array 'clients': did you mean 'client'"),
        ({"x": X, "y": TARGETS, "x_test": X}, "gaussian", "only one of x_test and y_test"),
        ({"x": bad(X, 17), "y": TARGETS}, "gaussian", r"data\.x=not finite in row 17: .*1 of 60"),
        ({"x": X, "y": bad(TARGETS, 5)}, "gaussian", r"data\.y=not finite in row 5"),
        ({"x": X, "y": TARGETS, "x_test": bad(X, 2), "y_test": TARGETS}, "gaussian", "x_test=not finite in row 2"),
        ({"x": X, "y": TARGETS[:9]}, "gaussian", r"data\.y=9 rows: x has 60"),
        ({"x": X[:0], "y": TARGETS[:0]}, "gaussian", "holds no data"),
        ({"x": X.astype(str), "y": TARGETS}, "gaussian", r"data\.x=array of <U\d+: must hold numbers"),
        ({"x": X, "y": TARGETS, "x_test": X[:, :2], "y_test": TARGETS}, "gaussian", r"x_test=rows of shape \(2,\)"),
        ({"x": X, "y": TARGETS, "client": LABELS[:3]}, "gaussian", r"data\.client=.*one id for each of the 60"),
        ({"x": X, "y": TARGETS, "client": TARGETS}, "gaussian", r"data\.client=array of float64"),
        ({"x": X, "y": LABELS}, "gaussian", "likelihood=gaussian: needs float targets"),
        ({"x": X, "y": TARGETS}, "categorical", "likelihood=categorical: needs whole-number labels"),
        (
            {"x": X, "y": LABELS - 1},
            "categorical",
            r"y of row 0 is -1: name them in order with data\.classes=\[-1,0,1\]$",
        ),
        ({"x": X, "y": LABELS * 2 - 1.0}, "categorical", r"data\.classes=\[-1,1,3\]$"),
        ({"x": X, "y": np.arange(60) // 2 - 9}, "categorical", r"data\.classes=\[\.\.\.\]$"),
        ({"x": np.zeros((60, 16, 20, 1)), "y": LABELS}, "categorical", r"numpy\.transpose\(x, \(0, 3, 1, 2\)\)"),
        ({"x": X, "y": LABELS * 1000}, "categorical", "number the classes consecutively"),
        ({"x": X, "y": LABELS * 0}, "categorical", "at least two classes"),
        ({"x": X[:2], "y": LABELS[:2]}, "categorical", "test_fraction=0.2: leaves 2 of 2 rows"),
        ({"x": np.array([{}] * 3), "y": LABELS[:3]}, "categorical", "not a readable .npz file of plain arrays"),
    ],
)
def test_npz_errors(npz, problem, arrays, likelihood, message):
    with pytest.raises(InputError, match=message):
        problem(data=npz(**arrays), likelihood=likelihood, partition={"name": "iid", "num_clients": 2})


def test_path_errors(tmp_path, problem):
    (tmp_path / "text.npz").write_text("no arrays")
    np.save(tmp_path / "single.npy", X)
    for name, path, message in [
        ("npz", None, r"data\.path=None: needs a \.npz file"),
        ("npz", tmp_path / "missing.npz", r"missing\.npz: does not exist; needs a \.npz file"),
        ("npz", tmp_path, "is a folder"),
        ("npz", tmp_path / "text.npz", "not a readable .npz"),
        ("npz", tmp_path / "single.npy", "holds a single array"),
        ("parquet", None, "needs a .parquet table"),
        ("parquet", tmp_path / "text.npz", "not a readable Parquet table"),
    ]:
        options = {"target": "y"} if name == "parquet" else {}
        with pytest.raises(InputError, match=message):
            problem(data={"name": name, "path": None if path is None else str(path), **options})


def test_parquet_columns(table, problem):
    columns = {"a": X[:, 0], "b": np.arange(60), "y": TARGETS, "site": [f"s{k % 4}" for k in range(60)]}
    data = table(columns, target="y", client="site")
    result = problem(data=data, likelihood="gaussian")
    assert len(result.clients) == 4
    assert result.input_shape == (2,)
    assert len(result.test) == 12
    rows = result.clients[1].index
    assert all(row % 4 == 1 for row in rows)
    x, y = result.clients[1].batch(slice(None), torch.float64, "cpu")
    assert np.array_equal(x, np.stack([X[rows, 0], rows], axis=1))
    assert np.array_equal(y, TARGETS[rows])
    single = problem(data={**data, "features": ["b"], "client": None}, likelihood="gaussian")
    assert single.input_shape == (1,)
    assert len(single.clients) == 10


def test_parquet_classification(table, problem):
    split = {"name": "dirichlet_sizes_and_classes", "num_clients": 2}
    result = problem(data=table({"a": X[:, 0], "y": LABELS}, target="y"), partition=split)
    assert result.num_classes == 3
    assert result.label_counts.sum() == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, r"data\.target=None: must name a column; the table has a, y, word"),
        ({"target": "Y"}, r"data\.target=Y: no such column"),
        ({"target": "y", "features": ["aa"]}, r"data\.features=aa: .*did you mean 'a'"),
        ({"target": "y", "features": "a"}, r"data\.features=a: must be a list"),
        ({"target": "y", "features": ["a", "y"]}, r"data\.features=y: is also the target"),
        (
            {"target": "y"},
            r"data\.features=word: column must hold numbers, holds string; name .* data\.features=\[\.\.\.\]$",
        ),
        ({"target": "word", "features": ["a"]}, r"data\.target=word: column must hold numbers"),
        ({"target": "y", "features": ["hole"]}, r"data\.x=not finite in row 2"),
        ({"target": "y", "features": ["a"], "client": "hole"}, r"data\.client=hole: 1 rows have no client id"),
        ({"target": "y", "features": ["a"], "test_fraction": 1.0}, r"data\.test_fraction=1\.0"),
    ],
)
def test_parquet_errors(table, problem, options, message):
    columns = {"a": [1.0, 2.0, 3.0], "y": [0.0, 1.0, 2.0], "word": ["u", "v", "w"]}
    if "hole" in str(options):
        columns["hole"] = [1, 2, None]
    with pytest.raises(InputError, match=message):
        problem(data=table(columns, **options), likelihood="gaussian")
