"""The configuration: the ini file, what it may hold, and every error text about it."""

from .model import (
    ApiOptions,
    Config,
    FilesOptions,
    InvalidConfig,
    PluginOptions,
    SourceOptions,
    conntrackSettings,
    nodeSettings,
)
from .reading import checkFiles, effective, fileWarnings, load, render
from .values import HostPort

__all__ = [
    "ApiOptions",
    "Config",
    "FilesOptions",
    "HostPort",
    "InvalidConfig",
    "PluginOptions",
    "SourceOptions",
    "checkFiles",
    "conntrackSettings",
    "effective",
    "fileWarnings",
    "load",
    "nodeSettings",
    "render",
]
