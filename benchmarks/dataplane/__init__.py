"""The data plane beside the kernel's own way, HAProxy and nginx: throughput, latency, memory, processor time."""
