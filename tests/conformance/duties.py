"""Rows that are no packets."""
from .site import Table
table = Table("x")
