"""Tools to test kernels: an error measure, and compilation for an H100 on a machine without a GPU."""
