"""``docs/conformance.rst`` out of the table."""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import fill

from .site import Row

HEAD = """\
Conformance
===========
.. Written by python -m tests.conformance: change the table in tests/conformance instead.

"""
ABOUT = (
    "What a service proxy of Kubernetes has to do, rule by rule, and what kproxy does. The rules are those of"
    " kube-proxy and of the KEPs and files that are named. Of {rules} rules {works} hold, {differs} hold with a"
    " difference that is told, and {out} are left out for a reason.",
    "*Packets*: so many connections are traced through the rules as each writer ({writers}) writes them, {flows} in"
    " all; where there is a *k*, some of them are also made through the real kernel, with each writer. Rules without a"
    " number are shown by other tests.",
)


def page(rows: Iterable[Row], writers: Iterable[str]) -> str:
    """The page, without any date: the same table gives the same text."""
    every = list(rows)
    merged: dict[str, list[Row]] = {}
    for row in every:
        merged.setdefault(row.name, []).append(row)
    firsts = [group[0] for group in merged.values()]

    def count(verdict: str) -> int:
        return sum(it.verdict == verdict for it in firsts)

    numbers = {
        "rules": len(firsts),
        "works": count("works"),
        "differs": count("differs"),
        "out": count("left out"),
        "flows": sum(len(row.flows) for row in every),
        "writers": ", ".join(writers),
    }
    text = [HEAD, "\n".join(f"{fill(it.format(**numbers), 119)}\n" for it in ABOUT)]
    for topic in dict.fromkeys(row.topic for row in firsts):
        text.append(f"\n{topic}\n{'-' * len(topic)}\n")
        text.append(".. list-table::\n   :widths: 50 8 42\n   :header-rows: 1\n\n")
        text.append("   * - rule\n     - packets\n     - here\n")
        for name, group in merged.items():
            if group[0].topic == topic:
                text.append(_row(name, group))
    return "".join(text)


def _row(name: str, group: list[Row]) -> str:
    row = group[0]
    flows = sum(len(it.flows) for it in group)
    packets = f"{flows}{' k' if row.kernel else ''}" if flows else ""
    why = row.why.rstrip(".")
    keys = ", ".join(f"``{it}``" for it in row.keys)
    if row.verdict == "left out":
        said = f"*left out*: {why}"
    elif keys or not row.rule:
        said = f"{keys}; {why}" if keys and why else keys or why
    else:
        said = f"*differs*: {why}" if why else "yes"
    source = f" (*{row.rule}*)" if row.rule else ""
    return "".join(
        f"   {mark} - {cell}".rstrip() + "\n"
        for mark, cell in (("*", f"{row.title}{source}"), (" ", packets), (" ", said))
    )
