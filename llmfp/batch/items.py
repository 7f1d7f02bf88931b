"""What a batch has to do: the lines of a list, or all models of an organisation on the Hub."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from datetime import datetime

from llmfp.errors import LlmfpError
from llmfp.report import printable
from llmfp.sources import COMMIT, HUB, HUB_ID, Source, explained, hub_api, source


def from_list(lines: Iterable[str]) -> Iterator[Source]:
    """The sources of a list, one a line; what follows " #" is a comment. Raises LlmfpError for what is none."""
    for number, line in enumerate(lines, 1):
        text = re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip()
        if not text:
            continue
        found = source(text)
        if found is None:
            raise LlmfpError(
                f"line {number} of the list: {text[:200]}: no such file, and no Hub id",
                hint="give a path, org/name[@revision] or an https URL on every line",
            )
        yield found


def from_hub(
    author: str, *, tag: str | None = None, limit: int | None = None, since: datetime | None = None
) -> Iterator[Source]:
    """The models of an organisation or a user, the last changed first."""
    with explained(author):
        listed = iter(
            hub_api().list_models(author=author, filter=tag, sort="last_modified", expand=["sha", "lastModified"])
        )
    if since is not None:
        listed = itertools.takewhile(lambda model: model.last_modified is None or model.last_modified >= since, listed)
    with explained(author):
        for model in itertools.islice(listed, limit):
            if HUB_ID.fullmatch(model.id) is None:
                raise LlmfpError(f"{author}: the Hub lists a model by the name {printable(model.id)[:200]!r}")
            commit = model.sha if model.sha and COMMIT.fullmatch(model.sha) else None
            yield Source(f"{HUB}{model.id}@{commit or 'main'}", model.id, commit or "main", commit)
