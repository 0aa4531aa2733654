"""What the pictures of the lab's page show."""

from benchmarks.quality.pictures import pareto_front


def test_front_has_what_nothing_is_ahead_of():
    points = [(4, 9.0), (2, 4.0), (1, 5.0), (3, 7.0), (2, 7.0), (5, 8.0)]
    assert pareto_front(points) == [(1, 5.0), (2, 7.0), (4, 9.0)]
