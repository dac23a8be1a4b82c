"""The rule writer for nf_tables."""
