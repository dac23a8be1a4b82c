"""One suite per interface: every implementation passes the same tests."""
