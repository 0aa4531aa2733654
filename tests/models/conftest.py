import jaxtyping
import pytest


@pytest.fixture
def without_jaxtyping():
    """Users run without checked annotations; our own messages must do the work."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
