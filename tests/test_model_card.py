"""Model cards: the declared base as the Hub's cards write it, and nothing from a card that is damaged or hostile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmfp.model_card import UNDECLARED, Declaration, declaration, read_card

CARDS = {
    "---\nbase_model: org/base\n---\n# Model": Declaration(("org/base",)),
    "---\nlicense: mit\nbase_model:\n- org/a\n- org/b\n- org/a\nbase_model_relation: merge\n---": Declaration(
        ("org/a", "org/b"), "merge"
    ),
    "\ufeff---\r\nbase_model: [org/a, 3, null, '']\r\nbase_model_relation: 7\r\n---\r\n": Declaration(("org/a",)),
    "---\nbase_model: org/base\n# never closed": UNDECLARED,
    "# no metadata\nbase_model: org/base\n": UNDECLARED,
    "---\n- a list\n---\n": UNDECLARED,
    "---\nbase_model: {org: base}\n---\n": UNDECLARED,
    "---\nbase_model: !!python/object/apply:os.system [exit]\n---\n": UNDECLARED,
    "---\n" + "[" * 5000 + "\n---\n": UNDECLARED,
    "---\na: &a [x, x]\nb: &b [*a, *a]\nbase_model: *b\n---\n": UNDECLARED,
    f"---\nbase_model: {'x' * 513}\n---\n": UNDECLARED,
    "": UNDECLARED,
}


@pytest.mark.parametrize(("card", "declared"), CARDS.items(), ids=range(len(CARDS)))
def test_a_card_declares_what_it_says_and_nothing_else(tmp_path: Path, card: str, declared: Declaration) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert read_card(tmp_path) == declared


def test_a_card_that_is_no_file_or_no_text_declares_nothing(tmp_path: Path) -> None:
    assert read_card(tmp_path) == UNDECLARED
    os.mkfifo(tmp_path / "README.md")
    assert read_card(tmp_path) == UNDECLARED
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").write_bytes(b"---\nbase_model: \xff\xfe\n---\n" + bytes(1000))
    assert read_card(tmp_path).base_models == ("\ufffd\ufffd",)


def test_no_more_bases_than_a_merge_can_have() -> None:
    assert len(declaration({"base_model": [f"org/{n}" for n in range(1000)]}).base_models) == 64
