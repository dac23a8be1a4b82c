"""The userspace dataplane: a socket for each pool, and what carries bytes from it to an endpoint."""
