"""The environment's say in how the Hub is reached, read in this one place and never at import."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from llmfp.errors import HubError

DEFAULT_ENDPOINT = "https://huggingface.co"
_TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True, slots=True)
class Settings:
    """endpoint: of the Hub, without a slash at the end; offline: whether nothing may be asked of any server;
    cache: where huggingface_hub keeps what it has downloaded; token: None for an anonymous client."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = None
    offline: bool = False
    cache: Path = Path("~/.cache/huggingface/hub")

    @staticmethod
    def from_environment() -> Settings:
        """HF_ENDPOINT, HF_TOKEN (or the token of `hf auth login`), HF_HUB_OFFLINE, HF_HUB_CACHE, HF_HOME.

        Raises HubError for an endpoint that is not https, unless it is on this machine or its private network.
        """
        endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        try:
            parts = urlsplit(endpoint)
            unusable = parts.scheme not in ("https", "http") or not parts.hostname or parts.username or parts.query
        except ValueError:
            unusable = True
        if unusable:
            raise HubError("HF_ENDPOINT is not a web address", hint=f"write for example {DEFAULT_ENDPOINT}")
        if parts.scheme == "http" and not is_local(parts.hostname):
            raise HubError(
                f"HF_ENDPOINT {endpoint}: http shows the token to the network", hint="use https unless it is local"
            )
        home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
        return Settings(
            endpoint=endpoint,
            token=_token(),
            offline=any(os.environ.get(key, "").upper() in _TRUE for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
            cache=Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser(),
        )


def is_local(host: str | None) -> bool:
    """Whether a host is this machine or an address of a private network, written as such."""
    if host is None or host == "localhost" or host.endswith(".localhost"):
        return host is not None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_private


def _token() -> str | None:
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in _TRUE:
        return None
    from huggingface_hub import get_token

    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable()):
        raise HubError("HF_TOKEN holds characters that no token has", hint="set it again, or hf auth login")
    return token
