"""What leaves a node when something is wrong with its data or its solver: no path, name, row or label of the data."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.serde import error_to_proto, recorddict_to_proto

from bayesfed import wire
from bayesfed.deployment import apps
from bayesfed.deployment.told import told
from bayesfed.errors import InputError
from bayesfed.wire import BadMessage, Diverged
from bayesfed.wire.flower_version import set_identity

SECRETS = ("patient", "Bern", "4711", "smoker", "allow_pickle", "clinic")  # in names, paths, labels and values
RUN = "data=npz model=linear likelihood=categorical partition=iid client.epochs=1 partition.num_clients=2"


def good(**changed) -> dict[str, np.ndarray]:
    g = np.random.default_rng(1)
    x = g.normal(size=(20, 3)).astype(np.float32)
    y = np.arange(20) % 2
    arrays = {"x": x, "y": y, "x_test": x[:6], "y_test": y[:6], **changed}
    return {name: array for name, array in arrays.items() if array is not None}


def hole(value: float) -> np.ndarray:
    x = good()["x"].copy()
    x[17, 1] = value
    return x


NPZ = {
    "unknown array": good(patient_names=np.array(["Bern"] * 20)),
    "no labels": good(y=None),
    "names as labels": good(y=np.array(["patient", "smoker"] * 10)),
    "objects": good(y=np.array([{"patient": 4711}] * 20, dtype=object)),
    "names as inputs": good(x=np.array([["Bern"] * 3] * 20)),
    "nan": good(x=hole(np.nan)),
    "negative labels": good(y=np.arange(20) - 4711),
    "huge labels": good(y=np.where(np.arange(20) == 17, 4711, 0)),
    "fractions": good(y=np.full(20, 4711.5)),
    "rows": good(y=np.zeros(19, dtype=int)),
    "other width": good(x_test=np.zeros((6, 5), dtype=np.float32)),
    "clients": good(client=np.array(["Bern"] * 19)),
}
FILES = {**NPZ, "no file": None, "not a zip": b"patient,smoker\nBern,4711\n", "cut off": b"PK\x03\x04 patient 4711"}


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """``ask(kind, file)``: the reply of a node with such a file, serialised."""
    set_identity()
    monkeypatch.setenv("BAYESFED_SITES", str(tmp_path / "sites"))
    folder = tmp_path / "clinic_Bern"
    folder.mkdir()

    def ask(kind: str, data, run: str = RUN, **node) -> tuple[Message, bytes]:
        path = folder / "patient4711.npz"
        if isinstance(data, dict):
            np.savez(path, **data)
        elif data is not None:
            path.write_bytes(data)
        config = {"partition-id": 1, "data-path": str(path), "device": "cpu", **node}
        context = Context(run_id=7, node_id=1, node_config=config, state=RecordDict(), run_config={"overrides": run})
        content = RecordDict()
        if kind == "train":
            method = {
                "name": "bayes_admm",
                "round": 1,
                "accepted": 0,
                "durable": 0,
                "rho": 1.0,
                "damping": 0.0,
                "temperature": 1.0,
                "proximal": 0.0,
                "learn_precision": True,
                "lr_factor": 1.0,
            }
            ones = wire.torch.ones(8)
            content = RecordDict(
                {"method": ConfigRecord(method), "posterior": wire.pack({"mean": 0 * ones, "precision": ones})}
            )
        message = Message(content, 1, kind, group_id="1")
        reply = apps.client(message, context)
        proto = error_to_proto(reply.error) if reply.has_error() else recorddict_to_proto(reply.content)
        return reply, proto.SerializeToString()

    return ask


@pytest.mark.parametrize(
    ("kind", "file"), [*(("query", file) for file in FILES), *(("train", f) for f in ("nan", "huge labels", "no file"))]
)
def test_nothing_of_a_broken_file_leaves_the_node(ask, caplog, kind: str, file: str) -> None:
    caplog.set_level(logging.INFO)
    reply, sent = ask(kind, FILES[file])
    assert not [secret for secret in SECRETS if secret.encode() in sent], sent
    assert b"17" not in sent  # the row
    if reply.has_error():
        assert reply.error.reason.startswith("InputError: "), reply.error.reason
        assert f"{kind} message: InputError: " in caplog.text  # the whole sentence, on the node


@pytest.mark.parametrize("raises", [RuntimeError, KeyError, MemoryError, OSError, IndexError, np.linalg.LinAlgError])
def test_nothing_of_what_a_solver_raises_leaves_the_node(ask, caplog, monkeypatch, raises) -> None:
    class Own(raises):
        pass

    def solve(self, problem):
        raise Own(f"patient 4711 of Bern: {problem.data.y.tolist()}")

    monkeypatch.setattr("clients.ivon.IVONSolver.solve", solve)
    reply, sent = ask("train", good())
    assert reply.error.reason == "Own; the node's own log says more"
    assert b"4711" not in sent
    assert "patient 4711 of Bern" in caplog.text


def test_a_good_reply_holds_numbers_only(ask) -> None:
    for kind in ("query", "train"):
        reply, sent = ask(kind, good())
        assert not reply.has_error(), reply.error
        assert not [secret for secret in SECRETS if secret.encode() in sent]
        for name, record in reply.content.items():
            if name != "posterior":
                assert all(isinstance(value, int | float) for value in record.values())


def test_which_node_options_are_wrong_is_told_without_their_values(ask) -> None:
    for node, field in (({"partition-id": "Bern-4711"}, "partition-id"), ({"device": "patient"}, "device")):
        reply, sent = ask("query", good(), **node)
        assert f"InputError: {field} can't be used" in reply.error.reason
        assert not [secret for secret in SECRETS if secret.encode() in sent]


def test_a_name_that_is_no_key_of_ours_is_not_told() -> None:
    assert "patient" not in told(InputError("patient_names", 3, "must be absent"))
    assert told(InputError("data.path", "/home/bern", "no such file")) == (
        "InputError: data.path can't be used as it is on this node; the node's own log says why"
    )


def test_what_the_server_sent_is_told_as_it_is() -> None:
    assert told(BadMessage("value 'rho' is missing")) == "BadMessage: value 'rho' is missing"
    assert told(Diverged("the site is not finite")) == "Diverged: the site is not finite"

    class Own(BadMessage):
        pass

    assert told(Own("patient 4711")) == "Own; the node's own log says more"
