"""Tests of wheel, sdist and editable install."""
