"""The models of an organisation or a user, page by page, as the Hub lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlencode

from llmfp.errors import HubError
from llmfp.hub.client import Client, same_origin
from llmfp.hub.source import is_repo
from llmfp.report import printable

_PAGE = 500
_PAGE_BYTES = 64 << 20
_MOST_PAGES = 100_000
_NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="next"')
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Listed:
    """A model of a listing. revision: the commit of its main branch, None where the Hub does not say."""

    repo: str
    revision: str | None


def models(
    client: Client, author: str, *, tag: str | None = None, limit: int | None = None, since: datetime | None = None
) -> Iterator[Listed]:
    """The models of an author, the last changed first; those with a tag, so many, changed on that day or later.

    A request a page, as the caller gets there. Raises HubError, naming the author.
    """
    if client.settings.offline:
        raise HubError(f"{author}: HF_HUB_OFFLINE is set", hint="unset it, or give --list with local paths")
    asked = [
        ("author", author),
        ("sort", "lastModified"),
        ("direction", "-1"),
        ("limit", str(min(limit or _PAGE, _PAGE))),
    ]
    asked += [("expand", "sha"), ("expand", "lastModified"), *([("filter", tag)] if tag else [])]
    url = f"{client.settings.endpoint}/api/models?{urlencode(asked)}"
    left = limit
    for _ in range(_MOST_PAGES):
        answer, headers = client.json(url, author, _PAGE_BYTES)
        if not isinstance(answer, list):
            raise HubError(f"{author}: the Hub's listing cannot be understood (no list)")
        for each in answer:
            found, changed = _listed(each, author)
            if (left is not None and left <= 0) or (since is not None and changed is not None and changed < since):
                return
            left = None if left is None else left - 1
            yield found
        following = _NEXT.search(headers.get("link", ""))
        if following is None or left == 0:
            return
        url = following[1]
        if not same_origin(url, client.settings.endpoint):
            raise HubError(f"{author}: the Hub's listing goes on at another server")


def _listed(entry: object, author: str) -> tuple[Listed, datetime | None]:
    if not isinstance(entry, dict) or not isinstance(repo := entry.get("id"), str):
        raise HubError(f"{author}: the Hub's listing cannot be understood (a model without a name)")
    if not is_repo(repo):
        raise HubError(f"{author}: the Hub lists a model by the name {printable(repo[:100])!r}")
    sha, changed = entry.get("sha"), entry.get("lastModified")
    try:
        when = datetime.fromisoformat(changed) if isinstance(changed, str) else None
    except ValueError:
        when = None
    known = isinstance(sha, str) and _COMMIT.fullmatch(sha)
    return Listed(repo, sha if known else None), when if when is not None and when.tzinfo else None
