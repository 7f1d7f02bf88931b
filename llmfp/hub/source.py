"""What SOURCE means: a path, a model of the Hub, or the address of a weight file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llmfp.errors import HubError

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_REVISION = r"refs/(?:pr|convert)/[\w.-]{1,100}|[\w.-]{1,250}"
_HUB_ID = re.compile(rf"^(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?$", re.ASCII)
_HUB_URI = re.compile(
    rf"^(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>[^\0\\:]{{1,500}}))?$", re.ASCII
)
_PAGE = re.compile(rf"^/(?P<repo>{_PART}/{_PART})/(?:resolve|blob)/(?P<revision>{_REVISION})/(?P<file>.+)$", re.ASCII)
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class HubId:
    """A model of the Hub; `file` is the one weight file meant, or None for the whole model."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f"/{self.file}" if self.file else "")


@dataclass(frozen=True, slots=True)
class WeightUrl:
    """The address of a weight file. `shown`: the same without query, user and fragment, which could be secret."""

    url: str

    @property
    def shown(self) -> str:
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def __str__(self) -> str:
        return self.shown


def looks_remote(source: str | os.PathLike[str]) -> bool:
    """Whether a SOURCE is an address, or has the form of a Hub id and is no path here."""
    text = os.fspath(source)
    if text.startswith(("hf://", "https://", "http://")):
        return True
    return bool(_HUB_ID.match(text)) and ".." not in text and not text.endswith(_WEIGHTS) and not Path(text).exists()


def parse_source(source: str | os.PathLike[str], endpoint: str) -> HubId | WeightUrl:
    """What a SOURCE that looks remote means; a page of the endpoint is a file of its repository.

    Raises HubError for what cannot be one.
    """
    text = os.fspath(source)
    if text.startswith("hf://"):
        found = _HUB_URI.match(text.removeprefix("hf://").rstrip("/"))
        if found is None or ".." in text:
            raise HubError(
                f"{text[:200]}: not a model of the Hub", hint="write hf://ORG/NAME or hf://ORG/NAME@REVISION"
            )
        return HubId(found["repo"], found["revision"], found["file"])
    if text.startswith(("https://", "http://")):
        return _web_address(text, endpoint)
    found = _HUB_ID.match(text)
    if found is None:
        raise HubError(f"{text[:200]}: not a model of the Hub", hint="write ORG/NAME or ORG/NAME@REVISION")
    return HubId(found["repo"], found["revision"])


def _web_address(text: str, endpoint: str) -> HubId | WeightUrl:
    address = WeightUrl(text)
    try:
        parts, shown = urlsplit(text), address.shown
    except ValueError:
        raise HubError(f"{text.partition('?')[0][:200]!r} is not a web address") from None
    if not parts.hostname or not text.isprintable() or " " in text:
        raise HubError(f"{shown[:200]!r} is not a web address")
    hub = urlsplit(endpoint)
    if (parts.scheme, parts.netloc) == (hub.scheme, hub.netloc):
        page = _PAGE.match(unquote(parts.path).removeprefix(hub.path.rstrip("/")))
        if page is None or ".." in page["file"]:
            raise HubError(
                f"{shown}: not the page of a file", hint="give hf://ORG/NAME, or the address of one of its weight files"
            )
        return HubId(page["repo"], page["revision"], page["file"])
    return address
