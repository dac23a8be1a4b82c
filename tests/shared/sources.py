"""What every source promises: one suite, mixed into a test case for each of them."""

from __future__ import annotations

import json
from typing import Any, Protocol

from twisted.internet.defer import maybeDeferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from twisted_kproxy.core.values import Change, Reached, Rejected, Replaced, Word
from twisted_kproxy.interfaces import IChannel, ISource


@implementer(IChannel)
class Words:
    """
    A channel that remembers, and folds what it is told into the state that follows.

    :ivar said: every word, in order.
    :ivar state: kind → key → object.
    :ivar rejected: kind → key → reason.
    :ivar servers: each word about where the server is.
    """

    def __init__(self) -> None:
        self.said: list[Word] = []
        self.servers: list[Reached] = []
        self.state: dict[str, dict[str, Any]] = {}
        self.rejected: dict[str, dict[str, str]] = {}

    def say(self, word: Word | Reached) -> None:
        if isinstance(word, Reached):
            self.servers.append(word)
            return
        self.said.append(word)
        state = self.state.setdefault(word.kind, {})
        rejected = self.rejected.setdefault(word.kind, {})
        match word:
            case Replaced():
                # What is there but cannot be read keeps its last good version.
                kept = {key: state[key] for key in word.rejected if key in state}
                self.state[word.kind] = {**kept, **word.objects}
                self.rejected[word.kind] = dict(word.rejected)
            case Change(key=key):
                rejected.pop(key, None)
                if word.object is None:
                    state.pop(key, None)
                else:
                    state[key] = word.object
            case Rejected(key=key):
                rejected[key] = word.reason

    def versions(self, kind: str) -> dict[str, str | None]:
        """key → resource version."""
        return {key: it.metadata.resourceVersion for key, it in self.state.get(kind, {}).items()}


class SourceRig(Protocol):
    """What the suite needs of a source under test."""

    @property
    def source(self) -> ISource:
        """Made with ``words`` and ``clock``; not started."""

    @property
    def words(self) -> Words: ...

    @property
    def clock(self) -> Clock: ...

    def put(self, manifest: dict[str, Any]) -> None:
        """
        That object is there now, whatever is in it; returns once a running source has had the time to notice.
        """

    def remove(self, kind: str, key: str) -> None:
        """That object is gone; returns once a running source has had the time to notice."""


def manifest(name: str, clusterIP: str = "10.96.0.10", port: Any = 80) -> dict[str, Any]:
    """A Service in namespace ``shop``."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": clusterIP, "clusterIPs": [clusterIP], "ports": [{"port": port, "protocol": "TCP"}]},
    }


def sliceManifest(name: str, *addresses: str) -> dict[str, Any]:
    """An EndpointSlice of ``shop/web``."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [it], "conditions": {"ready": True}} for it in addresses],
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
    }


class SourceSuite(SynchronousTestCase):
    """Mix in, and override :meth:`makeRig`."""

    def makeRig(self) -> SourceRig:
        raise NotImplementedError

    def started(self, *manifests: dict[str, Any]) -> SourceRig:
        """A rig whose source runs and has said what there is."""
        rig = self.makeRig()
        for it in manifests:
            rig.put(it)
        rig.source.startService()
        self.addCleanup(self.stop, rig)
        rig.clock.advance(0)
        return rig

    def stop(self, rig: SourceRig) -> None:
        if rig.source.running:
            self.successResultOf(maybeDeferred(rig.source.stopService))

    def test_interface(self) -> None:
        """A source provides L{ISource}."""
        verifyObject(ISource, self.makeRig().source)

    def test_silentBeforeStart(self) -> None:
        """A source that was not started says nothing, knows no age, and has set no timer."""
        rig = self.makeRig()
        self.assertEqual(rig.words.said, [])
        self.assertEqual(dict(rig.source.ages()), dict.fromkeys(rig.source.kinds))
        self.assertEqual(rig.clock.getDelayedCalls(), [])

    def test_startSaysEveryKindOnce(self) -> None:
        """The first words are one C{Replaced} for each kind, also for those of which there is nothing."""
        rig = self.started(manifest("web"), manifest("db", "10.96.0.11"), sliceManifest("web-1", "10.0.0.1"))
        self.assertTrue(all(isinstance(word, Replaced) for word in rig.words.said))
        self.assertEqual(sorted(word.kind for word in rig.words.said), sorted(rig.source.kinds))
        self.assertEqual({word.source for word in rig.words.said}, {rig.source.name})
        self.assertEqual(sorted(rig.words.state["Service"]), ["shop/db", "shop/web"])
        self.assertEqual(sorted(rig.words.state["EndpointSlice"]), ["shop/web-1"])

    def test_unchangedSaysNothing(self) -> None:
        """As long as nothing changes, nothing is said again."""
        rig = self.started(manifest("web"))
        said = len(rig.words.said)
        for _ in range(30):
            rig.clock.advance(1)
        self.assertEqual(len(rig.words.said), said)

    def test_added(self) -> None:
        """A new object is said as one change, which carries it."""
        rig = self.started(manifest("web"))
        said = len(rig.words.said)
        rig.put(manifest("db", "10.96.0.11"))
        (word,) = rig.words.said[said:]
        assert isinstance(word, Change)
        self.assertEqual((word.source, word.kind, word.key), (rig.source.name, "Service", "shop/db"))
        assert word.object is not None
        self.assertEqual(word.object.spec.clusterIP, "10.96.0.11")

    def test_changed(self) -> None:
        """An object that becomes another is said as one change; its neighbours are not said again."""
        rig = self.started(manifest("web"), manifest("db", "10.96.0.11"))
        said = len(rig.words.said)
        rig.put(manifest("web", port=8080))
        (word,) = rig.words.said[said:]
        assert isinstance(word, Change) and word.object is not None
        self.assertEqual((word.key, word.object.spec.ports[0].port), ("shop/web", 8080))

    def test_removed(self) -> None:
        """An object that goes is said as one change to nothing."""
        rig = self.started(manifest("web"), manifest("db", "10.96.0.11"))
        said = len(rig.words.said)
        rig.remove("Service", "shop/web")
        self.assertEqual(rig.words.said[said:], [Change(rig.source.name, "Service", "shop/web", None)])
        self.assertEqual(list(rig.words.state["Service"]), ["shop/db"])

    def test_badAtStart(self) -> None:
        """An object that cannot be read is reported by name with a reason, and costs its neighbours nothing."""
        rig = self.started(manifest("web"), manifest("bad", port="eighty"))
        self.assertEqual(list(rig.words.state["Service"]), ["shop/web"])
        self.assertEqual(list(rig.words.rejected["Service"]), ["shop/bad"])
        self.assertTrue(rig.words.rejected["Service"]["shop/bad"])

    def test_badLater(self) -> None:
        """An object that becomes unreadable keeps its last good version until it can be read again."""
        rig = self.started(manifest("web"))
        rig.put(manifest("web", port="eighty"))
        self.assertEqual(list(rig.words.rejected["Service"]), ["shop/web"])
        self.assertEqual(rig.words.state["Service"]["shop/web"].spec.ports[0].port, 80)
        rig.put(manifest("web", port=81))
        self.assertEqual(rig.words.rejected["Service"], {})
        self.assertEqual(rig.words.state["Service"]["shop/web"].spec.ports[0].port, 81)

    def test_ages(self) -> None:
        """Once everything was said, every kind has an age: a number of seconds that is not negative."""
        rig = self.started(manifest("web"))
        ages = rig.source.ages()
        self.assertEqual(sorted(ages), sorted(rig.source.kinds))
        for age in ages.values():
            assert age is not None
            self.assertGreaterEqual(age, 0.0)

    def test_status(self) -> None:
        """The facts for operators can be written as JSON, before, during and after a run."""
        rig = self.makeRig()
        json.dumps(rig.source.status())
        rig.source.startService()
        json.dumps(rig.source.status())
        self.stop(rig)
        json.dumps(rig.source.status())

    def test_stop(self) -> None:
        """A source that was stopped says nothing more and leaves no timer."""
        rig = self.started(manifest("web"))
        self.stop(rig)
        said = len(rig.words.said)
        rig.put(manifest("web", port=8080))
        rig.clock.advance(3600)
        self.assertEqual(len(rig.words.said), said)
        self.assertEqual(rig.clock.getDelayedCalls(), [])
        self.assertFalse(rig.source.running)

    def test_restart(self) -> None:
        """A source that is started again says every kind anew, as it is by then."""
        rig = self.started(manifest("web"))
        self.stop(rig)
        rig.remove("Service", "shop/web")
        rig.put(manifest("db", "10.96.0.11"))
        said = len(rig.words.said)
        rig.source.startService()
        rig.clock.advance(0)
        words = rig.words.said[said:]
        self.assertEqual(sorted(word.kind for word in words), sorted(rig.source.kinds))
        self.assertTrue(all(isinstance(word, Replaced) for word in words))
        self.assertEqual(list(rig.words.state["Service"]), ["shop/db"])
