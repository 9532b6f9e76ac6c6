"""Does cluster/gpu.yaml bring up a cluster on EC2, and does a study outlive the loss of a spot worker?

EC2 is moto's server; what it calls running gets a machine of the lab at its private address. No packet can
leave the lab, so the public addresses that moto invents are never reached. There is no CUDA: a worker's GPU
is a number.
"""

import contextlib
import csv
import ctypes
import json
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pytest

from tests.cluster.lab import Lab, until, why_not

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
FILE = "cluster/gpu.yaml"
LAPTOP = "172.31.255.254"  # moto's instances have private addresses in 172.31.0.0/16
AWS = {
    "AWS_ENDPOINT_URL": f"http://{LAPTOP}:5517",
    "AWS_ACCESS_KEY_ID": "testing",  # stands in for the instance profile
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-west-2",
    "AWS_EC2_METADATA_DISABLED": "true",
}
CLONE_NEWNET = 0x40000000
TWO_GPUS = (
    "import ray, ray.autoscaler.sdk as sdk; ray.init('auto'); sdk.request_resources(bundles=[{'GPU': 1}] * 2)"
)


class Cloud:
    """Moto's EC2, whose instances are machines of a lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.over = threading.Event()
        self.trouble: list[BaseException] = []
        lab.start(
            *(sys.executable, "-m", "moto.server", "-H", LAPTOP, "-p", 5517),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.inside(self._make_profiles)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def inside(self, function, *arguments):
        """Returns function(*arguments), run where moto can be reached: in the lab's network."""
        results = []
        thread = threading.Thread(target=lambda: (self._enter(), results.append(function(*arguments))))
        thread.start()
        thread.join(60)
        assert results, f"{function} failed"
        return results[0]

    def instances(self) -> list[dict]:
        """Returns what EC2 says of each instance that is not terminated."""
        answer = boto3.client("ec2").describe_instances()
        found = [one for reservation in answer["Reservations"] for one in reservation["Instances"]]
        return [one for one in found if one["State"]["Name"] in ("pending", "running")]

    def close(self) -> None:
        self.over.set()
        self.thread.join(30)

    def _enter(self) -> None:
        # of this thread only
        with Path("/run/netns", self.lab.space).open() as space:
            assert ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET) == 0

    def _make_profiles(self) -> bool:
        iam = boto3.client("iam")

        def created():
            with contextlib.suppress(Exception):  # moto has not started
                return iam.create_role(RoleName="tunefleet", AssumeRolePolicyDocument="{}")

        until(created, 60)
        for name in ("tunefleet-head", "tunefleet-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName="tunefleet")
        return True

    def _watch(self) -> None:
        try:
            self._enter()
            while not self.over.wait(1):
                alive = {one["PrivateIpAddress"] for one in self.instances()}
                for address in alive - set(self.lab.machines):
                    self._authorize()
                    self.lab.boot(address)
                for address in set(self.lab.machines) - alive:
                    self.lab.kill(address)
        except BaseException as error:  # the test shows it
            self.trouble.append(error)
            raise

    def _authorize(self) -> None:
        for key in (self.lab.laptop / ".ssh").glob("ray-autoscaler*.pem"):
            public = subprocess.run(
                ["ssh-keygen", "-y", "-f", key], capture_output=True, text=True, check=True
            )
            self.lab.authorize(public.stdout)


@pytest.fixture
def cloud(monkeypatch):
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    with Lab(f"{LAPTOP}/16", "\n".join(f"export {name}={value}" for name, value in AWS.items())) as lab:
        cloud = Cloud(lab)
        yield cloud
        cloud.close()
        assert not cloud.trouble


def reports(study):
    file = study / "reports.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if "val_accuracy" in event]


def test_a_study_outlives_the_loss_of_a_spot_worker(cloud):
    lab = cloud.lab
    file = lab.checkout / FILE
    config = file.read_text()
    assert "use_internal_ips: false" in config
    file.write_text(config.replace("use_internal_ips: false", "use_internal_ips: true"))  # the one difference

    says, ours = lab.checkout / "search/execution.py", " at once, "
    assert says.read_text().count(ours) == 1
    says.write_text(says.read_text().replace(ours, " on this checkout, "))  # is the shipped code what runs?

    lab.run("ray", "up", "-y", FILE, env=AWS, timeout=180)
    lab.start("ray", "dashboard", FILE, env=AWS)
    lab.run("ray", "exec", FILE, f'python -c "{TWO_GPUS}"', env=AWS, timeout=60)
    until(lambda: "/2.0 GPU" in lab.run("ray", "exec", FILE, "ray status", env=AWS, timeout=60), 120, every=3)
    workers = [one for one in cloud.inside(cloud.instances) if one["InstanceType"] == "g5.xlarge"]
    assert {one["InstanceLifecycle"] for one in workers} == {"spot"}
    assert {one["IamInstanceProfile"]["Arn"].rpartition("/")[2] for one in workers} == {"tunefleet-worker"}

    storage = lab.shared / "studies"
    storage.mkdir()
    output = lab.folder / "job.log"
    job = lab.start(
        *("ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--working-dir", "src", "--"),
        *("python", "-m", "tunefleet", "search", "softmax", "--data", "digits", "--storage", storage),
        *("--trials", 12, "--epochs", 27, "--final-seeds", 1, "--pruner", "none"),
        *("--device", "cpu", "--gpus-per-trial", 1, "--cpus-per-trial", 2),  # one trial per worker
        *("--concurrency", 2),  # else the cluster grows to its 8 workers
        env=AWS,
        stdout=output.open("wb"),
    )
    (study,) = until(lambda: [file.parent for file in storage.glob("*/study.json")], 120)
    until(lambda: len({report["node"] for report in reports(study)}) == 2, 120)
    lost = workers[0]
    before = len(reports(study))
    cloud.inside(lambda: boto3.client("ec2").terminate_instances(InstanceIds=[lost["InstanceId"]]))
    assert job.wait(240) == 0, output.read_text()
    assert " on this checkout, " in output.read_text()

    with (study / "trials.csv").open() as table:
        trials = list(csv.DictReader(table))
    assert len(trials) == 12
    assert {trial["status"] for trial in trials} <= {"done", "diverged"}
    assert len(reports(study)) > before
    gone = f"node-{lost['PrivateIpAddress'].replace('.', '-')}"
    assert gone in {report["node"] for report in reports(study)}
    new = until(
        lambda: (
            {one["InstanceId"] for one in cloud.inside(cloud.instances)}
            - {one["InstanceId"] for one in workers}
        ),
        60,
    )
    assert len(new) == 2, "the head, and a worker in the place of the lost one"
    lab.run("ray", "down", "-y", FILE, env=AWS, timeout=90)
    assert not cloud.inside(cloud.instances)
