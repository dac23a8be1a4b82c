"""Tests of kproxy."""
