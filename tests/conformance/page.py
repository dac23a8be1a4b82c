"""``docs/conformance.rst`` out of the table."""

from __future__ import annotations

from collections.abc import Iterable

from .site import Row

HEAD = """\
Conformance
===========
.. Written by python -m tests.conformance; change the table in tests/conformance instead.

What a service proxy of Kubernetes has to do, rule by rule, and what kproxy does. The rules are those of kube-proxy and
of the KEPs and files that are named. {rules} rules: {works} hold, {differs} hold with a difference that is told,
{out} are left out for a reason.

*Packets* are {flows} connections that are traced through the rules as each writer ({writers}) would write them; those
marked with *k* are also made on the real kernel, with each writer. What has no number is shown by other tests. A plus
sign stands for “works”.
"""


def page(rows: Iterable[Row], writers: Iterable[str]) -> str:
    """The page, without any date: the same table gives the same text."""
    every = list(rows)
    merged: dict[str, list[Row]] = {}
    for row in every:
        merged.setdefault(row.name, []).append(row)
    firsts = [group[0] for group in merged.values()]

    def count(verdict: str) -> int:
        return sum(it.verdict == verdict for it in firsts)

    text = [
        HEAD.format(
            rules=len(firsts), works=count("works"), differs=count("differs"), out=count("left out"),
            flows=sum(len(row.flows) for row in every), writers=", ".join(writers),
        )
    ]  # fmt: skip
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
    here = {"works": "\\+", "differs": "\\+", "left out": "left out:"}[row.verdict]
    keys = ", ".join(f"``{it}``" for it in row.keys)
    said = " ".join(it for it in (here, f"{keys}{'.' if keys and row.why else ''}", row.why) if it)
    source = f" (*{row.rule}*)" if row.rule else ""
    return "".join(
        f"   {mark} - {cell}".rstrip() + "\n"
        for mark, cell in (("*", f"{row.title}{source}"), (" ", packets), (" ", said))
    )
