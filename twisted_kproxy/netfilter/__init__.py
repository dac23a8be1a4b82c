"""The rule plane: rules as values, and the writers that put them into the kernel."""
