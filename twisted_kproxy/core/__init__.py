"""What Services mean on this node: values and pure functions. No Twisted, no I/O."""
