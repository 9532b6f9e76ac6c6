"""Starts the studies of test_studies.py first, so that they run beside the tests of networks."""

import os
from pathlib import Path

import pytest
import torch

from tests.gpu import ON_GPU
from tests.gpu.started import STUDIES, Started


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Starts the studies that the collected tests ask for."""
    if ON_GPU and not torch.cuda.is_available():
        return
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    for name in sorted(wanted & STUDIES.keys()):
        request.getfixturevalue(name)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """One cache for all tests, or one that holds the images already."""
    return Path(os.environ.get("GPU_TESTS_DATA_DIR") or tmp_path_factory.mktemp("data"))


def _fixture(name):
    def started(data_dir, tmp_path_factory):
        study = Started(name, tmp_path_factory.mktemp(name), data_dir)
        yield study
        study.end()

    return pytest.fixture(scope="session", name=name)(started)


for _name in STUDIES:
    globals()[f"_{_name}"] = _fixture(_name)
