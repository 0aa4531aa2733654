"""The version that is installed."""

from importlib import metadata

DISTRIBUTION = "draft-attention-jax"


def package_version() -> str:
    """Returns the version of the installed distribution, for people to read."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"
