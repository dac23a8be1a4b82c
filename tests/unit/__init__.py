"""Tests without kernel, network or clock; they mirror the package."""
