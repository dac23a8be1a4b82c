"""How the C module for UDP in batches is built; called by setup.py. Nothing here is needed at run time."""

from __future__ import annotations

import os

from cffi import FFI  # type: ignore[import-untyped]

_DECLARATIONS = """
typedef struct engine engine;
struct key {
    unsigned char address[16]; uint32_t scope; uint16_t port; unsigned char six, dialledSize; unsigned char dialled[24];
};
struct watched { int fd; ...; };
struct flow {
    struct watched watched; struct flow *newer; struct key key; double used; uint64_t sent, received;
    char *kept; int keptSize; unsigned char answered, stale, plain, plainBack; ...;
};
struct service {
    struct watched watched; size_t count, unansweredCount; struct flow unanswered, answered;
    uint64_t sentCount, sentBytes, receivedCount, receivedBytes; uint64_t dropped[3]; ...;
};
struct ask {
    int what; struct service *service; struct flow *flow; int number; struct key *key; char *data; size_t size; ...;
};
struct iovec { void *iov_base; size_t iov_len; ...; };
struct msghdr {
    void *msg_name; unsigned int msg_namelen; struct iovec *msg_iov; size_t msg_iovlen;
    void *msg_control; size_t msg_controllen; ...;
};
struct mmsghdr { struct msghdr msg_hdr; unsigned int msg_len; ...; };
struct calls {
    int (*receive)(int, struct mmsghdr *, unsigned, int);
    int (*send)(int, struct mmsghdr *, unsigned, int);
};
engine *udp_new(int offload);
int udp_fd(engine *);
struct calls *udp_calls(engine *);
void udp_flow(struct flow *);
void udp_service(struct service *);
void udp_emptied(struct service *);
int udp_listen(engine *, struct service *, int fd);
void udp_deafen(engine *, struct service *);
struct flow *udp_find(engine *, struct service *, const struct key *);
int udp_add(engine *, struct service *, struct flow *, int fd);
void udp_remove(engine *, struct flow *);
void udp_touch(struct flow *, double now);
void udp_answer(struct flow *, double now);
void udp_keep(struct flow *, const char *data, int size);
int udp_run(engine *, double now, struct ask *);
void udp_free(engine *);
"""

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "datagrams.c"), encoding="ascii") as file:
    _SOURCE = file.read()

ffi = FFI()
ffi.cdef(_DECLARATIONS)
ffi.set_source(
    "twisted_kproxy.userspace.engines._datagrams",
    _SOURCE,
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    # Where it cannot be built, everything is installed but this.
    optional=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
