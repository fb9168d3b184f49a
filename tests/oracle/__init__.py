"""Independent NumPy implementations that the tests compare the library with."""
