"""
Writes two rulesets in turns, for ever: a program to be killed. ``python -m tests.shared.resyncer WRITER COUNT``; it
says ``writing`` when the first is in force.
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import task
from twisted.internet.defer import Deferred

from tests.shared.writers import many
from twisted_kproxy import plugin
from twisted_kproxy.interfaces import IWriterMaker
from twisted_kproxy.netfilter.nft.writer import NftablesWriter

PORTS = (20000, 30000)


def makeWriter(reactor: Any, name: str) -> Any:
    if name == "nft":
        return NftablesWriter(reactor, useNetlink=False)
    return plugin.find(IWriterMaker, name).make(reactor)


async def main(reactor: Any, name: str, count: str) -> None:
    writer = makeWriter(reactor, name)
    await writer.adopt()
    n = 0
    while True:
        await writer.replace(many(int(count), PORTS[n % 2]))
        if n == 0:
            print("writing", flush=True)
        n += 1


if __name__ == "__main__":
    task.react(lambda reactor, *said: Deferred.fromCoroutine(main(reactor, *said)), sys.argv[1:])
