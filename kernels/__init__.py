"""Device code: Triton kernels and the records they fold at compile time. Never imports torch."""

if __name__ != "tritonshare.kernels":
    raise ImportError("this folder is installed as tritonshare.kernels; import that name instead of 'kernels'")
