"""One Ray instance for all tests that need it: starting one takes seconds."""

import os

import pytest


@pytest.fixture(scope="session")
def ray_with_three_slots():
    import ray

    ray.init(num_cpus=max(os.cpu_count() or 1, 3), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
