"""Arrays and tables of every make: the values that reach the examples are those of the file, or one line says why
not.
"""

from __future__ import annotations

import datetime
import itertools
import warnings
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bayesfed.errors import InputError

RNG = np.random.default_rng(0)
N = 40
LABELS = np.arange(N) % 3


@pytest.fixture
def npz(tmp_path, problem):
    """``npz(x=..., y=...)``: the problem of such a file; keys of ``options`` are the data group's."""

    def load(likelihood="categorical", options=None, **arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        data = {"name": "npz", "path": str(tmp_path / "data.npz"), **(options or {})}
        return problem(data=data, partition={"name": "iid", "num_clients": 2}, likelihood=likelihood)

    return load


@pytest.fixture
def table(tmp_path, problem):
    """``table(pa.table(...), target="y")``: the problem of a Parquet file, of the same as CSV with ``csv=True``."""

    def load(columns, *, csv=False, likelihood="categorical", partition=None, **options):
        made = columns if isinstance(columns, pa.Table) else pa.table(columns)
        path = tmp_path / ("data.csv" if csv else "data.parquet")
        if csv:
            import pyarrow.csv

            pyarrow.csv.write_csv(made, path)
        else:
            pq.write_table(made, path)
        data = {"name": "csv" if csv else "parquet", "path": str(path), "target": "y", **options}
        return problem(data=data, partition=partition or {"name": "iid", "num_clients": 2}, likelihood=likelihood)

    return load


def rows_of(problem) -> tuple[torch.Tensor, list]:
    """All inputs and class names (or targets) as the examples give them, in the order of the file."""
    parts = [*problem.clients, problem.test]
    index = torch.cat([part.index for part in parts])
    x, y = (
        torch.cat(each) for each in zip(*(part.batch(slice(None), torch.float64, "cpu") for part in parts), strict=True)
    )
    order = index.argsort()
    names = problem.classes or [str(c) for c in range(problem.num_classes or 0)]
    return x[order], [names[int(c)] for c in y[order]] if problem.num_classes else y[order].tolist()


DTYPES = [
    "bool",
    "u1",
    "i1",
    "<u2",
    ">i2",
    "i4",
    "<u4",
    ">i8",
    "u8",
    "f2",
    ">f2",
    "f4",
    ">f4",
    "f8",
    ">f8",
    "g",
    "c8",
    "M8[D]",
    "m8[s]",
    "U3",
    "S3",
]
SHAPES = [(N,), (N, 1), (N, 3), (N, 4, 4), (N, 3, 4, 4), (N, 6, 6, 3), (N, 0), (0, 3), (), (N - 1, 3)]
CLASSES = {
    "zero-based": LABELS,
    "one-based": LABELS + 1,
    "gaps": np.array([2, 5, 9])[LABELS],
    "negative": LABELS - 1,
    "text": np.array(["cat", "dog", "eel"])[LABELS],
    "bytes": np.array([b"cat", b"dog", b"eel"])[LABELS],
    "bool": LABELS > 0,
    "column": (LABELS + 1)[:, None],
    "one-hot": np.eye(3)[LABELS],
    "one-hot int": np.eye(3, dtype=int)[LABELS],
    "floats": LABELS.astype("f4"),
    "halves": LABELS / 2,
    "big-endian": LABELS.astype(">i2"),
    "one class": LABELS * 0 + 1,
    "no class": LABELS * 0,
    "empty text": np.array(["cat", "dog", ""])[LABELS],
    "dates": LABELS.astype("M8[D]"),
    "two columns": np.stack([LABELS, LABELS], 1),
    "nan": np.where(LABELS, LABELS, np.nan),
    "counts": LABELS * 1000,
}
REFUSED_CLASSES = {"negative", "halves", "one class", "no class", "empty text", "dates", "two columns", "nan", "counts"}


def text(label) -> str:
    plain = label.item() if isinstance(label, np.generic) else label
    return plain.decode() if isinstance(plain, bytes) else str(int(plain)) if isinstance(plain, float) else str(plain)


def expected(y: np.ndarray) -> list[str]:
    if y.ndim == 2:
        y = y[:, 0] if y.shape[1] == 1 else y.argmax(1)
    return [text(label) for label in y]


def refused(load) -> None:
    """One line, and no advice to unpickle what a stranger wrote."""
    with pytest.raises(InputError) as error:
        load()
    assert "\n" not in str(error.value)
    assert "pickle" not in str(error.value)


@pytest.mark.parametrize(("dtype", "shape"), itertools.product(DTYPES, SHAPES))
def test_inputs(npz, dtype, shape):
    x = np.asarray(RNG.integers(0, 2 if dtype == "bool" else 100, shape)).astype(dtype)
    bad_shape = shape in [(N, 6, 6, 3), (N, 0), (0, 3), (), (N - 1, 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if bad_shape or np.dtype(dtype).kind not in "fiub":
            refused(lambda: npz(x=x, y=LABELS))
            return
        found, labels = rows_of(npz(x=x, y=LABELS))
    assert found.shape[0] == N
    assert np.array_equal(found.numpy().reshape(x.shape), x.astype(np.float64))
    assert labels == expected(LABELS)


@pytest.mark.parametrize("kind", CLASSES)
def test_labels(npz, kind):
    y, x = CLASSES[kind], RNG.normal(size=(N, 2))
    if kind in REFUSED_CLASSES:
        refused(lambda: npz(x=x, y=y))
        return
    problem = npz(x=x, y=y)
    found, labels = rows_of(problem)
    assert np.array_equal(found, x)
    assert labels == expected(y)
    assert problem.num_outputs == problem.label_counts.shape[1] == len(set(labels))
    named = problem.description().get("classes")
    assert named == (None if kind in ("zero-based", "floats", "big-endian") or "hot" in kind else sorted(set(labels)))


@pytest.mark.parametrize("order", ["C", "F", "reversed", "strided"])
@pytest.mark.parametrize("dtype", ["u1", "f4", ">f8"])
def test_layouts(npz, order, dtype):
    x = RNG.integers(0, 100, (N, 1, 4, 4)).astype(dtype)
    x = {"C": x, "F": np.asfortranarray(x), "reversed": x[:, :, ::-1], "strided": np.repeat(x, 2, axis=3)[..., ::2]}[
        order
    ]
    assert np.array_equal(rows_of(npz(x=x, y=LABELS))[0], x.astype(np.float64))


@pytest.mark.parametrize(
    ("x", "test"),
    [
        (np.arange(2 * N).astype("u1"), np.linspace(0, 1, 2 * N)),
        (np.arange(2 * N).astype("u1"), np.arange(300, 300 + 2 * N)),
        (np.linspace(0, 1, 2 * N).astype("f4"), np.linspace(0, 1, 2 * N) / 3),
        (np.linspace(0, 1, 2 * N), np.arange(2 * N).astype("u1")),
        (np.arange(2 * N) % 2 == 0, np.arange(2 * N) / 7),
        (np.arange(2 * N) / 7, np.arange(2 * N) % 2 == 0),
    ],
)
def test_a_test_set_of_another_type_keeps_its_values(npz, x, test):
    x, test = x.reshape(N, 2), test.reshape(N, 2)
    problem = npz(x=x, y=LABELS, x_test=test, y_test=LABELS)
    assert np.array_equal(problem.test.batch(slice(None), torch.float64, "cpu")[0], test.astype(np.float64))
    assert np.array_equal(problem.clients[0].x, x.astype(np.float64))


def test_a_test_set_on_another_scale_is_named(npz, caplog):
    x = RNG.integers(0, 256, (N, 4)).astype(np.uint8)
    npz(x=x, y=LABELS, x_test=x / 255, y_test=LABELS, options={"scaling": "unit"})
    assert [m for m in caplog.messages if "were they scaled alike?" in m]
    caplog.clear()
    npz(x=x / 255, y=LABELS, x_test=x / 200, y_test=LABELS)
    assert caplog.messages == []


@pytest.mark.parametrize(("dtype", "scaled"), [("bool", 1.0), ("u1", 1 / 255)])
def test_unit_scaling_leaves_booleans_as_they_are(npz, dtype, scaled):
    x = (np.arange(2 * N).reshape(N, 2) % 3 == 0).astype(dtype)
    found, _ = rows_of(npz(x=x, y=LABELS, options={"scaling": "unit"}))
    assert np.allclose(found, x * scaled, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("given", "y", "names"),
    [
        (4, LABELS, None),
        (3, np.array([0, 2])[LABELS % 2], None),
        (["no", "yes"], np.array(["yes", "no"])[LABELS % 2], ["no", "yes"]),
        ([1, 2, 3, 4], LABELS + 1, ["1", "2", "3", "4"]),
        ([-1, 1], 2 * (LABELS > 0) - 1.0, ["-1", "1"]),
        ([True, False], LABELS > 0, ["True", "False"]),
        (["a", "b", "c"], np.eye(3)[LABELS], ["a", "b", "c"]),
        (2, np.array(["yes", "no"])[LABELS % 2], ["no", "yes"]),
    ],
)
def test_classes_that_are_given(npz, given, y, names):
    problem = npz(x=RNG.normal(size=(N, 2)), y=y, options={"classes": given})
    assert problem.classes == names
    assert problem.num_outputs == (given if isinstance(given, int) else len(given))
    labels = rows_of(problem)[1]
    assert labels == ([names[k] for k in LABELS] if y.ndim == 2 else expected(y))


@pytest.mark.parametrize(
    ("given", "y", "reason"),
    [
        (2, LABELS, "y of row 2 is 2"),
        (["a", "b"], np.array(["a", "b", "c"])[LABELS], "y of row 2 is c, none of them"),
        (["a", "a"], LABELS, "twice"),
        (3, np.array(["yes", "no"])[LABELS % 2], "name them all"),
        ("ab", LABELS, "must be a list"),
        (1, LABELS, ">= 2"),
        ([0, 1], np.eye(3)[LABELS], "one-hot"),
    ],
)
def test_classes_that_do_not_fit(npz, given, y, reason):
    with pytest.raises(InputError, match=rf"data\.classes=.*{reason}"):
        npz(x=RNG.normal(size=(N, 2)), y=y, options={"classes": given})


def test_a_class_that_only_the_test_set_has(npz, caplog):
    names = np.array(["a", "b", "c"])
    problem = npz(x=RNG.normal(size=(N, 2)), y=names[LABELS % 2], x_test=RNG.normal(size=(N, 2)), y_test=names[LABELS])
    assert problem.classes == ["a", "b", "c"]
    assert problem.test.targets().tolist() == LABELS.tolist()
    assert caplog.messages == ["y_test has classes that y lacks, so that nobody learns them: c"]


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"x": 1e200}, r"data\.x=1e\+200 in row 7: column 1: beyond what float32 holds"),
        ({"x": 1e200, "scaling": "standardize"}, r"data\.scaling=standardize: the values spread too far"),
        ({"y": -1e300}, r"data\.y=-1e\+300 in row 7: beyond what float32"),
        ({"x_test": 1e39}, r"data\.x_test=1e\+39 in row 7"),
        ({"x": 2**60 + 1, "dtype": np.int64}, r"data\.x=not exact in row 7: column 1: .*2\*\*53"),
    ],
)
def test_values_that_the_runs_numbers_do_not_hold(npz, config, changes, where):
    changes = dict(changes)
    dtype = changes.pop("dtype", np.float64)
    arrays = {"x": np.ones((N, 2), dtype), "y": np.ones(N), "x_test": np.ones((N, 2)), "y_test": np.ones(N)}
    options = {"scaling": changes.pop("scaling", "raw")}
    for name, value in changes.items():
        arrays[name].reshape(N, -1)[7, -1] = value
    with pytest.raises(InputError, match=where):
        npz("gaussian", options, **arrays)


def test_float64_runs_hold_more(config, tmp_path):
    from bayesfed.problem.build import build_problem

    x = np.full((N, 1), 1e200)
    np.savez(tmp_path / "d.npz", x=x, y=LABELS)
    groups = config(data={"name": "npz", "path": str(tmp_path / "d.npz")}, partition={"name": "iid", "num_clients": 2})
    assert float(build_problem({**groups, "dtype": "float64"}, 1).test.x.max()) == 1e200


@pytest.mark.parametrize(
    ("x", "y", "likelihood", "said"),
    [
        (1.0, 1.0, "gaussian", ()),
        (1e6, 1.0, "gaussian", ("inputs are of size", "column 1")),
        (1e-4, 1.0, "gaussian", ("inputs are of size",)),
        (1.0, 5e5, "gaussian", ("targets are of size",)),
        (300.0, 5e5, "gaussian", ("inputs", "targets")),
        (300.0, None, "categorical", ("inputs",)),
    ],
)
def test_one_warning_where_sizes_are_far_from_one(npz, caplog, x, y, likelihood, said):
    inputs = RNG.normal(size=(N, 2)) * [min(x, 1.0), x]
    npz(likelihood, x=inputs, y=LABELS if y is None else RNG.normal(size=N) * y)
    assert len(caplog.messages) == bool(said)
    assert all(part in caplog.messages[0] for part in said)
    caplog.clear()
    npz(likelihood, {"scaling": "standardize"}, x=inputs, y=LABELS if y is None else RNG.normal(size=N))
    assert caplog.messages == []


COLUMNS = {
    "bool": pa.array([k % 2 == 0 for k in range(N)]),
    "uint64": pa.array(range(N), pa.uint64()),
    "half": pa.array(np.arange(N, dtype="f2")),
    "decimal": pa.array([Decimal(k) / 4 for k in range(N)]),
    "category": pa.array([k % 5 for k in range(N)]).dictionary_encode(),
    "nullable": pa.array(range(N), pa.int64()),
    "hole": pa.array([None if k == 4 else k for k in range(N)]),
    "hollow bool": pa.array([None if k == 4 else k % 2 == 0 for k in range(N)]),
    "huge": pa.array([2**60 + 1] * N),
    "date": pa.array([datetime.date(2020, 1, 1)] * N),
    "word": pa.array(["a"] * N),
    "list": pa.array([[1.0]] * N),
    "null": pa.nulls(N),
}
REFUSED = {
    "hole": "column 'hole'",
    "hollow bool": "column 'hollow bool'",
    "huge": "huge",
    "date": "days since",
    "word": "must hold numbers",
    "list": "must hold numbers",
    "null": "must hold numbers",
}


@pytest.mark.parametrize("name", COLUMNS)
def test_columns(table, name):
    values = COLUMNS[name]
    columns = {"a": np.arange(N) / 8, name: values, "y": LABELS}
    if name in REFUSED:
        with pytest.raises(InputError, match=REFUSED[name]) as error:
            table(columns)
        assert "\n" not in str(error.value)
        return
    found, labels = rows_of(table(columns))
    assert np.array_equal(found, np.stack([np.arange(N) / 8, [float(v) for v in values.to_pylist()]], 1))
    assert labels == expected(LABELS)


@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("kind", ["zero-based", "one-based", "gaps", "text", "bool", "floats"])
def test_label_columns(table, kind, csv):
    y = CLASSES[kind]
    assert rows_of(table({"a": np.arange(N) / 8, "y": y}, csv=csv))[1] == expected(y)


@pytest.mark.parametrize("csv", [False, True])
@pytest.mark.parametrize("ids", ["names", "padded", "numbers", "floats", "holes"])
def test_client_columns(table, ids, csv):
    which = np.arange(N) % 4
    client = {
        "names": np.array(["Ulm", "Köln", "Aachen", "Berlin"])[which].tolist(),
        "padded": np.array(["007", "7", "07", "0"])[which].tolist(),
        "numbers": np.array([2, 10, 33, 1])[which],
        "floats": np.array([2.0, 10.0, 33.0, 1.0])[which],
        "holes": [None, *which[1:].tolist()],
    }[ids]
    columns = {"a": np.arange(N) / 8, "y": LABELS, "client": client}
    if ids == "holes":
        with pytest.raises(InputError, match=r"data\.client=client: 1 rows have no client id"):
            table(columns, csv=csv, client="client", partition="natural_id")
        return
    problem = table(columns, csv=csv, client="client", partition="natural_id")
    names = {"names": ["Aachen", "Berlin", "Köln", "Ulm"], "padded": ["0", "007", "07", "7"]}.get(
        ids, ["1", "2", "10", "33"]
    )
    assert problem.client_names == names
    for name, examples in zip(names, problem.clients, strict=True):
        assert {str(client[row]).removesuffix(".0") for row in examples.index.tolist()} == {name}


def test_the_index_that_pandas_stores_is_no_feature(tmp_path, problem, caplog):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": RNG.normal(size=N), "y": LABELS})
    plain = {"target": "y", "name": "parquet"}
    shuffled = frame[frame.a > -9].sample(frac=1, random_state=0)
    for number, (made, options, kept) in enumerate(
        [
            (shuffled, {}, [shuffled.a]),
            (frame.set_index(pandas.Index(RNG.permutation(N), name="patient")), {}, [frame.a]),
            (shuffled, {"features": ["a", "__index_level_0__"]}, [shuffled.a, shuffled.index]),
            (frame.set_index(pandas.Index(np.arange(N) % 2, name="site")), {"client": "site"}, [frame.a]),
        ]
    ):
        path = tmp_path / f"{number}.parquet"
        made.to_parquet(path)
        found = problem(
            data={**plain, "path": str(path), **options}, partition="natural_id" if "client" in options else "iid"
        )
        assert np.array_equal(rows_of(found)[0], np.stack(kept, 1))
    assert [text for text in caplog.messages if "no feature" in text and "'patient'" in text]
    frame.to_csv(tmp_path / "with_index.csv")
    found = problem(data={"name": "csv", "path": str(tmp_path / "with_index.csv"), "target": "y"})
    assert np.array_equal(rows_of(found)[0], frame[["a"]])


@pytest.mark.parametrize("kind", ["csv", "parquet", "csv.gz"])
def test_a_folder_of_files_is_one_table(tmp_path, problem, kind):
    import pyarrow.csv

    folder = tmp_path / "parts"
    a = np.arange(N) / 8
    for part, site in enumerate(["Ulm", "Aachen"]):
        rows = slice(part * N // 2, (part + 1) * N // 2)
        (folder / f"site={site}").mkdir(parents=True)
        made = pa.table({"a": a[rows], "y": LABELS[rows]} if part else {"y": LABELS[rows], "a": a[rows]})
        path = folder / f"site={site}" / f"part-{part}.{kind}"
        if kind == "parquet":
            pq.write_table(made, path)
        else:
            with pa.output_stream(str(path)) as stream:
                pyarrow.csv.write_csv(made, stream)
    (folder / "_SUCCESS").write_text("")
    data = {"name": "csv", "path": str(folder), "target": "y", "client": "site"}
    found = problem(data=data, partition="natural_id")
    assert found.client_names == ["Aachen", "Ulm"]
    x, labels = rows_of(found)
    halves = [np.arange(N // 2, N), np.arange(N // 2)]  # by the folders' names
    assert np.array_equal(x[:, 0], np.concatenate([a[half] for half in halves]))
    assert labels == expected(np.concatenate([LABELS[half] for half in halves]))
    (folder / "site=Ulm" / f"odd.{'csv' if 'csv' in kind else kind}").write_bytes(b"b\n1\n" if "csv" in kind else b"no")
    with pytest.raises(InputError, match="odd"):
        problem(data=data, partition="natural_id")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_separators(tmp_path, problem, mark):
    path = tmp_path / "t.csv"
    path.write_text(
        "\ufeffa,y\n".replace(",", mark) + "".join(f"{k / 8}{mark}{'uv'[k % 2]}\n" for k in range(N)), encoding="utf-8"
    )
    x, labels = rows_of(problem(data={"name": "csv", "path": str(path), "target": "y"}))
    assert np.array_equal(x[:, 0], np.arange(N) / 8)
    assert labels == ["uv"[k % 2] for k in range(N)]


@pytest.mark.parametrize(
    ("content", "options", "reason"),
    [
        (b"a,a,y\n1,2,0\n", {}, "two columns 'a'"),
        (b"a,y\n1,0\n2\n", {}, "not a readable CSV table"),
        (b"", {}, "not a readable CSV"),
        (b"a,y\n\xff\xfe,0\n2,1\n", {}, "must hold numbers"),
        (b"a,y\n1,0\n,1\n2,1\n", {}, "not finite in row 1"),
        (b"a,y\n", {}, "holds no data|must hold"),
        (b"a,y\n1,0\n2,1\n", {"features": ["a", "a"]}, "names a column twice"),
        (b"a,y\n2020-01-01,0\n2020-01-02,1\n", {}, "days since"),
        (b"a,y\n1,\n2,cat\n3,dog\n", {}, "data.y=missing in row 0"),
    ],
)
def test_odd_csv_files(tmp_path, problem, content, options, reason):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as error:
        problem(
            data={"name": "csv", "path": str(path), "target": "y", **options},
            partition={"name": "iid", "num_clients": 1},
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda p: p.write_bytes(b"no zip"), "it is no zip archive; write it with numpy.savez"),
        (lambda p: np.savez(p, x=np.array([{}] * 3), y=LABELS[:3]), "'x' holds Python objects; store numbers or text"),
        (lambda p: (np.savez(p, x=np.ones((N, 2)), y=LABELS), p.write_bytes(p.read_bytes()[:300])), "no zip archive"),
    ],
)  # fmt: skip
def test_unreadable_npz_files(tmp_path, problem, write, reason):
    write(tmp_path / "d.npz")
    with pytest.raises(InputError, match=reason) as error:
        problem(data={"name": "npz", "path": str(tmp_path / "d.npz")})
    assert "pickle" not in str(error.value)
