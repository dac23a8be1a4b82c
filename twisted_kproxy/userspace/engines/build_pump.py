"""How the C module of the native engine is built; called by setup.py. Nothing here is needed at run time."""

from __future__ import annotations

import os

from cffi import FFI  # type: ignore[import-untyped]

_DECLARATIONS = """
typedef struct pump pump;
struct ended { uint64_t id; uint64_t sent; uint64_t received; int reason; };
pump *pump_new(int mostPipes, int splicing, double halfClosed);
int pump_fd(pump *);
uint64_t pump_open(pump *);
int pump_pipes(pump *, int idle);
int pump_add(pump *, uint64_t id, int client, int backend, const char *early, size_t length);
void pump_cut(pump *, uint64_t id);
int pump_run(pump *, int timeout);
int pump_ended(pump *, struct ended *into, int most);
void pump_sweep(pump *);
void pump_loop(pump *);
int pump_notify(pump *);
int pump_stop(pump *);
void pump_free(pump *);
"""

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "pump.c"), encoding="ascii") as file:
    _SOURCE = file.read()

ffi = FFI()
ffi.cdef(_DECLARATIONS)
ffi.set_source(
    "twisted_kproxy.userspace.engines._pump",
    _SOURCE,
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    libraries=["pthread"],
    # Where it cannot be built, everything is installed but this.
    optional=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
