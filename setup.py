"""Build script: the folders at the root are installed inside one import namespace, fusedit.

`kernels` alone is Hugging Face's package, which transformers and diffusers import; installed flat,
the two would overwrite each other's files. All other metadata is in pyproject.toml.
"""

from setuptools import setup

PARTS = ("trainer", "kernels", "launch", "launch.demo", "benchmarks")

setup(
    packages=[f"fusedit.{part}" for part in PARTS],
    package_dir={f"fusedit.{part}": part.replace(".", "/") for part in PARTS},
    include_package_data=False,  # what MANIFEST.in adds is for the sdist alone
    package_data={
        "fusedit.kernels": ["tables/*.json"],
        "fusedit.trainer": ["protocols/*.toml"],
        "fusedit.launch": ["recipes/*.toml", "slurm/*", "kubernetes/*", "ssh/*", "report.html"],
        "fusedit.benchmarks": ["results/compiled-*.json"],
        "fusedit.launch.demo": ["base/**/*"],
    },
)
