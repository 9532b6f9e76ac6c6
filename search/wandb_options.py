"""Where do a study's W&B runs go? Flags win over what the study remembers, that over W&B's own variables.

The key is removed from the environment before Ray starts, so that no worker, no runtime environment and no
log of Ray's ever contains it; only the process that talks to W&B gets it back (search/wandb_sync.py).
Imports nothing heavy and never wandb, whose import takes a second.
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

from tunefleet.models.checks import check_name

MODES = ("off", "offline", "online")
OF_WANDB_MODE = {  # by values of WANDB_MODE
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "off",
}
NAMES = {  # field: its variable of W&B's, and what it is
    "project": ("WANDB_PROJECT", "W&B project (default: WANDB_PROJECT, else tunefleet)"),
    "entity": ("WANDB_ENTITY", "W&B user or team (default: WANDB_ENTITY, else the key's own)"),
    "group": (
        "WANDB_RUN_GROUP",
        "W&B group of the study's runs (default: WANDB_RUN_GROUP, else the study's name)",
    ),
    "tags": ("WANDB_TAGS", "W&B tags of every run (default: WANDB_TAGS)"),
}
DEFAULT_URL = "https://api.forge.coreweave.com"  # of wandb 0.31
PASSED_ON = (  # variables of W&B's that it reads itself; all others are ours to interpret
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"),
    *("WANDB_IDENTITY_TOKEN_FILE", "WANDB_INSECURE_DISABLE_SSL"),
)
HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # two names of one server: a key for either is valid
NOT_IN_A_PROJECT = "/\\#?%:"  # W&B's rule
LONGEST_NAME, LONGEST_TAG = 128, 64  # characters, W&B's too
KEY_LENGTH = 40


@dataclass(frozen=True)
class WandbOptions:
    """What a user may choose about W&B; none of it changes a result, so a resumed study may change it.

    Raises:
        ValueError: A value that W&B would refuse.
    """

    mode: str
    project: str = "tunefleet"
    entity: str | None = None  # None: the key's own
    group: str | None = None  # None: the study's name
    tags: tuple[str, ...] = ()
    sweep: bool = False
    key: str | None = field(default=None, repr=False)  # None: it is in netrc, or there is none

    def __post_init__(self) -> None:
        check_name("--wandb", self.mode, MODES)
        names = {"project": self.project, "entity": self.entity or "-", "group": self.group or "-"}
        texts = [(name, text, LONGEST_NAME) for name, text in names.items()]
        for name, text, longest in [*texts, *(("tags", tag, LONGEST_TAG) for tag in self.tags)]:
            if not isinstance(text, str) or not text.isprintable():
                raise ValueError(f"--wandb-{name}={text} is not possible; give printable characters")
            if not 0 < len(text) <= longest:
                raise ValueError(f"--wandb-{name}={text} is not possible; give 1 to {longest} characters")
        if any(character in self.project for character in NOT_IN_A_PROJECT):
            raise ValueError(
                f"--wandb-project={self.project} is not possible; give none of {NOT_IN_A_PROJECT}"
            )
        if self.mode != "off":
            check_url(base_url())
            if bad := [name for name in PASSED_ON if not os.environ.get(name, "").isprintable()]:
                raise ValueError(f"{bad[0]} has characters that W&B cannot take; set it again, or unset it")
        if self.mode == "online":
            key, location = find_key(self.key)
            if not key:
                raise ValueError(
                    f"there is no W&B key for {base_url()}; run `wandb login`, or set WANDB_API_KEY, or give "
                    "--wandb offline and upload later"
                )
            if location != "WANDB_IDENTITY_TOKEN_FILE":
                check_key(key, location)

    def remembered(self) -> dict[str, Any]:
        """Return what the study's folder keeps: all but the key."""
        return {name: value for name, value in asdict(self).items() if name != "key"}


def choose(given: Mapping[str, Any], remembered: Mapping[str, Any] | None = None) -> WandbOptions:
    """Return the options of a study.

    Args:
        given: The flags that were given, by field, and ``key`` where the environment had one.
        remembered: What the study was run with before.

    Raises:
        ValueError: A value is impossible, or W&B is to be online without a key.
    """
    values = {**(remembered or _from_variables()), **given}
    values.setdefault("mode", "online" if find_key(values.get("key"))[0] else "offline")
    tags = values.get("tags") or ()
    values["tags"] = (tags,) if isinstance(tags, str) else tuple(tags)
    return WandbOptions(**values)


def _from_variables() -> dict[str, Any]:
    values: dict[str, Any] = {
        name: text for name, (variable, _) in NAMES.items() if (text := os.environ.get(variable))
    }
    if "tags" in values:
        values["tags"] = values["tags"].split(",")
    if mode := os.environ.get("WANDB_MODE"):
        if mode not in OF_WANDB_MODE:
            raise ValueError(f"WANDB_MODE={mode} is unknown; choose from: {', '.join(OF_WANDB_MODE)}")
        values["mode"] = OF_WANDB_MODE[mode]
    return values


def add_wandb_flags(parser: argparse.ArgumentParser, *, mode: bool = True) -> None:
    """Add --wandb (where the mode is a choice) and its companions; one not given leaves no trace."""
    if mode:
        parser.add_argument(
            "--wandb",
            dest="wandb_mode",
            choices=MODES,
            default=argparse.SUPPRESS,
            help="Weights & Biases (default: WANDB_MODE, else online where there is a key, else offline)",
        )
    for name, (_, text) in NAMES.items():
        several: Any = {"nargs": "+", "metavar": "TAG"} if name == "tags" else {"metavar": "NAME"}
        parser.add_argument(f"--wandb-{name}", default=argparse.SUPPRESS, help=text, **several)
    parser.add_argument(
        "--wandb-sweep",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the study as a W&B sweep, too, once its runs are there",
    )


def take_flags(options: MutableMapping[str, Any]) -> dict[str, Any]:
    """Move W&B's flags out of parsed options, and the key out of the environment; return both."""
    names = [name for name in options if name.startswith("wandb_")]
    given = {name.removeprefix("wandb_"): options.pop(name) for name in names}
    key = os.environ.pop("WANDB_API_KEY", None)
    return given | ({"key": key} if key else {})


def find_key(key: str | None) -> tuple[str, str]:
    """Return the key that W&B would find, and where: the environment's, or its server's in netrc.

    Both are empty where there is none; of a token file it is the path.
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
    for name in HOSTS if host in HOSTS else (host,):
        if password := (entries.authenticators(name) or ("", "", ""))[2]:
            return password, file
    return "", ""


def check_key(key: str, location: str) -> None:
    """Raise ValueError for what W&B (0.31) does not accept as a key; the error does not show it."""
    token = r"[\w-]+\.[\w-]+\.[\w-]+"  # a JWT
    if re.fullmatch(rf"{token}|([^-\s]*-)?[\w-]{{{KEY_LENGTH},}}", key, re.ASCII):
        return
    problem = f"only {len(key)} characters"
    if re.search(r"\s", key):
        problem = "blanks or line ends"
    elif len(key) >= KEY_LENGTH:
        problem = "other characters than letters, digits and underscores"
    raise ValueError(
        f"{location} holds no W&B key: it has {problem}; copy it from {base_url()}/authorize, or remove it "
        "and run `wandb login`"
    )


def check_url(url: str) -> None:
    """Raise ValueError for an address of a server that W&B would refuse."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)
        valid = valid and parts.hostname not in ("wandb.ai", "www.wandb.ai", "app.wandb.ai")
    except ValueError:
        valid = False
    if not valid:
        example = "api.wandb.ai" if "wandb.ai" in url else re.sub(r".*//|\s", "", url)
        raise ValueError(
            f"WANDB_BASE_URL={url} is no address of a W&B server; give for example https://{example}"
        )


def base_url() -> str:
    """Return the W&B server's address: WANDB_BASE_URL's, that of `wandb login --host`, or W&B's own."""
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
