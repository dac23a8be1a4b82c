"""Stand-ins that tests share: API server, network of namespaces."""
