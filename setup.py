"""
The one thing that setup.cfg cannot say: the C modules of the native engine. They are optional: without a compiler,
without cffi or on another system, everything else is built and installed.
"""

from setuptools import setup

_ENGINES = "twisted_kproxy/userspace/engines"

setup(cffi_modules=[f"{_ENGINES}/build_{name}.py:ffi" for name in ("pump", "datagrams")])
