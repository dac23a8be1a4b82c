"""
Ini text as sections, keys and values that know their line. Stricter than :mod:`configparser`, which stops at the first
fault, takes a duplicate's last value or none, and forgets where a value stood.
"""

from __future__ import annotations

from msgspec import Struct

MAX_BYTES = 1 << 20


class Entry(Struct, frozen=True):
    """One ``key = value``; inline comment and blanks around are gone."""

    key: str
    value: str
    line: int


class Section(Struct, frozen=True):
    """A ``[name]`` with its entries, each key once."""

    name: str
    line: int
    entries: dict[str, Entry]


class Fault(Struct, frozen=True):
    """Something wrong at a line (0: with the whole)."""

    line: int
    text: str


def shown(text: str, limit: int = 200) -> str:
    """Text from a file made fit for a terminal: no control characters, not endless."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= limit else f"{text[:limit]}…"


def parseIni(text: str) -> tuple[dict[str, Section], list[Fault]]:
    """
    Take apart the text of an ini file.

    Blanks around lines, keys and values mean nothing. A comment is a line that begins with ``;`` or ``#``, or what
    follows a ``;`` with a blank before it. There are no continuation lines, no interpolation and no ``key: value``.

    :return: the sections by name, and every fault; what is at fault is left out.
    """
    sections: dict[str, Section] = {}
    faults: list[Fault] = []
    current: Section | None = None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if not line or line[0] in ";#":
            continue
        if line[0] == "[":
            current = _section(_uncommented(line), number, sections, faults)
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or not key:
            faults.append(Fault(number, f"{shown(line)!r}: expected 'key = value' or '[section]'"))
        elif current is None:
            faults.append(Fault(number, f"{shown(key)} stands before any section: put it under [kproxy]"))
        elif key in current.entries:
            first = current.entries[key].line
            reason = f"is given twice, first on line {first}: keep one"
            faults.append(Fault(number, f"[{shown(current.name)}] {shown(key)} {reason}"))
        else:
            current.entries[key] = Entry(key, _uncommented(f" {value}"), number)
    return sections, faults


def _uncommented(text: str) -> str:
    """The text before an inline comment."""
    for index in range(1, len(text)):
        if text[index] == ";" and text[index - 1].isspace():
            return text[:index].strip()
    return text.strip()


def _section(line: str, number: int, sections: dict[str, Section], faults: list[Fault]) -> Section:
    name = " ".join(line[1:-1].split()).replace(" :", ":").replace(": ", ":")
    section = Section(name, number, {})
    if not line.endswith("]") or not name:
        faults.append(Fault(number, f"{shown(line)!r}: a section is written as [name]"))
    elif name in sections:
        first = sections[name].line
        faults.append(Fault(number, f"[{shown(name)}] is given twice, first on line {first}: join them"))
    else:
        sections[name] = section
    return section
