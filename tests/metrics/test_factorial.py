"""UA, IRA and CRA against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sd_unlearn.metrics.factorial import factorial_rows, grid
from sd_unlearn.metrics.labels import LabelPredictions

AXES = {"digit": ("one", "seven"), "ink": ("red", "blue")}


def predicted(*words: str) -> LabelPredictions:
    """A classifier that is sure of "digit ink" on each image."""
    probabilities = {
        axis: np.array([[float(label in word.split()) for label in labels] for word in words])
        for axis, labels in AXES.items()
    }
    return LabelPredictions(AXES, probabilities, np.zeros((len(words), 1)))


def rates(label: str, *words: str) -> dict[str, tuple[float | None, int]]:
    rows = factorial_rows(label, grid(AXES), predicted(*words), "lora", "reader")
    return {row.metric: (row.value, row.n) for row in rows}


def test_a_grid_has_every_combination_once() -> None:
    assert [" ".join(cell.values()) for cell in grid(AXES)] == ["one red", "one blue", "seven red", "seven blue"]


def test_an_untouched_model_unlearned_nothing_and_retains_everything() -> None:
    found = rates("seven", "one red", "one blue", "seven red", "seven blue")
    assert found == {"ua": (0.0, 2), "ira": (1.0, 2), "cra": (1.0, 2)}


def test_of_an_object() -> None:
    """One of two sevens is gone; an ink changed where a one was asked for. What replaced a seven does not count."""
    found = rates("seven", "one red", "one red", "one blue", "seven blue")
    assert found == {"ua": (0.5, 2), "ira": (1.0, 2), "cra": (0.5, 2)}


def test_of_a_style_the_axes_swap() -> None:
    found = rates("red", "one blue", "one blue", "seven blue", "one red")
    assert found == {"ua": (1.0, 2), "ira": (0.5, 2), "cra": (0.5, 2)}


def test_of_a_category_any_of_its_labels_counts() -> None:
    """Asked for a one or a two, the model gives the other of them once, and once something else."""
    axes = {"digit": ("one", "two", "seven"), "ink": ("red",)}
    probabilities = {"digit": np.eye(3)[[1, 2, 2]], "ink": np.ones((3, 1))}
    read = LabelPredictions(axes, probabilities, np.zeros((3, 1)), {"small": ("one", "two")})
    rows = factorial_rows("small", grid(axes), read, "lora", "reader")
    assert {row.metric: (row.value, row.n) for row in rows} == {"ua": (0.5, 2), "ira": (1.0, 1), "cra": (1.0, 1)}


def test_an_axis_that_the_grid_lacks_does_not_count() -> None:
    read = predicted("one red", "one blue", "seven red", "seven blue")
    backgrounds = {"background": np.eye(2)[[0, 1, 0, 1]]}
    axes = {**AXES, "background": ("white", "black")}
    read = LabelPredictions(axes, read.probabilities | backgrounds, read.features)
    rows = factorial_rows("seven", grid(AXES), read, "lora", "reader")
    assert [row.value for row in rows] == [0.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="'white' is of the axis background"):
        factorial_rows("white", grid(AXES), read, "lora", "reader")


def test_intervals_contain_the_rate() -> None:
    for row in factorial_rows("seven", grid(AXES), predicted(*["one red"] * 4), "lora", "reader"):
        assert row.value is not None
        assert row.low is not None
        assert row.high is not None
        assert row.low <= row.value <= row.high


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 images, but 4"):
        factorial_rows("seven", grid(AXES), predicted(*["one red"] * 3), "", "")
    with pytest.raises(KeyError):
        factorial_rows("purple", grid(AXES), predicted(*["one red"] * 4), "", "")
