"""The rule writers for iptables: by its library, and by its programs."""
