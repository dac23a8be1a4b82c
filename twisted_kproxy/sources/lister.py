"""A whole list, in one answer or in pages: the rules of client-go's pager (``k8s.io/client-go/tools/pager``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import errors
from .client import ApiClient, Resource
from .stream import Listing

#: Items of one page.
PAGE = 500
#: A list of more pages has no end.
MOST_PAGES = 4000


class Lister:
    """
    Lists one kind of object.

    Where the server answers from its cache it pays no heed to a limit. One that does has no cache, so the lists that
    follow are paged, too. A list that must not be older than some resource version is asked for as a whole otherwise:
    a paged one would be read from etcd.
    """

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._paging = False

    async def list(self, resource: Resource, rv: str, known: Mapping[str, Any]) -> Listing:
        """
        All of it, once the last page is there.

        :param rv: ``"0"`` for whatever the server has at hand, ``""`` for the newest, else not older.
        :param known: see :meth:`ApiClient.list`.
        :return: its resource version is that of the first page.
        :raise KproxyError: one of :mod:`~twisted_kproxy.sources.errors`; then nothing of it counts.
        """
        limit = PAGE if self._paging or rv in ("", "0") else 0
        page = first = await self._client.list(resource, rv, limit, known=known)
        if not first.next:
            return first
        self._paging = self._paging or rv == "0"
        objects, rejected = dict(first.objects), dict(first.rejected)
        for number in range(2, MOST_PAGES):
            try:
                page = await self._client.list(resource, limit=PAGE, next=page.next, known=known)
            except errors.Denied as error:
                if isinstance(error, errors.Expired) or error.code == 400:
                    # The pages that are left are gone. Going on inconsistently, with the token that comes with this
                    # answer, would miss what moved in between.
                    return await self._client.list(resource, rv, known=known)
                raise
            objects.update(page.objects)
            rejected.update((_onPage(key, number), reason) for key, reason in page.rejected.items())
            if not page.next:
                return Listing(objects, rejected, first.rv)
        raise errors.Unusable(f"the list of {resource.kind} does not end: it has {MOST_PAGES} pages, and goes on")


def _onPage(key: str, number: int) -> str:
    return f"(page {number}, {key[1:]}" if key.startswith("(") else key
