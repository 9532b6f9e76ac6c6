"""Machines that ``ray up`` reaches by ssh, where there are none.

A machine is a set of Linux namespaces with sshd as its first process: its own network (one address on a
bridge), processes (``ray stop`` ends every Ray that it can see), host name, /dev/shm, /tmp/ray and home.
Bridge, laptop (where a user types) and stand-ins for servers live in one more network namespace. None of
them has a link to the host's network: no packet leaves, and a port is nobody else's.

Needs root, iproute2, util-linux, openssh-server and rsync. Everything is ended by the pid that it was
started with.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDED = ("ip", "unshare", "sshd", "rsync", "ssh-keygen")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
# ssh and file_mounts ask passwd for ubuntu's home. An unreachable DNS server costs 10 s a look-up.
BOOT = """
set -e
cd {folder}
hostname {name}
mount --bind ray /tmp/ray
mount -t tmpfs tmpfs /dev/shm
mount --bind passwd /etc/passwd
mount --bind hosts /etc/hosts
mount --bind resolv.conf /etc/resolv.conf
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""
# `ip netns exec` gives each command mounts of its own; Ray keeps the state of its clusters in /tmp/ray
AT_LAPTOP = 'mount --bind "$0/passwd" /etc/passwd; mount --bind "$0/ray" /tmp/ray; exec "$@"'
SSHD = """
HostKey {lab}/host_key
AuthorizedKeysFile {lab}/authorized_keys
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
MaxStartups 100
"""
# A real machine has the project's environment by pip, which needs a network. Here pip records its
# arguments, and the tests read those.
VENV = {
    "python": 'exec {python} "$@"',
    "python3": 'exec {python} "$@"',
    "ray": 'exec {python} -c "from ray.scripts.scripts import main; main()" "$@"',
    "pip": 'echo "$PWD: $*" >> ~/pip.log',
}


def why_not() -> str | None:
    """Returns why this host can have no machines; None: it can."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    missing = [name for name in NEEDED if not shutil.which(name, path=PATH)]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install iproute2 openssh-server rsync"
    probe = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True)
    return f"no namespaces here: {probe.stderr.decode().strip()}" if probe.returncode else None


class Lab:
    """A bridge, a laptop on it, and machines that come and go.

    Args:
        gateway: Address/bits of the bridge, which is the laptop's.
        bashrc: Lines for every machine's ~/.bashrc.
    """

    def __init__(self, gateway: str, bashrc: str = "") -> None:
        # not under pytest's folder: sockets' paths may be 107 bytes long
        self.folder = Path(tempfile.mkdtemp(prefix="lab-", dir="/var/tmp"))
        self.gateway, self.bashrc = gateway, bashrc
        self.space = f"tf{os.getpid()}"
        self.machines: dict[str, subprocess.Popen] = {}
        self.others: list[subprocess.Popen] = []
        self.laptop = self.folder / "laptop"
        self.shared = self.folder / "shared"  # all machines see it, as they would a file server
        for folder in (self.laptop / ".ssh", self.laptop / ".ray", self.laptop / "ray", self.shared):
            folder.mkdir(parents=True)
        (self.laptop / "passwd").write_text(_users(self.laptop))
        Path("/tmp/ray").mkdir(exist_ok=True)  # a place to mount to
        token = self.laptop / ".ray/auth_token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.key = self.laptop / ".ssh/id_ed25519"
        for key in (self.key, self.folder / "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
        self.authorize(self.key.with_suffix(".pub").read_text())
        self.checkout = self.laptop / "tunefleet"
        left_out = shutil.ignore_patterns(
            ".git", ".venv*", ".*_cache", "*.egg-info", "__pycache__", "studies"
        )
        shutil.copytree(ROOT, self.checkout, ignore=left_out, symlinks=True)
        _run("ip", "netns", "add", self.space)
        for command in (
            "link set lo up",
            "link add bridge type bridge",
            f"addr add {gateway} dev bridge",
            "link set bridge up",
        ):
            _run("ip", "-n", self.space, *command.split())

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.others):
            _end(process)
        for address in list(self.machines):
            self.kill(address)
        subprocess.run(["ip", "netns", "delete", self.space], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def authorize(self, public_key: str) -> None:
        """Lets this key into every machine."""
        with (self.folder / "authorized_keys").open("a") as file:
            file.write(public_key.strip() + "\n")

    def boot(self, address: str) -> None:
        """Starts a machine at an address of the bridge's network."""
        name = f"node-{address.replace('.', '-')}"
        space = f"{self.space}-{'-'.join(address.split('.')[2:])}"
        folder = self._furnish(name, address)
        link = _link(address)
        bits = self.gateway.partition("/")[2]
        _run("ip", "netns", "add", space)
        for where, command in (
            (self.space, f"link add {link} type veth peer name eth0 netns {space}"),
            (self.space, f"link set {link} master bridge up"),
            (space, "link set lo up"),
            (space, f"addr add {address}/{bits} dev eth0"),
            (space, "link set eth0 up"),
        ):
            _run("ip", "-n", where, *command.split())
        unshare = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount",
            "--mount-proc",
            "--uts",
            "--ipc",
            "sh",
            "-c",
        ]
        with (folder / "sshd.log").open("w") as log:
            self.machines[address] = subprocess.Popen(
                ["ip", "netns", "exec", space, *unshare, BOOT.format(folder=folder, name=name)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={"PATH": PATH},
                start_new_session=True,
            )
        until(lambda: "Server listening" in (folder / "sshd.log").read_text(), 60, every=0.1)
        _run("ip", "netns", "delete", space)  # a name only: the namespace lasts as long as its processes

    def kill(self, address: str) -> None:
        """Takes a machine's power away."""
        _end(self.machines.pop(address))

    def link(self, address: str, state: str) -> None:
        """Pulls a machine's cable, or plugs it in: state is down or up."""
        _run("ip", "-n", self.space, "link", "set", _link(address), state)

    def home(self, address: str) -> Path:
        """Returns a machine's ~."""
        return self.folder / f"node-{address.replace('.', '-')}" / "home"

    def by_ssh(self, address: str, command: str) -> list[object]:
        """Returns the laptop's command that runs a command on a machine."""
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
        unasked = [word for option in options for word in ("-o", option)]
        return ["ssh", "-i", self.key, *unasked, f"ubuntu@{address}", command]

    def ssh(self, address: str, command: str, timeout: float = 20) -> str:
        """Returns what a command prints on a machine."""
        return self.run(*self.by_ssh(address, command), timeout=timeout)

    def processes(self, address: str, word: str) -> list[str]:
        """Returns the command lines on a machine that contain a word."""
        return [line for line in self.ssh(address, "ps ax -o args").splitlines() if word in line]

    def start(self, *command: object, **options: object) -> subprocess.Popen:
        """Starts a command on the laptop, in its checkout."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{PATH}",
            "HOME": str(self.laptop),
            "TMPDIR": str(self.laptop / "ray"),  # `ray up` caches what it asked a cloud before
            "RAY_AUTH_MODE": "token",
            "PYTHONPATH": str(self.checkout / "src"),
            "COLUMNS": "200",
            **options.pop("env", {}),
        }
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space, "sh", "-c", AT_LAPTOP, self.laptop, *map(str, command)],
            cwd=self.checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )
        self.others.append(process)
        return process

    def run(self, *command: object, timeout: float, **options: object) -> str:
        """Runs a command on the laptop to its end; returns what it printed.

        Raises:
            AssertionError: It failed or took more than timeout seconds; shows what it printed.
        """
        began = time.monotonic()
        with tempfile.TemporaryFile("w+", dir=self.folder) as output:
            process = self.start(*command, stdout=output, stderr=subprocess.STDOUT, **options)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout)
            code = process.poll()
            _end(process)
            output.seek(0)
            text = output.read()
        took = f"{' '.join(map(str, command))}: {code} after {time.monotonic() - began:.0f} s"
        assert code == 0, f"{took}\n{text}"
        print(took)
        return text

    def _furnish(self, name: str, address: str) -> Path:
        """Writes what makes a machine's file system its own; returns the folder."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        binaries = folder / "home/venv/bin"
        binaries.mkdir(parents=True)
        (folder / "ray").mkdir()
        for command, line in VENV.items():
            (binaries / command).write_text(f"#!/bin/sh\n{line.format(python=sys.executable)}\n")
            (binaries / command).chmod(0o755)
        (folder / "home/.bashrc").write_text(
            f"export PYTHONPATH={folder}/home/tunefleet/src\n{self.bashrc}\n"  # pip install -e would do that
        )
        (folder / "passwd").write_text(_users(folder / "home"))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        (folder / "sshd_config").write_text(SSHD.format(lab=self.folder))
        return folder


def _link(address: str) -> str:
    """Returns the bridge's end of a machine's cable; 15 bytes at most."""
    return f"v{'-'.join(address.split('.')[2:])}"


def until(what: object, seconds: float, every: float = 1.0) -> object:
    """Returns what() once it is true.

    Raises:
        AssertionError: It was not within these seconds.
    """
    end = time.monotonic() + seconds
    while True:
        result = what()
        if result:
            return result
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every)


def _users(home: Path) -> str:
    # ssh asks passwd for ~, not HOME, and takes the first name of uid 0
    return f"ubuntu:x:0:0::{home}:/bin/bash\n" + Path("/etc/passwd").read_text()


def _run(*command: object) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(10)
