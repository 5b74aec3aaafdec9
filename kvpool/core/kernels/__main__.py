"""`python -m kvpool.core.kernels` compiles every kernel into the cache, as an install step."""

from kvpool.core.kernels.compiling import compile_kernels

if __name__ == "__main__":
    compile_kernels()
