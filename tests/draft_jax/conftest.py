import jaxtyping
import pytest


@pytest.fixture
def without_annotations():
    """Turns the enforcement of annotations off, as it is for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
