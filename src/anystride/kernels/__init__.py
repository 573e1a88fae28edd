"""Device code: portable Triton kernels. They know pointers, strides and sizes, and nothing above them."""
