"""A Ray cluster on this machine, for tests: two workers of one CPU beside a head without any."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader
from ray.cluster_utils import Cluster

QUICK = {  # a dead node is known after 3 s, not after half a minute
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    """Starts the cluster; its nodes have the environment of this process."""
    ray = Path(sys.executable).with_name("ray")
    subprocess.run([ray, "get-auth-token", "--generate"], capture_output=True)  # fails where there is one
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()  # it may hold the token of a Ray that this process started for itself
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICK})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster
    finally:
        cluster.shutdown()
        loader.reset_cache()
