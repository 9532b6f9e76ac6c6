"""Are the files in cluster/ what Ray, AWS, Kubernetes and Slurm want, and does each check of that bite?"""

import json
import os
import re
import subprocess

import pytest
import yaml

from tests.cluster.rules import (
    REJECTIONS,
    ROOT,
    check_by_ray,
    check_gpu,
    check_kuberay,
    check_onprem,
    check_rayjob,
)

CLUSTER = ROOT / "cluster"
GONE = object()
PINNED = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

G5, P4D, HEAD = (f"available_node_types/{name}" for name in ("gpu_g5", "gpu_p4d", "head"))
# (where, what it becomes): refused by Ray's schema
RAY_REFUSES = [
    ("autoscaling_mode", "default"),
    ("initial_workers", 1),
    ("worker_nodes", {"InstanceType": "m5.large"}),
    ("cluster_nam", "x"),
    ("auth/user", "ubuntu"),
    (f"{G5}/setup_commands", ["true"]),
    (f"{G5}/resources/GPU", 0.5),
    (f"{G5}/node_config", GONE),
    (f"{G5}/min_workers", 9),
    ("idle_timeout_minutes", -1),
    ("head_node_type", "heads"),
    ("setup_commands", "pip install ray"),
    ("docker", {"image": "ray"}),
    ("provider/type", "awss"),
]
# accepted by Ray's schema, refused by us
WE_REFUSE_OF_GPU = [
    ("min_workers", 1),
    ("head_node", {}),
    ("docker", {}),
    ("provider/regio", "us-west-2"),
    ("provider/aws_credentials", {"aws_secret_access_key": "x"}),
    ("provider/region", "eu-west-1"),
    ("provider/availability_zone", GONE),
    ("provider/availability_zone", "us-west-2a, us-west-2b"),
    ("provider/cache_stopped_nodes", GONE),
    ("provider/cache_stopped_nodes", True),
    ("idle_timeout_minutes", 600),
    ("idle_timeout_minutes", GONE),
    ("max_workers", GONE),
    (f"{G5}/max_workers", GONE),
    (f"{G5}/max_workers", 9),
    (f"{P4D}/min_workers", 2),
    (f"{G5}/resources", {}),
    (f"{G5}/resources/GPU", 4),
    (f"{P4D}/resources/CPU", GONE),
    (f"{P4D}/node_config/InstanceType", "p4d.24xlarg"),
    (f"{P4D}/node_config/InstanceType", GONE),
    (f"{P4D}/node_config/InstanceType", "g5.xlarge"),
    (f"{G5}/node_config/ImageIdd", "ami-0123456789abcdef0"),
    (f"{G5}/node_config/ImageId", GONE),
    (f"{G5}/node_config/ImageId", "ami-CHANGE-ME"),
    (f"{G5}/node_config/ImageId", "ami-0123456789abcdef1"),
    (f"{G5}/node_config/IamInstanceProfile", GONE),
    (f"{G5}/node_config/IamInstanceProfile", "tunefleet-worker"),
    (f"{G5}/node_config/InstanceMarketOptions", GONE),
    (f"{G5}/node_config/InstanceMarketOptions/MarketTyp", "spot"),
    (f"{G5}/node_config/BlockDeviceMappings/0/Ebs/VolumeSize", "200"),
    (f"{G5}/node_config/BlockDeviceMappings/0/Ebs/VolumeSize", 8),
    (f"{G5}/node_config/BlockDeviceMappings/0/Ebs/DeleteOnTermination", False),
    (f"{G5}/node_config/BlockDeviceMappings", GONE),
    (f"{HEAD}/node_config/IamInstanceProfile", GONE),
    (f"{HEAD}/node_config/InstanceMarketOptions", {"MarketType": "spot"}),
    (f"{HEAD}/resources/CPU", 4),
    (f"{HEAD}/resources/GPU", 1),
    (f"{HEAD}/resources/trial_slot", GONE),
    (f"{HEAD}/resources/trial_slot", 0),
]
WE_REFUSE_OF_BOTH = [
    ("file_mounts/~~1tunefleet", GONE),
    ("file_mounts/~~1.ray~1auth_token", GONE),
    ("file_mounts/~~1data", "no/such/folder"),
    ("rsync_exclude", GONE),
    ("setup_commands/0", "true"),
    ("setup_commands/2", "true"),
    ("setup_commands/3", "pip install ray"),
    ("setup_commands", GONE),
    ("head_start_ray_commands", GONE),
    ("head_start_ray_commands/0", "true"),
    ("worker_start_ray_commands/0", "true"),
    ("worker_start_ray_commands", GONE),
]
# (which, what is replaced, by what) in the last start command of head and worker
START_COMMANDS = [
    ("head", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
    ("head", "--dashboard-host=127.0.0.1", ""),
    ("head", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
    ("head", "RAY_AUTH_MODE=token", ""),
    ("head", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
    ("head", "RAY_health_check_period_ms=1000", ""),
    ("head", "RAY_health_check_timeout_ms=2000", "RAY_health_check_timeout_ms=10000"),
    ("head", "failure_threshold=3", "failure_threshold=1"),
    ("head", "--disable-usage-stats", ""),
    ("worker", "RAY_AUTH_MODE=token", ""),
    ("worker", "$RAY_HEAD_IP", "10.0.0.1"),
]
WE_REFUSE_OF_ONPREM = [
    ("idle_timeout_minutes", 5),
    ("provider/worker_ips", ["10.77.0.11", "10.77.0.11"]),
    ("provider/worker_ips", ["10.77.0.10", "10.77.0.11"]),
    ("provider/worker_ips/0", "worker-1"),
    ("auth/ssh_private_key", GONE),
]
CLUSTER_SPEC = "spec/rayClusterSpec"
WORKER = f"{CLUSTER_SPEC}/workerGroupSpecs/0"
CONTAINER = "template/spec/containers/0"
KUBERAY_REFUSES = [
    ("apiVersion", "ray.io/v1alpha1"),
    ("kind", "RayCluster"),
    ("metadata/nam", "x"),
    ("metadata/name", "Tunefleet"),
    ("spec/entrypoint", GONE),
    ("spec/entrypoints", "python"),
    ("spec/ttlSecondsAfterFinished", "300"),
    ("spec/submissionMode", "K8sJob"),
    (CLUSTER_SPEC, GONE),
    (f"{CLUSTER_SPEC}/headGroupSpec", GONE),
    (f"{CLUSTER_SPEC}/autoscalerOptions/version", "v3"),
    (f"{CLUSTER_SPEC}/autoscalerOptions/idleTimeoutMinutes", 5),
    (f"{CLUSTER_SPEC}/headGroupSpec/rayStartParams/num-cpus", 0),
    (f"{WORKER}/maxReplica", 8),
    (f"{WORKER}/minReplicas", "0"),
    (f"{WORKER}/template/spec/containers", []),
    (f"{WORKER}/{CONTAINER}/imag", "x:1"),
    (f"{WORKER}/{CONTAINER}/image", "REGISTRY/tunefleet"),
    (f"{WORKER}/{CONTAINER}/env/0/value", 1000),
    (f"{WORKER}/{CONTAINER}/resources/limits/nvidia.com~1gpu", 1),
    (f"{WORKER}/{CONTAINER}/resources/limits/gpu", "1"),
    (f"{WORKER}/{CONTAINER}/resources", GONE),
    (f"{WORKER}/template/spec/tolerations/0/effect", "NoSchedul"),
]
WE_REFUSE_OF_KUBERAY = [
    ("spec/entrypoint", "tunefleet search resnet_conv"),
    ("spec/backoffLimit", 2),
    ("spec/shutdownAfterJobFinishes", False),
    ("spec/activeDeadlineSeconds", GONE),
    (f"{CLUSTER_SPEC}/rayVersion", "2.59.0"),
    (f"{CLUSTER_SPEC}/authOptions", GONE),
    (f"{CLUSTER_SPEC}/authOptions/mode", "disabled"),
    (f"{CLUSTER_SPEC}/enableInTreeAutoscaling", False),
    (f"{CLUSTER_SPEC}/autoscalerOptions/idleTimeoutSeconds", 36000),
    (f"{CLUSTER_SPEC}/headGroupSpec/rayStartParams/num-cpus", "2"),
    (
        f"{CLUSTER_SPEC}/headGroupSpec/rayStartParams/resources",
        '{"trial_slot": 16}',
    ),  # a shell eats the quotes
    (f"{CLUSTER_SPEC}/headGroupSpec/{CONTAINER}/image", "REGISTRY/tunefleet:0.2.0"),
    (f"{CLUSTER_SPEC}/headGroupSpec/{CONTAINER}/env", GONE),
    (f"{CLUSTER_SPEC}/headGroupSpec/{CONTAINER}/resources/limits/nvidia.com~1gpu", "1"),
    (f"{WORKER}/{CONTAINER}/env/2/value", "30"),
    (f"{WORKER}/{CONTAINER}/resources/limits/cpu", "8"),
    (f"{WORKER}/{CONTAINER}/resources/limits/nvidia.com~1gpu", GONE),
    (f"{WORKER}/replicas", 9),
]


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def changed(name, path, value):
    """Returns a file's content with one thing at a /-separated path (~1 is a /) set or taken away."""
    config = json.loads(json.dumps(load(name)))  # an anchor and its aliases are one object, and should not be
    *parents, last = [part.replace("~1", "/") for part in path.split("/")]
    location = config
    for part in parents:
        location = location[int(part) if isinstance(location, list) else part]
    last = int(last) if isinstance(location, list) else last
    if value is GONE:
        del location[last]
    else:
        location[last] = value
    return config


@pytest.mark.parametrize(("name", "check"), [("gpu.yaml", check_gpu), ("onprem.yaml", check_onprem)])
def test_the_files_of_ray_up_are_right(name, check):
    check_by_ray(load(name))
    check(load(name))


@pytest.mark.parametrize(("path", "value"), RAY_REFUSES)
def test_rays_schema_refuses(path, value):
    with pytest.raises(REJECTIONS):
        check_by_ray(changed("gpu.yaml", path, value))


@pytest.mark.parametrize(("path", "value"), WE_REFUSE_OF_GPU + WE_REFUSE_OF_BOTH)
def test_what_ray_accepts_of_gpu_is_refused(path, value):
    config = changed("gpu.yaml", path, value)
    check_by_ray(config)
    with pytest.raises(REJECTIONS):
        check_gpu(config)


@pytest.mark.parametrize(("path", "value"), WE_REFUSE_OF_ONPREM + WE_REFUSE_OF_BOTH)
def test_what_ray_accepts_of_onprem_is_refused(path, value):
    config = changed("onprem.yaml", path, value)
    check_by_ray(config)
    with pytest.raises(REJECTIONS):
        check_onprem(config)


@pytest.mark.parametrize(("name", "check"), [("gpu.yaml", check_gpu), ("onprem.yaml", check_onprem)])
@pytest.mark.parametrize(("node", "old", "new"), START_COMMANDS)
def test_another_start_command_is_refused(name, check, node, old, new):
    config = load(name)
    commands = config[f"{node}_start_ray_commands"]
    assert old in commands[-1]
    commands[-1] = commands[-1].replace(old, new)
    check_by_ray(config)
    with pytest.raises(AssertionError):
        check(config)


@pytest.mark.parametrize("flag", ["--num-cpus=0", "--num-gpus=0", "--resources='{\"trial_slot\": 16}'"])
def test_onprem_head_without_its_resources_is_refused(flag):
    config = load("onprem.yaml")
    commands = config["head_start_ray_commands"]
    assert flag in commands[-1]
    commands[-1] = commands[-1].replace(flag, "")
    with pytest.raises(AssertionError):
        check_onprem(config)


def test_kuberay_is_right():
    check_rayjob(load("kuberay.yaml"))
    check_kuberay(load("kuberay.yaml"), PINNED["ray"])


@pytest.mark.parametrize(("path", "value"), KUBERAY_REFUSES)
def test_kuberays_schema_refuses(path, value):
    with pytest.raises(REJECTIONS):
        check_rayjob(changed("kuberay.yaml", path, value))


@pytest.mark.parametrize(("path", "value"), WE_REFUSE_OF_KUBERAY)
def test_what_kuberay_accepts_is_refused(path, value):
    job = changed("kuberay.yaml", path, value)
    check_rayjob(job)
    with pytest.raises(REJECTIONS):
        check_kuberay(job, PINNED["ray"])


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sbatch with a stand-in for Slurm; returns the process and the arguments of ``srun``."""
    for name, body in {
        "scontrol": 'echo "node1\nnode2\nnode3"',
        "srun": 'case "$*" in *hostname*) echo "10.1.2.3 172.17.0.1"; exit;; esac\n'
        'printf "%s\\n" "$@" > calls; env > env',
        "ray": "mkdir -p ~/.ray && echo token > ~/.ray/auth_token && echo token",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_ID": "1234567",
    }

    def run(*arguments):
        process = subprocess.run(
            ["bash", CLUSTER / "slurm.sbatch", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        calls = tmp_path / "calls"
        return process, calls.read_text().splitlines() if calls.exists() else [], tmp_path

    return run


def test_slurm_starts_one_ray_per_node_and_the_command_on_the_head(slurm):
    process, calls, home = slurm("tunefleet", "search", "softmax")
    assert process.returncode == 0, process.stderr
    start, command = calls[: calls.index("--")], calls[calls.index("--") + 1 :]
    assert command == ["env", "RAY_ADDRESS=10.1.2.3:24567", "tunefleet", "search", "softmax"]
    assert start[: start.index("ray")] == [
        "--nodes=3",
        "--ntasks=3",
        "--cpus-per-task=8",
        "--kill-on-bad-exit=0",
    ]
    assert start[start.index("ray") : start.index("--num-cpus=8")] == [
        *("ray", "symmetric-run", "--address", "10.1.2.3:24567", "--min-nodes", "3")
    ]
    assert {"--num-gpus=0", '--resources={"trial_slot": 16}', "--dashboard-host=127.0.0.1"} <= set(start)
    environment = (home / "env").read_text()
    assert "RAY_AUTH_MODE=token" in environment
    assert "RAY_health_check_timeout_ms=2000" in environment
    assert "RAY_ADDRESS" not in environment  # `ray start` would join it instead of starting
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600


def test_slurm_without_a_command_says_how_it_is_used(slurm):
    process, calls, _ = slurm()
    assert process.returncode == 2
    assert process.stderr.startswith("usage: sbatch cluster/slurm.sbatch tunefleet search")
    assert not calls


def test_slurm_asks_for_whole_nodes_and_survives_the_loss_of_one():
    wanted = set(re.findall(r"^#SBATCH (--[\w-]+)", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE))
    assert {"--exclusive", "--no-kill", "--ntasks-per-node", "--nodes", "--cpus-per-task", "--time"} <= wanted


def test_the_image_has_all_packages_and_nothing_else():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    links = [path.name for path in (ROOT / "src/tunefleet").iterdir() if path.is_symlink()]
    assert sorted(name for [*names] in copied[1:] for name in names) == sorted([*links, "src"])
    assert all((ROOT / name).is_file() for name in copied[0])
    assert "RUN pip install --no-cache-dir -c constraints.txt -e '.[cluster]'" in lines
    assert lines[-1] == "USER ray"


def test_no_file_holds_a_secret_or_a_registry():
    for file in CLUSTER.iterdir():
        found = re.search(
            r"AKIA[0-9A-Z]{16}|(?i:secret_access_key\s*[:=])|pypi\.org|ghcr|docker\.io", file.read_text()
        )
        assert not found, f"{file}: {found}"


def test_readme_names_each_file_and_its_policies_are_whole():
    readme = (CLUSTER / "README.md").read_text()
    assert all(file.name in readme for file in CLUSTER.iterdir() if file.name != "README.md")
    policies = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", readme, re.DOTALL)]
    allowed = {action for policy in policies for rule in policy["Statement"] for action in rule["Action"]}
    assert {"s3:PutObject", "s3:ListBucket", "ec2:RunInstances", "ec2:TerminateInstances"} <= allowed
    profiles = re.findall(r"IamInstanceProfile: \{Name: ([\w-]+)\}", (CLUSTER / "gpu.yaml").read_text())
    assert all(profile in readme for profile in profiles)
