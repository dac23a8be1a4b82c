"""Where Services and endpoints are read from: API servers and folders of manifests."""
