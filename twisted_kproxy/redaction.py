"""
Secrets that must not come out, whatever writes them. Whoever reads a credential registers it here with :func:`hide`;
whatever leaves the process as text for people (logs, status pages, what ``--check`` prints) goes through
:func:`redacted`. Errors and ``repr`` do not show secrets in the first place: this is the net below.
"""

from __future__ import annotations

import re
from base64 import b64encode
from typing import Any
from urllib.parse import quote

MASK = "***"
#: Characters that a secret has at least. A shorter one would blot out ordinary words, and so give itself away.
SHORTEST = 6
#: How many secrets are remembered; the oldest goes first. Tokens are renewed all day long, and old ones expire.
REMEMBERED = 1000

_ALWAYS = (
    (re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]+"), rf"\1{MASK}"),
    (re.compile(r"""(?i)\b(authorization["']?\s*[:=,]\s*[\[(]*\s*(?:b?["'])?)[^"'\r\n\])}]+"""), rf"\1{MASK}"),
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]+)?"), MASK),  # JSON web tokens (RFC 7519), as service accounts have
    (re.compile(r"(//)[^/\s@\"']+@"), rf"\1{MASK}@"),
)


class _Secrets:
    """Registered secrets, in every spelling in which they might come out."""

    def __init__(self) -> None:
        self._known: dict[str, frozenset[str]] = {}
        self._every: tuple[str, ...] = ()

    def hide(self, secret: str) -> None:
        if len(secret.strip()) < SHORTEST:
            return
        spellings = self._known.pop(secret, None)  # what is in use again counts as new
        if spellings is None:
            while len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            spellings = _spellings(secret)
            self._known[secret] = spellings
            self._every = tuple(sorted({it for known in self._known.values() for it in known}, key=len, reverse=True))
        else:
            self._known[secret] = spellings

    def redacted(self, text: str) -> str:
        # Not one pattern of them all: that takes seconds to compile and is slow to search once tokens have rotated for
        # a day, while looking for each takes microseconds.
        for it in self._every:
            if it in text:
                text = text.replace(it, MASK)
        for pattern, replacement in _ALWAYS:
            text = pattern.sub(replacement, text)
        return text


def _spellings(secret: str) -> frozenset[str]:
    bare = secret.strip()
    spellings = {secret, bare, quote(secret, safe=""), quote(bare, safe=""), repr(secret)[1:-1]}
    spellings.update(b64encode(it.encode("utf-8", "surrogateescape")).decode("ascii") for it in (secret, bare))
    # A key in PEM has many lines, and each may come out alone.
    spellings.update(line for line in secret.splitlines() if len(line) >= 16 and not line.startswith("-----"))
    return frozenset(spellings)


_secrets = _Secrets()


def hide(secret: str) -> None:
    """From now on this value comes out of no log as anything but ``***``. Those of fewer than six letters are not."""
    _secrets.hide(secret)


def redacted(text: str) -> str:
    """The text without registered secrets, bearer tokens, ``Authorization`` values and user names in URLs."""
    return _secrets.redacted(text)


def redactedValue(value: Any) -> Any:
    """The same for every text in a JSON-able value."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redactedValue(it) for key, it in value.items()}
    if isinstance(value, list | tuple):
        return [redactedValue(it) for it in value]
    return value
