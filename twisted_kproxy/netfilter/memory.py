"""Rule writers that touch no kernel: one that remembers, for tests, and one that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

from msgspec import Struct
from twisted.internet.defer import Deferred, fail, succeed
from zope.interface import implementer

from ..core.rules import Delta, Ruleset, applied
from ..core.values import FrontendKey
from ..interfaces import IRuleWriter, RulesRejected

_T = TypeVar("_T")

Call: TypeAlias = Literal["probe", "adopt", "apply", "replace", "cleanup", "close"]


class Operation(Struct, frozen=True):
    """One call that a :class:`MemoryWriter` was given; ``value`` is what came with it."""

    call: Call
    value: Delta | Ruleset | None = None


class _Held:
    """A call that waits until a test lets it go on."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.fired: Deferred[Any] = Deferred()


@implementer(IRuleWriter)
class MemoryWriter:
    """
    A kernel of its own, as atomic as the real one.

    :ivar inForce: the rules; ``None`` where nothing of ours is.
    :ivar history: every call, in order.
    :ivar failures: errors for the next writing calls, first in first out.
    :ivar poison: frontends that are refused with whatever they come with; ``tellsPoison``: by name.
    :ivar hang: while true, calls wait until :meth:`release`.
    """

    name = "memory"
    place = "memory"

    def __init__(self, reactor: Any = None, inForce: Ruleset | None = None) -> None:
        self.inForce = inForce
        self.history: list[Operation] = []
        self.failures: list[Exception] = []
        self.poison: set[FrontendKey] = set()
        self.tellsPoison = False
        self.hang = False
        self.closed = False
        self._held: list[_Held] = []
        self._changed: Callable[[], None] | None = None

    # --- for tests ---

    @property
    def writes(self) -> list[Operation]:
        """Those of the calls that were to change rules."""
        return [it for it in self.history if it.call in ("apply", "replace", "cleanup")]

    def release(self) -> None:
        """Let what was held go on, and hold nothing more."""
        self.hang = False
        held, self._held = self._held, []
        for it in held:
            self._finish(it.work, it.fired)

    def disturb(self, ruleset: Ruleset | None) -> None:
        """Somebody else makes this the state in force."""
        self.inForce = ruleset
        if self._changed is not None:
            self._changed()

    # --- IRuleWriter ---

    def probe(self) -> Deferred[str]:
        return self._do(Operation("probe"), lambda: "rules are kept in memory")

    def adopt(self) -> Deferred[Ruleset | None]:
        return self._do(Operation("adopt"), lambda: self.inForce)

    def apply(self, delta: Delta) -> Deferred[None]:
        def work() -> None:
            if self.inForce is None:
                raise RulesRejected("there is nothing in force that a step could be applied to")
            self.inForce = applied(self.inForce, delta)

        return self._do(Operation("apply", delta), work)

    def replace(self, ruleset: Ruleset) -> Deferred[None]:
        def work() -> None:
            self.inForce = applied(ruleset, Delta())

        return self._do(Operation("replace", ruleset), work)

    def watch(self, changed: Callable[[], None] | None) -> None:
        self._changed = changed

    def cleanup(self) -> Deferred[bool]:
        def work() -> bool:
            was, self.inForce = self.inForce, None
            return was is not None

        return self._do(Operation("cleanup"), work)

    def close(self) -> Deferred[None]:
        self.history.append(Operation("close"))
        self.closed = True
        self._changed = None
        return succeed(None)

    # --- inside ---

    def _do(self, operation: Operation, work: Callable[[], _T]) -> Deferred[_T]:
        if self._held:
            raise AssertionError(f"{operation.call} was called while another call was under way")
        self.history.append(operation)

        def tried() -> _T:
            if self.failures and operation.call in ("apply", "replace", "cleanup"):
                raise self.failures.pop(0)
            self._refuse(operation.value)
            return work()

        fired: Deferred[_T] = Deferred()
        if self.hang:
            held = _Held(tried)
            held.fired = fired
            self._held.append(held)
        else:
            self._finish(tried, fired)
        return fired

    def _refuse(self, value: Delta | Ruleset | None) -> None:
        rules = value.rules if value is not None else {}
        found = {key for key in self.poison if rules.get(key) is not None}
        if found:
            raise RulesRejected("there is poison among it", found if self.tellsPoison else ())

    @staticmethod
    def _finish(work: Callable[[], _T], fired: Deferred[_T]) -> None:
        try:
            result = work()
        except Exception:
            fired.errback()
        else:
            fired.callback(result)


@implementer(IRuleWriter)
class NoWriter:
    """
    ``writer = none``: writes nothing. The proxies listen, but nobody is led to them; something else has to do that.
    """

    name = "none"
    place = "nowhere"

    def __init__(self, reactor: Any = None) -> None:
        self._inForce: Ruleset | None = None

    def probe(self) -> Deferred[str]:
        return succeed("no rules are written")

    def adopt(self) -> Deferred[Ruleset | None]:
        return succeed(self._inForce)

    def apply(self, delta: Delta) -> Deferred[None]:
        if self._inForce is None:
            return fail(RulesRejected("there is nothing in force that a step could be applied to"))
        self._inForce = applied(self._inForce, delta)
        return succeed(None)

    def replace(self, ruleset: Ruleset) -> Deferred[None]:
        self._inForce = ruleset
        return succeed(None)

    def watch(self, changed: Callable[[], None] | None) -> None:
        """Nobody can change what is not there."""

    def cleanup(self) -> Deferred[bool]:
        self._inForce = None
        return succeed(False)

    def close(self) -> Deferred[None]:
        return succeed(None)
