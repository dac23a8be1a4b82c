"""All rows, in the order of the page."""

from __future__ import annotations

from . import clusterips, duties, endpoints, external, policies, slices
from .site import Row


def rows() -> list[Row]:
    """
    Every row, once for each family that it has. Rows are numbered, which gives them their addresses: a row's addresses
    change when rows are put before it, and nobody minds.
    """
    found: list[Row] = []
    number = 1
    for module in (clusterips, external, policies, slices, endpoints, duties):
        made = module.table.rows(number)
        number += len({row.name for row in made})
        found += made
    return found
