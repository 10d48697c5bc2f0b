"""Real processes over gRPC with TLS and authentication: the same bits as in one process, and strangers stay out."""

from __future__ import annotations

import numpy as np
import pytest

import bayesfed

pytestmark = pytest.mark.deployment
RUN = ["data=npz", "model=linear", "likelihood=categorical", "partition=iid", "rounds=2", "client.epochs=1", "eval.samples=4"]  # fmt: skip


def write_data(folder) -> None:
    """One file with everything and a client column, and one for each client with its rows only; all share the test set."""
    g = np.random.default_rng(5)
    centres = g.normal(size=(3, 6)).astype(np.float32)
    y, test_y = g.integers(0, 3, 120), np.arange(30) % 3
    x = (centres[y] + g.normal(size=(120, 6))).astype(np.float32)
    test_x = (centres[test_y] + g.normal(size=(30, 6))).astype(np.float32)
    client = np.sort(g.integers(0, 3, 120))
    np.savez(folder / "all.npz", x=x, y=y, client=client, x_test=test_x, y_test=test_y)
    for k in range(3):
        np.savez(folder / f"client{k}.npz", x=x[client == k], y=y[client == k], x_test=test_x, y_test=test_y)


def test_same_bits_as_in_one_process(loopback, digest) -> None:
    """Each SuperNode holds its own file; the server's file serves for evaluation."""
    folder = loopback.folder
    write_data(folder)
    for k in range(3):
        loopback.supernode(k + 1, f'partition-id={k} data-path="{folder}/client{k}.npz" device="cpu"')
    overrides = [*RUN, f"data.path={folder}/all.npz", "device=cpu"]
    inline = bayesfed.run([*overrides, "display=false", "figures=false", f"hydra.run.dir={folder}/inline"])
    done = loopback.deploy(*overrides, "figures=false", "hydra.run.dir=deployed")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + loopback.log("supernode1")[-2000:]
    assert digest(folder / "runs" / "deployed") == digest(inline.run_dir)
    names = {path.parent.name for path in (folder / "sites").rglob("*.safetensors")}
    assert names == {"client-00000", "client-00001", "client-00002"}
