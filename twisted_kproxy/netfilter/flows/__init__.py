"""UDP flows that the kernel remembers, and leads astray where rules have changed."""
