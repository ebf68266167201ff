"""Triton kernels of pyrlk, one file an op. A leaf: it imports torch, triton and itself."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is pyrlk.triton_kernels; another package owns the name triton_kernels. "
        "Do not put pyrlk's source folder on sys.path"
    )
