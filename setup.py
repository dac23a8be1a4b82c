"""
The one thing that setup.cfg cannot say: the C module of the native engine. It is optional: without a compiler, without
cffi or on another system, everything else is built and installed.
"""

from setuptools import setup

setup(cffi_modules=["twisted_kproxy/userspace/engines/build_pump.py:ffi"])
