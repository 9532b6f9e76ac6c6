"""Where do a study's W&B runs go? Flags say, else what the study remembers, else W&B's own variables.

The key is taken out of the environment before Ray starts, so that no worker, no runtime environment
and no log of Ray's ever has it; only the process that talks to W&B gets it back (search/wandb_sidecar.py).
Imports nothing heavy and never wandb.
"""

from __future__ import annotations

import argparse
import configparser
import netrc
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

MODES = ("off", "offline", "online")
OF_WANDB_MODE = {  # WANDB_MODE says the same in other words
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}
VARIABLES = {  # a field and W&B's variable for it
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
}
DEFAULT_URL = "https://api.forge.coreweave.com"  # of wandb 0.31
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # two names of one server: a key for either is one
NOT_IN_A_PROJECT = "/\\#?%:"  # W&B's rule
LONGEST_NAME, LONGEST_TAG = 128, 64  # characters, W&B's too
KEY_LENGTH = 40


@dataclass(frozen=True)
class WandbOptions:
    """What a person may ask of W&B; none of it changes a result, so a resumed study may change it.

    Raises:
        ValueError: A value that W&B would refuse.
    """

    mode: str
    project: str = "tunefleet"
    entity: str | None = None  # None: the key's own
    group: str | None = None  # None: the study's name
    tags: tuple[str, ...] = ()
    sweep: bool = False
    key: str | None = field(default=None, repr=False)  # None: it stands in netrc, or there is none

    def __post_init__(self) -> None:
        named = {"project": self.project, "entity": self.entity or "", "group": self.group or ""}
        for name, value in [*named.items(), *(("tags", tag) for tag in self.tags)]:
            if not value.isprintable():
                raise ValueError(f"--wandb-{name}={value} is not possible; give printable characters")
        if not 0 < len(self.project) <= LONGEST_NAME or any(c in self.project for c in NOT_IN_A_PROJECT):
            raise ValueError(
                f"--wandb-project={self.project} is not possible; give 1 to {LONGEST_NAME} characters "
                f"without any of {NOT_IN_A_PROJECT}"
            )
        for name in ("project", "entity", "group"):
            if not (getattr(self, name) or "").isprintable():
                raise ValueError(f"--wandb-{name} has a line end or no valid character in it; give another")
        for tag in self.tags:
            if not tag.isprintable() or not 0 < len(tag) <= LONGEST_TAG:
                raise ValueError(
                    f"--wandb-tags {tag} is not possible; give 1 to {LONGEST_TAG} characters each"
                )
        if self.group and len(self.group) > LONGEST_NAME:
            raise ValueError(
                f"--wandb-group={self.group} is not possible; give at most {LONGEST_NAME} characters"
            )
        if self.mode != "off":
            check_url(base_url())
        if self.mode == "online":
            key, place = find_key(self.key)
            if not key:
                raise ValueError(
                    f"there is no W&B key for {base_url()}; run `wandb login`, or set WANDB_API_KEY, or give "
                    "--wandb offline and upload later"
                )
            if place != "WANDB_IDENTITY_TOKEN_FILE":
                check_key(key, place)

    def remembered(self) -> dict[str, Any]:
        """Returns what study.json keeps: all but the key."""
        return {name: value for name, value in asdict(self).items() if name != "key"}


def choose(given: Mapping[str, Any], remembered: Mapping[str, Any] | None = None) -> WandbOptions:
    """Returns the options of a study.

    Args:
        given: The flags that were given, by field, and ``key`` where the environment had one.
        remembered: What the study was run with before, from study.json.

    Raises:
        ValueError: A value is impossible, or W&B shall be online without a key.
    """
    values = {**(remembered or _from_variables()), **given}
    values.setdefault("mode", "online" if find_key(values.get("key"))[0] else "offline")
    values["tags"] = tuple(values.get("tags") or ())
    return WandbOptions(**values)


def _from_variables() -> dict[str, Any]:
    values: dict[str, Any] = {}
    mode = os.environ.get("WANDB_MODE")
    if mode:
        if mode not in OF_WANDB_MODE:
            raise ValueError(f"WANDB_MODE={mode} is unknown; choose from: {', '.join(OF_WANDB_MODE)}")
        values["mode"] = OF_WANDB_MODE[mode]
    for name, variable in VARIABLES.items():
        text = os.environ.get(variable)
        if text:
            values[name] = text.split(",") if name == "tags" else text
    return values


def add_wandb_flags(parser: argparse.ArgumentParser, *, mode: bool = True) -> None:
    """Adds --wandb (where the mode is a choice) and its companions; one not given leaves no trace."""
    if mode:
        parser.add_argument(
            "--wandb",
            dest="wandb_mode",
            choices=MODES,
            default=argparse.SUPPRESS,
            help="Weights & Biases (default: WANDB_MODE, else online where there is a key, else offline)",
        )
    for name, text in (
        ("project", "W&B project (default: WANDB_PROJECT, else tunefleet)"),
        ("entity", "W&B user or team (default: WANDB_ENTITY, else the key's own)"),
        ("group", "W&B group of the study's runs (default: WANDB_RUN_GROUP, else the study's name)"),
    ):
        parser.add_argument(f"--wandb-{name}", default=argparse.SUPPRESS, metavar="NAME", help=text)
    parser.add_argument(
        "--wandb-tags",
        nargs="+",
        default=argparse.SUPPRESS,
        metavar="TAG",
        help="W&B tags of every run (default: WANDB_TAGS)",
    )
    parser.add_argument(
        "--wandb-sweep",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the study as a W&B sweep, too, once its runs are there",
    )


def take_flags(options: MutableMapping[str, Any]) -> dict[str, Any]:
    """Takes W&B's flags out of parsed options, and the key out of the environment; returns both."""
    names = [name for name in options if name.startswith("wandb_")]
    given = {name.removeprefix("wandb_"): options.pop(name) for name in names}
    key = os.environ.pop("WANDB_API_KEY", None)
    return given | ({"key": key} if key else {})


def find_key(key: str | None) -> tuple[str, str]:
    """Return the key that W&B would find, and where: the environment's, or that of its server in netrc.

    Both are empty where there is none; a token file's is asked of W&B when it is needed.
    """
    if key:
        return key, "WANDB_API_KEY"
    if file := os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return file, "WANDB_IDENTITY_TOKEN_FILE"
    file = os.environ.get("NETRC") or str(Path("~/.netrc").expanduser())
    try:
        entries = netrc.netrc(file)
    except (OSError, UnicodeDecodeError, netrc.NetrcParseError):
        return "", ""
    host = urlsplit(base_url()).netloc
    hosts = HOSTS if host in HOSTS else (host,)
    keys = [password for name in hosts if (password := (entries.authenticators(name) or ("", "", ""))[2])]
    return (keys[0], file) if keys else ("", "")


def check_key(key: str, place: str) -> None:
    """Raise ValueError for what W&B (0.31) takes for no key; the error does not show it."""
    token = r"[\w-]+\.[\w-]+\.[\w-]+"  # a JWT
    if re.fullmatch(rf"{token}|([^-\s]*-)?[\w-]{{{KEY_LENGTH},}}", key, re.ASCII):
        return
    problem = f"only {len(key)} characters"
    if re.search(r"\s", key):
        problem = "blanks or line ends"
    elif len(key) >= KEY_LENGTH:
        problem = "other characters than letters, digits and underscores"
    raise ValueError(
        f"{place} holds no W&B key: it has {problem}; copy it from {base_url()}/authorize, or remove it and "
        "run `wandb login`"
    )


def check_url(url: str) -> None:
    """Raise ValueError for an address of a server that W&B would refuse."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and not re.search(r"\s", url)
        _ = parts.port
    except ValueError:
        whole = False
    host = parts.hostname if whole else ""
    if not whole or host in ("wandb.ai", "www.wandb.ai", "app.wandb.ai"):
        example = "api.wandb.ai" if "wandb.ai" in url else re.sub(r".*//|\s", "", url)
        raise ValueError(
            f"WANDB_BASE_URL={url} is no address of a W&B server; give for example https://{example}"
        )


def base_url() -> str:
    """Returns the W&B server's address: WANDB_BASE_URL's, that of `wandb login --host`, or W&B's own."""
    url = os.environ.get("WANDB_BASE_URL")
    if not url:
        folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser()
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(folder / "settings")
            url = settings.get("default", "base_url", fallback=None)
        except (configparser.Error, UnicodeDecodeError):
            url = None
    return (url or DEFAULT_URL).rstrip("/")
