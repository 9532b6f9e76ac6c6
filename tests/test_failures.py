import pytest
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError

from tunefleet.search.failures import cause_of, text_of


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RayActorError(error_msg="The actor died because its node has died. Node Id: 3f"), "node"),
        (RayActorError(error_msg="The actor died", preempted=True), "node"),
        (ActorUnavailableError("The actor is unavailable", b"1" * 16), "node"),
        (
            RayActorError(
                error_msg="The actor is dead because its worker process has died. Worker exit type: "
                "SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2."
            ),
            "worker",
        ),
        (
            RayActorError(
                error_msg="Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed due to "
                "the node running low on memory."
            ),
            "memory",
        ),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "memory"),
        (OSError(28, "No space left on device", "/studies/0000.pt"), "disk"),
        (RuntimeError("TrainingFailedError: OSError: [Errno 122] Disk quota exceeded"), "disk"),
        (ValueError("a bug"), "worker"),
        (None, "worker"),
    ],
)
def test_cause_is_read_from_what_ray_says(error, cause):
    assert cause_of(error) == cause


def test_empty_lines_are_left_out():
    assert text_of(ValueError("one\n\n  \ntwo")) == "one\ntwo"
