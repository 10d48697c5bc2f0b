"""Nodes whose own files hold some of the classes only, and files that don't fit the federation's problem."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flwr.app import Context, Message, RecordDict

from bayesfed.deployment import apps
from bayesfed.errors import InputError, RunFailed
from bayesfed.wire.flower_version import set_identity

RNG = np.random.default_rng(0)
CENTRES = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 4.0]])
RUN = "data=npz model=linear likelihood=categorical strategy=fedavg client.lr=0.1 rounds=3 figures=false eval.samples=2"


class Deployed:
    """A grid of nodes that read the files of their own, in this process."""

    def __init__(self, overrides: str, nodes: list[dict]):
        self.overrides, self.nodes = overrides, nodes

    def get_node_ids(self):
        return range(1, len(self.nodes) + 1)

    def send_and_receive(self, messages, *, timeout=None) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            config = {"device": "cpu", **self.nodes[node - 1]}
            context = Context(
                run_id=7,
                node_id=node,
                node_config=config,
                state=RecordDict(),
                run_config={"overrides": self.overrides, "run-dir": "r"},
            )
            yield apps._answered(message, context)

    def stream(self, messages, *, timeout=None):
        return self.send_and_receive(messages, timeout=timeout)


def examples(classes, count: int, names=None, features: int = 2):
    y = np.arange(count) % len(classes)
    label = np.asarray(classes)[y]
    x = np.pad(CENTRES[label] + RNG.normal(size=(count, 2)), ((0, 0), (0, features - 2)))
    return {"x": x, "y": label if names is None else np.asarray(names)[label]}


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """``federation({0: arrays, ...}, overrides)``: the session after its run; clients are nodes with those files."""
    monkeypatch.setenv("BAYESFED_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("bayesfed.federation.server.roster.time.sleep", lambda seconds: None)
    set_identity()

    def store(name: str, arrays: dict) -> str:
        path = tmp_path / name
        if "x" in arrays:
            np.savez(path.with_suffix(".npz"), **arrays)
            return str(path.with_suffix(".npz"))
        pq.write_table(pa.table(arrays), path.with_suffix(".parquet"))
        return str(path.with_suffix(".parquet"))

    def run(files: dict[int, dict], *overrides: str, names=None, everything=None):
        nodes = []
        for client, arrays in files.items():
            nodes.append(
                {"partition-id": client, "data-path": store(f"mine{client}", arrays), "sites": str(tmp_path / "s")}
            )
        whole = store("all", everything or examples([0, 1, 2], 300, names) | {"client": np.arange(300) % len(files)})
        text = " ".join([RUN, *overrides])
        context = Context(
            run_id=7, node_id=0, node_config={}, state=RecordDict(),
            run_config={"overrides": f"{text} data.path={whole}", "run-dir": "r"},
        )  # fmt: skip
        with apps.session_of(context) as session:
            session.strategy.timeout = 0.01
            session.serve(Deployed(text, nodes))
        return session

    return run


def replies(session) -> dict[int, int]:
    import json

    lines = [json.loads(line) for line in (session.directory.path / "clients.jsonl").read_text().splitlines()]
    return {
        c: sum(line["accepted"] for line in lines if line["client"] == c) for c in {line["client"] for line in lines}
    }


@pytest.mark.parametrize(
    ("names", "given"), [(None, "data.classes=3"), (["cat", "dog", "eel"], "data.classes=[cat,dog,eel]")]
)
def test_nodes_that_lack_a_class(federation, names, given):
    files = {0: examples([0, 1], 90, names), 1: examples([1, 2], 90, names), 2: examples([2], 60, names)}
    session = federation(files, given, names=names)
    assert replies(session) == {0: 3, 1: 3, 2: 3}
    assert session.problem.classes == names
    # every class is told apart, although no node knows all: the numbers mean the same everywhere
    assert session.summary("finished", 0.0)["mean/accuracy"] > 90


def test_without_the_key_the_reason_names_it(federation, caplog):
    session = federation({0: examples([0, 1, 2], 90), 1: examples([0, 1], 90)})
    assert replies(session) == {0: 3}
    assert any(
        "data of client 1 have 2 outputs, the federation has 3; data.classes" in text for text in caplog.messages
    )


def test_another_number_of_features(federation, caplog):
    session = federation({0: examples([0, 1, 2], 90), 1: examples([0, 1, 2], 90, features=5)}, "data.classes=3")
    assert replies(session) == {0: 3}
    assert any("data of client 1 have 5 features, the federation has 2" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("columns", "said"), [("ab", None), ("ba", "columns"), ("ac", "columns"), ("ab", "classes")]
)  # fmt: skip
def test_tables_whose_columns_or_classes_are_others(tmp_path, federation, monkeypatch, caplog, columns, said):
    """The numbers of features and outputs are the federation's either way."""
    names = ["cat", "dog", "eel"]

    def table(called):
        made = examples([0, 1, 2], 90, names)
        return {called[0]: made["x"][:, 0], called[1]: made["x"][:, 1], "y": made["y"]}

    if said == "classes":  # a node whose settings are not the run's
        config = apps.client_config
        monkeypatch.setattr(apps, "client_config", lambda context: reordered(config(context), context))

    def reordered(config, context):
        if context.node_config["partition-id"] == 1:
            config["data"]["classes"] = config["data"]["classes"][::-1]
        return config

    session = federation(
        {0: table("ab"), 1: table(columns)}, "data=parquet", "data.target=y", "partition.num_clients=2",
        "data.classes=[cat,dog,eel]", everything=table("ab"),
    )  # fmt: skip
    assert replies(session) == ({0: 3, 1: 3} if said is None else {0: 3})
    reason = (
        "the data of client 1 have other column or class names, or another order; "
        "data.features and data.classes say which"
    )
    assert any(reason in text for text in caplog.messages) == (said is not None)
    assert session.problem.columns == ["a", "b"]


def test_names_are_not_made_up_from_one_nodes_file(federation, caplog):
    """cat and eel would be 0 and 1 on a node that has no dog."""
    names = ["cat", "dog", "eel"]
    with pytest.raises(RunFailed, match=r"data\.classes"):
        federation({0: examples([0, 2], 60, names)}, names=names)


def test_labels_of_a_node_that_are_not_the_federations(federation):
    with pytest.raises(RunFailed, match=r"data\.classes"):
        federation({0: {**(mine := examples([0, 2], 60)), "y": mine["y"] + 1}}, "data.classes=3")
    with pytest.raises(InputError, match=r"data\.classes=2: needs labels 0\.\.1, y of row 2 is 2"):
        federation({0: examples([0, 1], 60)}, "data.classes=2")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"partition-id": 0}, "data-path=None: .*--node-config"),
        ({"data-path": "mine.npz"}, "needs partition-id in its node config"),
    ],
)
def test_a_node_that_lacks_a_setting(node, message, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    np.savez("mine.npz", **examples([0, 1, 2], 60))
    set_identity()
    query = Message(RecordDict(), 1, "query")
    context = Context(
        run_id=7,
        node_id=1,
        node_config={**node, "device": "cpu", "sites": "s"},
        state=RecordDict(),
        run_config={"overrides": RUN, "run-dir": "r"},
    )
    assert apps._answered(query, context).has_error()
    assert re.search(message, caplog.text)
    shared = Context(
        run_id=7,
        node_id=1,
        node_config={"device": "cpu", "sites": "s"},
        state=RecordDict(),
        run_config={"overrides": "experiment=linreg", "run-dir": "r"},
    )
    caplog.clear()
    assert apps._answered(query, shared).has_error()
    assert "partition-id in its node config" in caplog.text
