"""torchrun --nproc-per-node=N -m fusedit.launch.cache FLAGS: one process that fills a cache.

The flags are those of fusedit.launch.train, with --cache_latents; nothing is trained. Exit codes:
0 done, 2 a mistake the user can put right, 75 stopped by a signal: the same command goes on.
"""

import sys

from . import train


def main(argv: list[str] | None = None) -> int:
    """Runs this rank to its end and returns the exit code."""
    return train.main(argv, cache_only=True)


if __name__ == "__main__":
    sys.exit(main())
