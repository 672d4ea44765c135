"""Which words two answers do not share."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

# Japanese and Chinese have no spaces: there each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+|\s+|.")


def word_diff(before: str, after: str) -> list[list[str]]:
    """``[["equal", …], ["delete", …], ["insert", …]]``: without inserts it is ``before``, without deletes ``after``."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    parts: list[list[str]] = []
    for tag, i, j, k, m in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            parts.append(["equal", "".join(old[i:j])])
            continue
        parts += [["delete", "".join(old[i:j])]] if j > i else []
        parts += [["insert", "".join(new[k:m])]] if m > k else []
    return parts
