"""
What was last said of one kind, and the doubts about a list that would take most of it away.
"""

from __future__ import annotations

from typing import Any

from .stream import Listing, keyByUid

#: A list is doubted that would remove more than so many objects,
MANY = 20
#: and more than this share of them.
SHARE = 0.5


class Store:
    """
    The objects of one kind as they were last said. They are shared with whoever was told: this is a dictionary, no
    copy.

    :ivar objects: by key.
    :ivar rejected: key → reason, of what is there but cannot be read; its last good version is still among the objects.
    :ivar said: whether this is what was said. Not before the first list, nor after a failure in the middle.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.rejected: dict[str, str] = {}
        self.said = False

    def missing(self, listing: Listing) -> list[str]:
        """What a list does not have: gone for good, if it is right."""
        return [key for key in self.objects if key not in listing.objects and key not in listing.rejected]

    def replace(self, listing: Listing) -> bool:
        """
        Take over a list.

        :return: whether that has to be said, because it differs.
        """
        differs = (
            not self.said
            or self.rejected != listing.rejected
            or bool(self.missing(listing))
            or any(self.objects.get(key) != it for key, it in listing.objects.items())
        )
        kept = {key: self.objects[key] for key in listing.rejected if key in self.objects}
        self.objects = {**kept, **listing.objects}
        self.rejected = dict(listing.rejected)
        self.said = True
        return differs

    def put(self, key: str, it: Any) -> bool:
        """
        Take over an object.

        :return: whether there was another one under that name before. It is not the same one changed: nothing that
            was remembered of the old one (who is bound to it, its flows) belongs to the new one.
        """
        before = self.objects.get(key)
        self.objects[key] = it
        self.rejected.pop(key, None)
        if before is None or not before.metadata.uid or not it.metadata.uid:
            return False
        return bool(before.metadata.uid != it.metadata.uid)

    def remove(self, key: str) -> None:
        """Take over that an object is gone."""
        self.objects.pop(key, None)
        self.rejected.pop(key, None)

    def keyOf(self, key: str, uid: str) -> str:
        """The key of something that cannot be read: by its uid where it does not say its name."""
        return key or keyByUid(self.objects, uid)


class Guard:
    """
    Doubts a list that would remove most of what is known: it may come from a server that has just been restored, is
    another cluster's, or has lost its rights or its cache. Only a second list, of the newest state and some seconds
    later, is believed.

    :ivar doubted: how many lists were doubted.
    :ivar confirmed: how many times the second one would remove as much.
    :ivar alarm: what is doubted now, ``""`` for nothing.
    """

    def __init__(self, many: int = MANY, share: float = SHARE) -> None:
        self._many = many
        self._share = share
        self.doubted = 0
        self.confirmed = 0
        self.alarm = ""

    def counters(self) -> dict[str, int]:
        """What only grows."""
        return {"doubtedLists": self.doubted, "confirmedLists": self.confirmed}

    def doubts(self, store: Store, listing: Listing) -> bool:
        """Whether a list should be confirmed first. The one after a doubted one always counts."""
        gone, of = len(store.missing(listing)), len(store.objects)
        suspicious = gone > self._many and gone > of * self._share
        if self.alarm:
            self.confirmed += suspicious
            self.alarm = ""
            return False
        if suspicious:
            self.doubted += 1
            self.alarm = f"a list without {gone} of the {of} known objects"
        return suspicious


class Initial:
    """
    The initial state of a watch as it comes in, until its end is marked. Nothing of it counts before.

    :param store: to tell what cannot be read, and to share what is equal.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._objects: dict[str, Any] = {}
        self._rejected: dict[str, str] = {}

    def put(self, key: str, it: Any) -> None:
        before = self._store.objects.get(key)
        self._objects[key] = before if before == it else it
        self._rejected.pop(key, None)

    def remove(self, key: str) -> None:
        self._objects.pop(key, None)
        self._rejected.pop(key, None)

    def reject(self, key: str, reason: str) -> None:
        self._rejected[key or f"(item {len(self._objects) + len(self._rejected)})"] = reason
        self._objects.pop(key, None)

    def listing(self, rv: str) -> Listing:
        """What is there by now, as of that resource version."""
        return Listing(self._objects, self._rejected, rv)


def earlier(rv: str, than: str) -> bool:
    """
    Whether one resource version lies before another, where both are numbers (KEP-5504). Of others, nothing is known.
    """
    return _isNumber(rv) and _isNumber(than) and int(rv) < int(than)


def _isNumber(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 40
