"""What a batch has to do: the lines of a list, or all models of an organisation on the Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmfp.errors import LlmfpError
from llmfp.hub.source import HubId
from llmfp.sources import Source, known, local, on_the_hub

if TYPE_CHECKING:
    from llmfp.hub.client import Client


def from_list(lines: Iterable[str]) -> Iterator[Source]:
    """The sources of a list, one a line; what follows " #" is a comment. What is none will fail by itself."""
    for line in lines:
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if text:
            try:
                yield known(text)
            except LlmfpError:
                yield local(Path(text))


def from_hub(
    client: Client, author: str, *, tag: str | None = None, limit: int | None = None, since: str | None = None
) -> Iterator[Source]:
    """The models of an organisation or a user, the last changed first. Raises HubError."""
    from llmfp.hub.listing import list_models

    for listed in list_models(client, author=author, filters=(tag,) if tag else (), limit=limit, since=since):
        yield on_the_hub(HubId(listed.repo, listed.revision))
