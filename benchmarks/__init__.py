"""Side by side with other libraries, each given the same denoiser: `python -m benchmarks`.

Not needed to use `sde_utils`.
"""
