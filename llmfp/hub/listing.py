"""Models of an organisation, or of the whole Hub: page by page, as many API calls as there are pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from llmfp.errors import HubError
from llmfp.hub.client import Client, same_origin

_PAGE_BYTES = 64 << 20
_EXPAND = ("sha", "lastModified", "gated", "pipeline_tag", "private", "disabled")
_NEXT = re.compile(r'<(?P<url>[^<>]{1,4000})>\s*;\s*rel="next"')
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Listed:
    """One model of a listing. revision: the commit that main is at; last_modified: as the Hub writes dates, in UTC."""

    repo: str
    revision: str | None
    last_modified: str | None
    gated: bool


def list_models(
    client: Client,
    *,
    author: str | None = None,
    filters: tuple[str, ...] = (),
    since: str | None = None,
    limit: int | None = None,
) -> Iterator[Listed]:
    """Models, newest first. Raises HubError.

    author   a user or an organisation
    filters  tags that each must have, text-generation for example
    since    nothing last modified before this date (2026-01-31, or longer as the Hub writes it)
    limit    at most so many
    """
    if client.settings.offline:
        raise HubError("HF_HUB_OFFLINE is set; models cannot be listed", hint="unset it, or give a list with --list")
    query: list[tuple[str, str]] = [("sort", "lastModified"), ("limit", "1000" if limit is None else str(limit))]
    query += [("author", author)] if author else []
    query += [("filter", each) for each in filters] + [("expand", each) for each in _EXPAND]
    url: str | None = f"{client.settings.endpoint}/api/models?{urlencode(query)}"
    name, left, seen = f"models of {author}" if author else "models", limit, set[str]()
    while url is not None:
        page, headers = client.json(url, name, _PAGE_BYTES)
        if not isinstance(page, list):
            raise HubError(f"{name}: the Hub's listing cannot be understood")
        for item in page:
            listed = _listed(item, name)
            if since is not None and (listed.last_modified or "") < since:
                return
            if left == 0:
                return
            left = None if left is None else left - 1
            yield listed
        following = _NEXT.search(headers.get("link", ""))
        url = following["url"] if following and page else None
        if url is not None and (url in seen or not same_origin(url, client.settings.endpoint)):
            raise HubError(f"{name}: the Hub's listing goes on at an address that cannot be right")
        seen.add(url or "")


def _listed(item: Any, name: str) -> Listed:
    repo = item.get("id") if isinstance(item, dict) else None
    if not isinstance(repo, str) or ".." in repo or not (_REPO.fullmatch(repo) or re.fullmatch(r"[\w.-]{1,96}", repo)):
        raise HubError(f"{name}: the Hub lists something that is no model: {str(repo)[:80]!r}")
    sha, modified = item.get("sha"), item.get("lastModified")
    return Listed(
        repo,
        sha if isinstance(sha, str) and re.fullmatch(r"[0-9a-f]{40}", sha) else None,
        modified if isinstance(modified, str) else None,
        bool(item.get("gated")),
    )
