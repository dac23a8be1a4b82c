"""What is remembered of what was said, and the doubts about lists that would take most of it away."""

from __future__ import annotations

from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.builders import service
from tests.shared.reflectors import EXPIRED, ReflectorCase, bookmark, listOf, versioned
from twisted_kproxy.core.values import Change, Replaced
from twisted_kproxy.sources.store import Guard, Initial, Store, earlier
from twisted_kproxy.sources.stream import Listing


def many(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [versioned(f"s{number}", str(number + 1)) for number in range(first, first + count)]


class VersionTests(SynchronousTestCase):
    """Which resource version comes first."""

    def test_earlier(self) -> None:
        """Numbers are compared as such; of anything else nothing is known."""
        for rv, than, expected in (
            ("9", "10", True), ("10", "9", False), ("9", "9", False), ("", "9", False), ("9", "", False),
            ("a", "b", False), ("-1", "5", False), ("٣", "5", False), ("1" * 50, "2" * 50, False),
            ("99999999999999999999", "100000000000000000000", True),
        ):  # fmt: skip
            self.assertIs(earlier(rv, than), expected, (rv, than))


class StoreTests(SynchronousTestCase):
    """The objects of one kind."""

    def test_replace(self) -> None:
        """The first list is always said, another one where it differs in anything."""
        store, web = Store(), service()
        self.assertTrue(store.replace(Listing({}, {}, "1")))
        self.assertFalse(store.replace(Listing({}, {}, "2")))
        self.assertTrue(store.replace(Listing({"shop/web": web}, {}, "3")))
        self.assertFalse(store.replace(Listing({"shop/web": service()}, {}, "4")))
        self.assertTrue(store.replace(Listing({"shop/web": service(uid="u2")}, {}, "5")))
        self.assertTrue(store.replace(Listing({}, {"shop/web": "bad"}, "6")))
        self.assertEqual(list(store.objects), ["shop/web"])
        self.assertFalse(store.replace(Listing({}, {"shop/web": "bad"}, "7")))
        self.assertTrue(store.replace(Listing({}, {}, "8")))
        self.assertEqual(store.objects, {})

    def test_anotherUid(self) -> None:
        """Only a uid that is known on both sides tells that an object is another one."""
        for before, after, expected in (("u1", "u1", False), ("u1", "u2", True), ("", "u2", False), ("u1", "", False)):
            store = Store()
            self.assertFalse(store.put("shop/web", service(uid=before)))
            self.assertIs(store.put("shop/web", service(uid=after)), expected)

    def test_initialShares(self) -> None:
        """What is equal to what is known is the same object."""
        store, web = Store(), service()
        store.put("shop/web", web)
        initial = Initial(store)
        initial.put("shop/web", service())
        self.assertIs(initial.listing("5").objects["shop/web"], web)


class GuardTests(SynchronousTestCase):
    """When a list is doubted."""

    def doubted(self, known: int, left: int, rejected: int = 0) -> bool:
        store, web = Store(), service()
        store.objects = {f"shop/s{n}": web for n in range(known)}
        kept = {f"shop/s{n}": web for n in range(left)}
        bad = {f"shop/s{n}": "bad" for n in range(left, left + rejected)}
        return Guard().doubts(store, Listing(kept, bad, "9"))

    def test_limits(self) -> None:
        """It must be more than half of them, and more than twenty; what is there but unreadable is not gone."""
        for known, left, expected in (
            (20, 0, False), (21, 0, True), (41, 20, True), (42, 21, False), (50, 25, False), (50, 24, True),
            (1000, 501, False), (1000, 499, True), (0, 0, False),
        ):
            self.assertIs(self.doubted(known, left), expected, (known, left))
        self.assertFalse(self.doubted(100, 0, rejected=60))

    def test_secondCounts(self) -> None:
        """The list after a doubted one always counts; the one after that is looked at again."""
        store, guard = Store(), Guard()
        store.objects = {f"shop/s{n}": service() for n in range(30)}
        empty = Listing({}, {}, "9")
        self.assertTrue(guard.doubts(store, empty))
        self.assertIn("30 of the 30", guard.alarm)
        self.assertFalse(guard.doubts(store, empty))
        self.assertEqual((guard.alarm, guard.doubted, guard.confirmed), ("", 1, 1))
        self.assertTrue(guard.doubts(store, empty))
        self.assertFalse(guard.doubts(store, Listing(dict(store.objects), {}, "9")))
        self.assertEqual(guard.counters(), {"doubtedLists": 2, "confirmedLists": 1})


class DoubtTests(ReflectorCase):
    """What a reflector does with its doubts."""

    def expired(self, *items: dict[str, Any], rv: str = "100") -> None:
        """It knows these, and has to list again."""
        self.watching(*items, rv=rv).event("ERROR", EXPIRED)
        self.clock.advance(0.8)

    def known(self) -> int:
        return len(self.words.state["Service"])

    def test_emptyOnce(self) -> None:
        """An empty list is not said; the newest state ten seconds later is, and shows that it was a mistake."""
        self.expired(*many(30))
        self.nextList("100").answerJson(listOf(rv="101"))
        status = self.reflector.status()
        self.assertEqual((status["state"], status["doubtedLists"]), ("doubting", 1))
        self.assertIn("30 of the 30", status["alarm"])
        self.assertEqual(self.known(), 30)
        self.clock.advance(9.9)
        self.nothing()
        self.clock.advance(0.2)
        self.nextList("").answerJson(listOf(*many(29), rv="102"))
        self.assertEqual(self.known(), 29)
        self.assertEqual(self.reflector.status()["alarm"], "")
        self.assertEqual(self.reflector.counters()["confirmedLists"], 0)
        self.nextWatch("102")

    def test_reallyGone(self) -> None:
        """What the second list confirms is said."""
        self.expired(*many(30))
        self.nextList("100").answerJson(listOf(rv="101"))
        self.clock.advance(10)
        self.nextList("").answerJson(listOf(rv="102"))
        self.assertEqual(self.known(), 0)
        self.assertEqual(self.reflector.counters()["confirmedLists"], 1)

    def test_secondFails(self) -> None:
        """As long as there is no second list, everything stays; the first one that succeeds counts."""
        self.expired(*many(30))
        self.nextList("100").answerJson(listOf(rv="101"))
        self.clock.advance(10)
        for pause in (1.6, 3.2, 6.4):
            self.nextList("").answerJson({"code": 500}, 500)
            self.assertEqual(self.known(), 30)
            self.clock.advance(pause)
        self.nextList("").answerJson(listOf(rv="102"))
        self.assertEqual(self.known(), 0)

    def test_few(self) -> None:
        """A small cluster may lose everything at once."""
        self.expired(*many(20))
        self.nextList("100").answerJson(listOf(rv="101"))
        self.assertEqual(self.known(), 0)

    def test_events(self) -> None:
        """Deletions that a watch tells one by one are believed."""
        watch = self.watching(*many(30))
        for number, it in enumerate(many(30)):
            it["metadata"]["resourceVersion"] = str(200 + number)
            watch.event("DELETED", it)
        self.assertEqual(self.known(), 0)

    def test_stopped(self) -> None:
        """Stopped while it doubts, it leaves nothing; started again it still does."""
        self.expired(*many(30))
        self.nextList("100").answerJson(listOf(rv="101"))
        self.stop()
        self.start()
        self.nextList("").answerJson(listOf(*many(30), rv="102"))
        self.assertEqual(self.known(), 30)


class StreamDoubtTests(ReflectorCase):
    """The same for the state at the beginning of a watch."""

    streaming = True

    def test_emptyStream(self) -> None:
        """It is not said, its watch is given up, and a list of the newest state decides."""
        mark = bookmark("100")
        mark["metadata"]["annotations"] = {"k8s.io/initial-events-end": "true"}
        self.start()
        stream = self.next()
        stream.begin()
        for it in many(30):
            stream.event("ADDED", it)
        stream.event("BOOKMARK", mark)
        stream.event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        stream = self.next()
        stream.begin()
        stream.event("BOOKMARK", mark)
        self.assertFalse(stream.open)
        self.assertEqual(len(self.words.state["Service"]), 30)
        self.clock.advance(10)
        self.nextList("").answerJson(listOf(*many(30), rv="102"))
        self.assertEqual(len(self.words.said), 1)
        self.nextWatch("102")


class UidTests(ReflectorCase):
    """Objects that were deleted and made anew under the same name."""

    def made(self, uid: str, rv: str) -> dict[str, Any]:
        it = versioned("web", rv)
        it["metadata"]["uid"] = uid
        return it

    def test_inWatch(self) -> None:
        """Also where only a change is told: the old one is gone before the new one is there."""
        watch = self.watching(self.made("u1", "1"))
        watch.event("MODIFIED", self.made("u1", "101"))
        self.assertEqual(len(self.words.said), 2)
        watch.event("MODIFIED", self.made("u2", "102"))
        gone, new = self.words.said[2:]
        assert isinstance(gone, Change) and isinstance(new, Change) and new.object is not None
        self.assertIsNone(gone.object)
        self.assertEqual((gone.key, new.key, new.object.metadata.uid), ("shop/web", "shop/web", "u2"))

    def test_inList(self) -> None:
        """A list brings the new one; whoever compares finds another uid."""
        self.watching(self.made("u1", "1")).event("ERROR", EXPIRED)
        self.clock.advance(0.8)
        self.nextList("100").answerJson(listOf(self.made("u2", "101"), rv="101"))
        self.assertIsInstance(self.words.said[-1], Replaced)
        self.assertEqual(self.words.state["Service"]["shop/web"].metadata.uid, "u2")
        watch = self.nextWatch("101")
        watch.begin()
        watch.event("MODIFIED", self.made("u2", "103"))
        self.assertEqual(len(self.words.said), 3)


class PoisonTests(ReflectorCase):
    """Objects whose very metadata cannot be read."""

    def poison(self, name: Any, rv: Any = "7", uid: Any = "u-web") -> dict[str, Any]:
        it = versioned("web", rv)
        it["metadata"].update(name=name, uid=uid, labels={"app": 5})
        return it

    def good(self) -> dict[str, Any]:
        it = versioned("web", "1")
        it["metadata"]["uid"] = "u-web"
        return it

    def test_inList(self) -> None:
        """The last good version stays where the name can still be read, or the uid tells it; else nothing crashes."""
        for poison, kept in (
            (self.poison("web"), ["shop/web"]), (self.poison(5), ["shop/web"]), (self.poison(5, uid=7), []),
            ({"metadata": 5}, []), (7, []), ({}, []),
        ):
            self.watching(self.good()).event("ERROR", EXPIRED)
            self.clock.advance(0.8)
            self.nextList("100").answerJson(listOf(poison, versioned("db", "2"), rv="101"))
            self.assertEqual(sorted(self.words.state["Service"]), sorted(["shop/db", *kept]), poison)
            self.assertEqual(len(self.reflector.status()["rejected"]), 1)
            self.nextWatch("101")
            self.stop()
            self.setUp()

    def test_inWatch(self) -> None:
        """The last good version stays, and the resource version still moves on where it can be read."""
        for poison, rv in ((self.poison("web", "101"), "101"), (self.poison(5, "101"), "101"), (7, "100")):
            watch = self.watching(self.good())
            watch.event("MODIFIED", poison)
            self.assertEqual(list(self.words.state["Service"]), ["shop/web"])
            self.assertEqual(self.reflector.status()["resourceVersion"], rv)
            self.clock.advance(2)
            watch.end()
            self.nextWatch(rv)
            self.stop()
            self.setUp()

    def test_gone(self) -> None:
        """One that cannot be read can still be deleted."""
        watch = self.watching(self.good())
        watch.event("DELETED", self.poison("web", "101"))
        self.assertEqual(self.words.state["Service"], {})
