"""What carries bytes between two connected sockets: one module per engine, each an ``IRelay``."""
