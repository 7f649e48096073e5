"""The same results faster, except for `lazy`, which approximates. Skip it to read the method.

`linear` uses oneDNN on CPUs, `denoiser` prepares the denoising MLP for sampling, `graphs` replays
kernels on a GPU, and `lazy` recomputes only features that changed.
"""
