"""A run on an existing Ray cluster of two nodes gives the bits of an inline run."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bayesfed

RUN = [
    "experiment=digits_het10",
    "rounds=2",
    "client.epochs=1",
    "eval.every=9",
    "eval.samples=2",
    "display=false",
    "figures=false",
]

# In a process of its own: Ray's driver can be connected to one cluster at a time.
SCRIPT = """
import sys
from ray.cluster_utils import Cluster
import ray, bayesfed
from bayesfed.engine.ray_engine import RayEngine
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
bayesfed.run([*sys.argv[1:], "engine=ray", f"engine.address={cluster.address}"])
print(len(ray.nodes()), int(ray.cluster_resources()["CPU"]))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.engines
def test_two_nodes(tmp_path, digest):
    inline = bayesfed.run([*RUN, "engine=inline", f"hydra.run.dir={tmp_path / 'inline'}"]).run_dir
    command = [sys.executable, "-c", SCRIPT, *RUN, f"hydra.run.dir={tmp_path / 'cluster'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["2", "2"]  # one worker on each of two nodes
    assert digest(tmp_path / "cluster") == digest(inline)
