"""Pictures: where they differ when what they show differs."""

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from models.media import plots
from models.media import video as video_io


def test_kept_share_shows_its_numbers(tmp_path):
    """Equal shares everywhere but in one cell give a picture with one odd cell."""
    figures_before = plt.get_fignums()
    pictures = []
    for odd in (0.2, 0.9):
        kept = np.full((5, 3), 0.2)
        kept[4, 0] = odd
        path = tmp_path / f"{odd}.png"
        plots.plot_kept_share(path, kept, np.linspace(1000, 200, 5), title="a title")
        pictures.append(matplotlib.image.imread(path))
    differs = (pictures[0] != pictures[1]).any(-1)
    rows, columns = np.nonzero(differs)
    height, width = differs.shape
    # The last of 5 columns and the first of 3 rows of the heat map.
    assert columns.min() > 0.5 * width
    assert rows.max() < 0.5 * height
    assert differs.mean() > 0.01
    assert plt.get_fignums() == figures_before, "no global figure is left behind"


def test_kept_share_says_what_means_and_exact_rows_add(tmp_path):
    """In the title: nothing below it changes."""
    pictures = []
    for work in (0.0, 0.0625):
        path = tmp_path / f"{work}.png"
        plots.plot_kept_share(
            path,
            np.full((5, 3), 0.2),
            np.linspace(1000, 200, 5),
            title="a title",
            extra_work=work,
        )
        pictures.append(matplotlib.image.imread(path))
    rows, _ = np.nonzero((pictures[0] != pictures[1]).any(-1))
    assert rows.size > 0
    assert rows.max() < 0.2 * pictures[0].shape[0]


def test_attention_draws_the_panels_that_are_asked_for(tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(6), size=(4, 3, 6))
    path = tmp_path / "attention.png"
    plots.plot_attention(
        path,
        maps,
        maps > 0.2,
        layers=(0, 3),
        heads=(1,),
        blocks_per_frame=2,
        title="title",
    )
    height, width = matplotlib.image.imread(path).shape[:2]
    inches = np.array([4 * plots.PANEL_INCHES + 1.0, plots.PANEL_INCHES + 0.6])
    np.testing.assert_allclose([height, width], inches * plots.DOTS_PER_INCH, atol=2)
    assert [file.name for file in tmp_path.iterdir()] == ["attention.png"]


@pytest.mark.parametrize("is_first", [False, True], ids=["after", "before"])
def test_text_is_marked_off_on_its_side(tmp_path, is_first):
    """A text that takes everything, and one that takes nothing, differ on one side."""
    pictures = []
    for share in (0.0, 1.0):
        path = tmp_path / f"{share}.png"
        plots.plot_attention(
            path,
            np.full((1, 1, 20, 20), 0.05),
            np.zeros((1, 1, 20, 20), bool),
            layers=(0,),
            heads=(0,),
            blocks_per_frame=20,
            title="",
            text=plots.TextShares(
                share=np.full((1, 1, 20), share),
                masses=np.zeros((1, 1, 20)),
                is_first=is_first,
            ),
        )
        pictures.append(matplotlib.image.imread(path)[..., :3])
    height, width = pictures[0].shape[:2]
    below_titles = slice(int(0.6 * height), None)
    differs = (pictures[0] != pictures[1]).any(-1)[below_titles]
    columns = np.nonzero(differs)[1]
    assert len(columns) > 100
    assert (columns < 0.5 * width).all() == is_first
    assert (columns > 0.5 * width).all() != is_first


def test_a_map_of_zeros_can_be_drawn(tmp_path):
    """The colours are logarithms, which zero has none of."""
    maps = np.zeros((1, 1, 4, 4))
    with np.errstate(divide="raise"):
        plots.plot_attention(
            tmp_path / "zero.png",
            maps,
            maps > 0,
            layers=(0,),
            heads=(0,),
            blocks_per_frame=4,
            title="",
        )


@pytest.mark.parametrize("indices", [(), (4,), (-1,), (0, 7)], ids=str)
def test_panels_that_do_not_exist_are_named(indices):
    with pytest.raises(ValueError, match=r"layers=.* must be at least one of 0 \.\. 3"):
        plots.check_indices("layers", indices, 4)


def test_missing_extra_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(video_io.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(video_io.MissingExtraError, match="matplotlib"):
        plots.plot_kept_share(
            tmp_path / "x.png", np.ones((2, 2)), np.array([2.0, 1.0]), title=""
        )


def test_skipped_steps_are_hatched_in_the_picture_of_kept_shares(tmp_path):
    """The column of step 1 differs where it was skipped, and no other does."""
    kept, pictures = np.full((3, 4), 0.5), []
    for skipped in (None, np.array([False, True, False])):
        path = tmp_path / "kept.png"
        plots.plot_kept_share(
            path, kept, np.array([900.0, 500.0, 100.0]), title="a", skipped=skipped
        )
        pictures.append(matplotlib.image.imread(path)[..., :3])
    columns = np.nonzero((pictures[0] != pictures[1]).any(-1))[1]
    is_heat_map = (np.ptp(pictures[0], axis=-1) > 0.1).mean(0) > 0.3
    left = np.flatnonzero(is_heat_map)[0]
    assert len(columns) > 100
    # Three columns of a step each: the middle one does not begin at the left edge.
    assert columns.min() > left + 0.5 * np.ptp(columns)
    assert np.ptp(columns) < 0.5 * pictures[0].shape[1]
