"""Why was a trial's worker lost? Read from what Ray says of it, since its consequences differ.

- ``node``: the machine is gone, preempted or out of reach. Nothing of that is the trial's doing: it goes on
  elsewhere, however often.
- ``memory``: Ray ended the worker because its node ran out of memory. The trial gets one more try, which may
  find the node less crowded; then it has ended as out_of_memory.
- ``disk``: there is no room for its checkpoint. No trial could go on, so the study stops, resumable.
- ``gpu``: a CUDA error has made the GPU unusable for the process, such as a device-side assert. That counts
  as a crash. ``neighbour``: lost a moment after such an error on the same GPU; the trial is not to blame.
- ``graph``: its step cannot be captured as a CUDA graph, ``graph_memory``: for lack of memory. It goes on
  without; of the first kind, all trials do.
- ``store``: the object store did not take or give a file for minutes. The same.
- ``worker``: the process died otherwise. The trial goes on, ``--max-failures`` times.

The texts are those of Ray 2.60.
"""

from __future__ import annotations

import re
from typing import Any

from tunefleet.files import says_full
from tunefleet.store import StoreError

MEMORY = ("NODE_OUT_OF_MEMORY", "running low on memory")
NODE = (
    "its node has died",  # seen for a killed raylet, and a node that missed its heartbeats
    "node was terminated",
    "preempt",  # a spot node, drained before it went
    "drained",
    "ActorUnavailableError",  # the connection broke: seen for a machine that is gone at once
    "is temporarily unavailable",
    "NodeDiedError",
    "LocalRayletDiedError",
)


BY_CLASS = {  # names of our exceptions, as Ray's texts have them
    "CaptureMemoryError": "graph_memory",
    "CaptureError": "graph",
    "BrokenGpuError": "gpu",
}


def cause_of(error: Exception | None) -> str:
    """Return node, memory, disk, store, gpu, graph, graph_memory or worker."""
    text = f"{type(error).__name__}: {error}"
    for name, cause in BY_CLASS.items():
        if name in text:
            return cause
    if any(sign in text for sign in MEMORY):
        return "memory"
    if says_full(text):
        return "disk"
    if StoreError.__name__ in text:
        return "store"
    gone: Any = getattr(error, "preempted", False)
    return "node" if gone or any(sign in text for sign in NODE) else "worker"


def gpu_named(error: Exception | None) -> str | None:
    """Returns the GPU whose UUID one of our errors names."""
    found = (
        re.search(r"(GPU|MIG)-[0-9a-f][0-9a-f-]{7,}", str(error)) if "BrokenGpuError" in repr(error) else None
    )
    return found[0] if found else None


def told(error: Exception | None) -> str:
    """Returns what the journal keeps of a lost worker's error: its text, without empty lines."""
    return "\n".join(line for line in str(error).splitlines() if line.strip())
