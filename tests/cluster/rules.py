"""What must hold of the files in cluster/ before anyone pays for machines?

Ray's own schema lets a lot through that costs money or a day (a typo in node_config, no worker profile, a
dashboard open to the world): `check_by_ray` is the schema, the others are ours. All work offline. Each raises
one of REJECTIONS; tests/cluster/test_files.py proves that each bites.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import botocore.model
import botocore.session
import botocore.validate
import jsonschema
import yaml
from ray.autoscaler._private.util import (
    prepare_config,
    validate_config,
)  # Ray is pinned: it has no public one

ROOT = Path(__file__).parents[2]
REJECTIONS = (
    AssertionError,
    KeyError,
    NotImplementedError,
    TypeError,
    ValueError,
    jsonschema.ValidationError,
)
NOTICED_WITHIN_S = 10  # a dead link
TOKEN = "~/.ray/auth_token"
COMMON_KEYS = {
    *("cluster_name", "provider", "auth", "file_mounts", "rsync_exclude", "rsync_filter", "setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
}
AWS_KEYS = COMMON_KEYS | {
    *("max_workers", "upscaling_speed", "idle_timeout_minutes", "available_node_types", "head_node_type"),
    "head_setup_commands",
}
AWS_PROVIDER = {
    *("type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips", "security_group")
}
OF_INSTANCE = {"g5.xlarge": {"CPU": 4, "GPU": 1}, "p4d.24xlarge": {"CPU": 96, "GPU": 8}}


def check_by_ray(config: dict[str, Any]) -> None:
    """What ``ray up`` itself would refuse."""
    validate_config(prepare_config(config))


def check_gpu(config: dict[str, Any]) -> None:
    """What Ray accepts of cluster/gpu.yaml and AWS or the bill would not."""
    _check_keys("gpu.yaml", config, AWS_KEYS)  # Ray drops a top-level min_workers or head_node without a word
    _check_keys("provider", config["provider"], AWS_PROVIDER)  # so no key of AWS is there either
    _check_common(config)
    region, zones = config["provider"]["region"], config["provider"]["availability_zone"].split(",")
    assert all(re.fullmatch(region + "[a-z]", zone) for zone in zones), f"zones {zones} are not of {region}"
    assert config["provider"]["cache_stopped_nodes"] is False, "stopped nodes still cost their disks"
    assert 0 < config["idle_timeout_minutes"] <= 15, "idle workers cost"
    assert config["max_workers"], "without max_workers Ray stops at 2"
    types = config["available_node_types"]
    for name, node in types.items():
        _check_node_config(name, node["node_config"])
    images = {node["node_config"]["ImageId"] for node in types.values()}
    assert len(images) == 1, f"one image for all nodes, or versions differ: {images}"
    head = types[config["head_node_type"]]
    assert head["resources"]["CPU"] == 0, "trials on the head die with the study"
    assert "GPU" not in head["resources"], "trials on the head die with the study"
    assert head["resources"]["trial_slot"] > 0, "groups of workers need trial_slot on the head"
    assert "InstanceMarketOptions" not in head["node_config"], "the head must not be taken away"
    for name, node in types.items():
        if name != config["head_node_type"]:
            _check_worker(name, node, config["max_workers"])


def check_onprem(config: dict[str, Any]) -> None:
    """What Ray accepts of cluster/onprem.yaml and would not work."""
    _check_keys("onprem.yaml", config, COMMON_KEYS)
    _check_keys("provider", config["provider"], {"type", "head_ip", "worker_ips"})
    _check_common(config)
    addresses = [config["provider"]["head_ip"], *config["provider"]["worker_ips"]]
    assert len(set(addresses)) == len(addresses), f"an address is listed twice: {addresses}"
    assert all(re.fullmatch(r"\d+(\.\d+){3}", address) for address in addresses), addresses
    assert config["auth"]["ssh_private_key"], "without a key Ray cannot reach the nodes"
    head = config["head_start_ray_commands"][-1]
    assert "--num-cpus=0 --num-gpus=0" in head, "trials on the head die with the study"
    assert re.search(r"--resources='\{\"trial_slot\": [1-9]\d*\}'", head), "groups need trial_slot"


def check_rayjob(job: dict[str, Any]) -> None:
    """What KubeRay would refuse: its definition is 1.4 MB, the schema here holds the fields we use."""
    jsonschema.validate(job, yaml.safe_load((Path(__file__).parent / "rayjob_schema.yaml").read_text()))


def check_kuberay(job: dict[str, Any], ray_version: str) -> None:
    """What KubeRay accepts of cluster/kuberay.yaml and would cost or not work.

    Args:
        job: The file's content.
        ray_version: Of constraints.txt.
    """
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["entrypoint"].startswith("tunefleet search "), spec["entrypoint"]
    assert " --storage " in spec["entrypoint"], "the study would die with the pods"
    assert spec["backoffLimit"] == 0, "a second attempt begins a second study"
    assert spec["shutdownAfterJobFinishes"], "the cluster would stay and cost"
    assert spec["activeDeadlineSeconds"], "a study that hangs would cost without end"
    assert cluster["rayVersion"] == ray_version, f"the image has Ray {ray_version}"
    assert cluster["authOptions"] == {"mode": "token"}, "without a token every pod may run code here"
    assert cluster["enableInTreeAutoscaling"], "workers would stay and cost"
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 900, "idle workers cost"
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0", "trials on the head die with the study"
    slots = json.loads(json.loads(head["rayStartParams"]["resources"]))  # quoted twice: for YAML and a shell
    assert slots["trial_slot"] > 0, "groups of workers need trial_slot on the head"
    containers = [
        group["template"]["spec"]["containers"][0] for group in [head, *cluster["workerGroupSpecs"]]
    ]
    assert len({container["image"] for container in containers}) == 1, "one image, or versions differ"
    for container in containers:
        assert container["resources"]["requests"] == container["resources"]["limits"], "Ray counts the limits"
        check_health({variable["name"]: variable["value"] for variable in container["env"]})
    assert "nvidia.com/gpu" not in containers[0]["resources"]["limits"], "the head trains nothing"
    for group, container in zip(cluster["workerGroupSpecs"], containers[1:], strict=True):
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], "replicas"
        assert container["resources"]["limits"]["nvidia.com/gpu"], "workers without GPUs"


def _check_keys(where: str, given: dict[str, Any], known: set[str]) -> None:
    assert set(given) <= known, f"{where} has {sorted(set(given) - known)}, which this file does not use"


def _check_common(config: dict[str, Any]) -> None:
    mounts = config["file_mounts"]
    assert mounts.get("~/tunefleet") == ".", "the project is not shipped"
    assert mounts.get(TOKEN) == TOKEN, "the token is not shipped"
    for source in mounts.values():
        assert source.startswith("~") or (ROOT / source).exists(), f"file_mounts: {source} does not exist"
    assert "**/.git/**" in config["rsync_exclude"], "the history is not needed on the nodes"
    setup = config["setup_commands"]
    assert f"chmod 600 {TOKEN}" in setup, "Ray writes the token readable to all"
    assert any("RAY_AUTH_MODE=token' >> ~/.bashrc" in line for line in setup), "jobs do not use the token"
    assert any("pip install -q -c constraints.txt -e" in line for line in setup), "versions are not pinned"
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    for commands in (head, worker):
        assert commands[0] == "ray stop", "an old Ray would stay"
        assert "RAY_AUTH_MODE=token" in commands[-1], "without it Ray does not even look for the token"
        assert "--disable-usage-stats" in commands[-1], "nothing is sent home"
    assert "--head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml" in head[-1], head[-1]
    assert "--dashboard-host=127.0.0.1" in head[-1], "the dashboard runs what it is sent"
    assert "--address=$RAY_HEAD_IP:6379" in worker[-1], worker[-1]
    check_health(dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", head[-1])))


def check_health(environment: dict[str, str]) -> None:
    """These variables let Ray notice a dead link in time."""
    names = [f"RAY_health_check_{name}" for name in ("period_ms", "timeout_ms", "failure_threshold")]
    assert set(environment) == set(names), f"health checks: {environment}"
    period, timeout, threshold = (int(environment[name]) for name in names)
    seconds = threshold * (period + timeout) / 1000
    assert 5 <= seconds <= NOTICED_WITHIN_S, f"a dead link is noticed after {seconds:g} s"


def _check_node_config(name: str, node_config: dict[str, Any]) -> None:
    shape = _run_instances()
    report = botocore.validate.ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape)
    assert not report.has_errors(), f"{name}: {report.generate_report()}"
    assert node_config["InstanceType"] in shape.members["InstanceType"].enum, f"{name}: no such InstanceType"
    assert re.fullmatch(r"ami-[0-9a-f]{17}", node_config["ImageId"]), f"{name}: no image; Ray's is too old"
    assert node_config["IamInstanceProfile"], f"{name}: no profile"
    for device in node_config["BlockDeviceMappings"]:
        assert device["Ebs"]["DeleteOnTermination"], f"{name}: its disk outlives it"
        assert device["Ebs"]["VolumeSize"] >= 100, f"{name}: torch, images and checkpoints need more"


@functools.cache
def _run_instances() -> botocore.model.Shape:
    """Returns what EC2 takes, as boto3 knows it without a network; its file takes 0.3 s to read."""
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _check_worker(name: str, node: dict[str, Any], most: int) -> None:
    assert 0 <= node["min_workers"] <= node["max_workers"] <= most, f"{name}: min_workers > max_workers"
    given = {key: node["resources"].get(key) for key in ("CPU", "GPU")}
    assert given == OF_INSTANCE[node["node_config"]["InstanceType"]], f"{name} has not {given}"
    assert node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}, (
        f"{name} pays the full price"
    )
