"""
Relay engines against a perfect pipe: random scripts of writing, pausing, half-closing, resetting and cutting, at both
ends. Mixed into a test case for each engine, beside :class:`tests.shared.relays.RelaySuite`.
"""

from __future__ import annotations

import queue
import random
import select
import socket
import time
from typing import Any, Literal, TypeAlias

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet.task import deferLater
from twisted.internet.threads import blockingCallFromThread

from tests.shared.relays import PATIENCE, inThread, reset, tcpPair
from twisted_kproxy.core.values import Outcome

Who: TypeAlias = Literal["client", "backend"]
ENDS: tuple[Who, Who] = ("client", "backend")
#: What each end says, whatever the script: so that a byte of the other stream, or at another place, shows.
LONGEST = 2 << 20
STREAMS = {who: random.Random(who).randbytes(LONGEST) for who in ENDS}

_who = st.sampled_from(ENDS)
_acts = st.one_of(
    st.tuples(st.just("write"), _who, st.sampled_from((1, 100, 4096, 65536, 65537, 200_000, 500_000))),
    st.tuples(st.just("read"), _who, st.sampled_from((1, 1000, 65536, 400_000))),
    st.tuples(st.just("pause"), _who, st.integers(0, 3)),
    st.tuples(st.just("halfClose"), _who, st.just(0)),
    st.tuples(st.just("reset"), _who, st.just(0)),
    st.tuples(st.just("cut"), _who, st.just(0)),
)
#: How it ends is seldom what most of a script is about.
_gentle = st.one_of(
    st.tuples(st.just("write"), _who, st.sampled_from((1, 100, 4096, 65536, 65537, 200_000, 500_000))),
    st.tuples(st.just("read"), _who, st.sampled_from((1, 1000, 65536, 400_000))),
    st.tuples(st.just("pause"), _who, st.integers(0, 3)),
)
SCRIPTS = st.tuples(st.lists(_gentle, max_size=8), st.lists(_acts, max_size=6)).map(lambda it: it[0] + it[1])


class End:
    """
    One end, as the model sees it.

    :ivar written: how much of its stream it has got rid of.
    :ivar got: how much of the other's stream it has read.
    :ivar over: how reading ended: ``end``, ``reset``; ``""`` before.
    :ivar ended: it had half-closed before it reset.
    """

    def __init__(self, who: Who, sock: socket.socket, early: int) -> None:
        self.stream = STREAMS[who]
        self.other = STREAMS["backend" if who == "client" else "client"]
        self.socket = sock
        self.written = early
        self.got = 0
        self.halfClosed = self.hasReset = self.failed = self.ended = False
        self.over = ""
        sock.setblocking(False)

    def write(self, size: int) -> None:
        if self.halfClosed or self.hasReset:
            return
        try:
            self.written += self.socket.send(self.stream[self.written : self.written + size])
        except BlockingIOError:
            pass
        except OSError:
            # Who writes is told of the reset, and who reads afterwards only of an end.
            self.failed = True

    def read(self, size: int) -> None:
        if self.hasReset or self.over:
            return
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return
        except OSError:
            self.over = "reset"
            return
        if not data:
            self.over = "reset" if self.failed else "end"
        elif data != self.other[self.got : self.got + len(data)]:
            raise AssertionError(f"what came after {self.got} bytes is not what was sent")
        self.got += len(data)

    def halfClose(self) -> None:
        if self.halfClosed or self.hasReset:
            return
        self.halfClosed = True
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def reset(self) -> None:
        if not self.hasReset:
            self.ended = self.halfClosed
            self.hasReset = True
            reset(self.socket)


class Play:
    """One script, played in a thread while the engine is in the reactor's (or wherever it likes to be)."""

    def __init__(self, reactor: Any, relay: Any, early: int, buffers: int) -> None:
        self.reactor = reactor
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._outcome: Outcome | None = None
        client, clientSide = tcpPair(buffers)
        backend, backendSide = tcpPair(buffers)
        self.ends = {"client": End("client", client, early), "backend": End("backend", backend, 0)}
        self.hasCut = False
        first = STREAMS["client"][:early]
        self._cut = blockingCallFromThread(
            reactor, relay.relay, clientSide, backendSide, first, self._outcomes.put
        )  # type: ignore[arg-type]

    def act(self, what: str, who: Who, number: int) -> None:
        end = self.ends[who]
        if what == "write":
            end.write(number)
        elif what == "read":
            end.read(number)
        elif what == "pause":
            # The engine goes on meanwhile; how far, is part of the lottery.
            for _ in range(number):
                blockingCallFromThread(self.reactor, deferLater, self.reactor, 0)
        elif what == "halfClose":
            end.halfClose()
        elif what == "reset":
            end.reset()
        else:
            self.hasCut = True
            blockingCallFromThread(self.reactor, self._cut)
            # In another process that takes a moment, in which ends would still be passed on.
            self.outcome()

    def finish(self) -> Outcome:
        """Both ends say that they are done, and listen to the end."""
        for end in self.ends.values():
            end.halfClose()
        until = time.monotonic() + PATIENCE
        while waiting := [end.socket for end in self.ends.values() if not (end.over or end.hasReset)]:
            if not select.select(waiting, [], [], max(0.0, until - time.monotonic()))[0]:
                raise AssertionError("it hangs: nothing more comes, and no end")
            for end in self.ends.values():
                end.read(1 << 20)
        return self.outcome()

    def outcome(self) -> Outcome:
        """How it ended, once it has."""
        if self._outcome is None:
            try:
                self._outcome = self._outcomes.get(timeout=PATIENCE)
            except queue.Empty:
                raise AssertionError("the relay does not tell how it ended") from None
        return self._outcome

    def close(self) -> None:
        for end in self.ends.values():
            end.socket.close()


def judge(play: Play, before: dict[str, bool], outcome: Outcome) -> None:
    """
    Against the perfect pipe.

    :param before: who had half-closed when the first end was reset, or the connection cut.
    """
    client, backend = play.ends["client"], play.ends["backend"]
    resets = {f"{who}-reset" for who, end in play.ends.items() if end.hasReset}
    if not resets and not play.hasCut:
        found = (outcome, client.over, backend.over, client.got, backend.got)
        wanted = (Outcome("done", client.written, backend.written), "end", "end", backend.written, client.written)
        if found != wanted:
            raise AssertionError(f"{found} is not {wanted}")
        return
    # Whoever resets after it has ended loses nothing, as long as the other side has nothing to say any more.
    mayBeDone = all(end.ended for end in (client, backend) if end.hasReset)
    mayBeDone &= not play.hasCut or all(before.values())
    whole = (outcome.sent, outcome.received) == (client.written, backend.written)
    allowed = resets | ({"aborted"} if play.hasCut else set()) | ({"done"} if mayBeDone and whole else set())
    if outcome.reason not in allowed:
        raise AssertionError(f"{outcome} is none of {sorted(allowed)}")
    for who, end in play.ends.items():
        other = "backend" if who == "client" else "client"
        # An end is only seen by whoever was told of it; everybody else sees a reset.
        if end.over == "end" and not before[other]:
            raise AssertionError(f"{outcome}: the {who} saw an end that the {other} never made")
    for passed, sender, receiver in ((outcome.sent, client, backend), (outcome.received, backend, client)):
        if not receiver.got <= passed <= sender.written:
            raise AssertionError(f"{passed} bytes counted: {sender.written} were sent, {receiver.got} have come")


class ScriptSuite:
    """
    Mix into a test case with :class:`tests.shared.relays.RelaySuite`.

    :cvar scripts: how many are played.
    """

    reactor: Any
    scripts = 200

    def makeRelay(self, reactor: Any) -> Any:
        """The engine under test."""
        raise NotImplementedError

    async def test_randomScripts(self) -> None:
        """
        Whatever both ends do, in whatever order: each gets what the other has sent, in order, to the last byte where
        nobody resets; ends and resets are told apart; and the counters are exact.
        """
        relay = self.makeRelay(self.reactor)

        @settings(max_examples=self.scripts, derandomize=True, database=None, deadline=None,
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(SCRIPTS, st.sampled_from((0, 0, 1, 65536)), st.sampled_from((0, 4096)))
        def run(script: list[tuple[str, Who, int]], early: int, buffers: int) -> None:
            play = Play(self.reactor, relay, early, buffers)
            try:
                before: dict[str, bool] = {}
                for step in script:
                    if step[0] in ("reset", "cut") and not before:
                        before = {who: end.halfClosed for who, end in play.ends.items()}
                    play.act(*step)
                judge(play, before, play.finish())
            finally:
                play.close()

        await inThread(self.reactor, run)
