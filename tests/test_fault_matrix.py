"""The fault matrix in its short form; the whole of it is a command (tests/faults.py, RELIABILITY.md).

Of its faults, test_engine.py kills a worker, test_ddp.py one of a group, test_nodes.py a node, and
test_resume.py the driver.
"""

import pytest

from tests.faults import FAULTS, Undisturbed, inject

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("name", sorted({*FAULTS} - {"worker", "group", "raylet", "driver"}))
def test_fault_costs_nothing_that_was_reported(name, tmp_path, undisturbed):
    if reason := FAULTS[name].why_not():
        pytest.skip(reason)
    done, _ = inject(name, tmp_path, undisturbed, short=True)
    assert not done.wrong
