"""What a service proxy has to do, as one table; and how each row of it is tried. See ``docs/testing.rst``."""
