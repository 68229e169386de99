from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupsae.report.curves import (
    Panel,
    Subject,
    entries,
    lines,
    mean_area,
    mean_lines,
    panels_with_curves,
)

PANEL = Panel("faithfulness")
GROUPS, BASELINE = Subject("groups", 2), Subject("baseline", 4)


def curve(subject: Subject = GROUPS, **changes: Any) -> dict[str, Any]:
    return {
        "partition": subject.partition,
        "groups_total": subject.groups_total,
        "method": "attribution",
        "latents": "ranked",
        "selection": "per_layer",
        "error_nodes": False,
        "score": "faithfulness",
        "n": [4.0, 8.0, 16.0],
        "value": [0.1, 0.5, 0.9],
        "flag": None,
    } | changes


def task(*curves: dict[str, Any], refused: str | None = None) -> dict[str, Any]:
    return {"task": "t", "curves": list(curves), "refused": refused}


def test_the_lines_of_a_panel_are_its_curves_by_g_with_the_baseline_last() -> None:
    shown = lines(
        task(
            curve(latents="untrained"),
            curve(BASELINE),
            curve(Subject("groups", 3)),
            curve(),
            curve(score="completeness"),
            curve(selection="global"),
            curve(error_nodes=True),
            curve(method="integrated_gradients"),
            curve(latents="of the future"),
        ),
        PANEL,
    )
    assert [(line.subject.label, line.latents) for line in shown] == [
        ("G = 2", "ranked"),
        ("G = 3", "ranked"),
        ("one SAE per layer", "ranked"),
        ("G = 2", "untrained"),
    ]
    np.testing.assert_array_equal(shown[0].n, [4, 8, 16])
    np.testing.assert_array_equal(shown[0].value, [0.1, 0.5, 0.9])


def test_a_flagged_curve_and_a_refused_task_have_no_line() -> None:
    flagged = curve(flag="the ratio means little")
    assert lines(task(flagged), PANEL) == []
    assert entries(task(flagged), PANEL) == [flagged]
    assert lines(task(curve(), refused="no"), PANEL) == []


def test_points_that_cannot_be_drawn_are_left_out_and_the_rest_ascend() -> None:
    (line,) = lines(task(curve(n=[16, 0, 8, 4, None], value=[0.9, 0.1, None, 0.2, 0.3])), PANEL)
    assert (list(line.n), list(line.value)) == ([4, 16], [0.2, 0.9])
    assert lines(task(curve(n=[], value=[])), PANEL) == []


def test_random_latents_serve_every_method_but_untrained_saes_their_own() -> None:
    asked = Panel("faithfulness", "integrated_gradients")
    both = task(curve(latents="random"), curve(latents="untrained"))
    assert [line.latents for line in lines(both, asked)] == ["random"]
    own = curve(latents="random", method="integrated_gradients", value=[0, 0, 0])
    (line,) = lines(task(own, curve(latents="random")), asked)
    assert list(line.value) == [0, 0, 0]


def test_means_are_over_the_same_tasks_for_every_line() -> None:
    first = task(curve(value=[0, 0, 0]), curve(BASELINE, value=[0, 0.2, 0.4]))
    second = task(curve(value=[1, 1, 1]), curve(BASELINE, value=[0.4, 0.6, 0.8]))
    third = task(curve(value=[9, 9, 9]), curve(BASELINE, flag="flagged"))
    counted, means = mean_lines([first, second, third], PANEL)
    assert counted == [first, second]
    assert [line.subject for line in means] == [GROUPS, BASELINE]
    np.testing.assert_allclose(means[0].value, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(means[1].value, [0.2, 0.4, 0.6])


def test_a_control_that_a_task_lacks_is_not_averaged() -> None:
    _, means = mean_lines([task(curve(), curve(latents="random")), task(curve())], PANEL)
    assert [line.latents for line in means] == ["ranked"]


def test_there_is_no_mean_without_a_task_that_has_all() -> None:
    one, other = task(curve(), curve(BASELINE, flag="f")), task(curve(flag="f"), curve(BASELINE))
    assert mean_lines([one, other], PANEL) == ([], [])
    assert mean_lines([], PANEL) == ([], [])
    apart = [task(curve(n=[1, 2, 3])), task(curve(n=[4, 5, 6]))]
    assert mean_lines(apart, PANEL)[1] == []


@given(
    st.lists(st.floats(-1, 2), min_size=3, max_size=3),
    st.lists(st.floats(-1, 2), min_size=2, max_size=2),
)
def test_between_points_scores_are_interpolated_over_log_n(a: list[float], b: list[float]) -> None:
    """On log2 N, 8 lies half way from 4 to 16."""
    _, (mean,) = mean_lines([task(curve(value=a)), task(curve(n=[4, 16], value=b))], PANEL)
    middle = (a[1] + (b[0] + b[1]) / 2) / 2
    np.testing.assert_array_equal(mean.n, [4, 8, 16])
    expected = [(a[0] + b[0]) / 2, middle, (a[2] + b[1]) / 2]
    np.testing.assert_allclose(mean.value, expected, atol=1e-12)


def test_panels_come_in_the_order_of_the_page() -> None:
    there = task(
        curve(method="integrated_gradients"),
        curve(selection="global"),
        curve(score="completeness"),
        curve(error_nodes=True),
        curve(),
        curve(method="exact", latents="random"),
    )
    assert panels_with_curves([there]) == [
        Panel("faithfulness"),
        Panel("completeness"),
        Panel("faithfulness", error_nodes=True),
        Panel("faithfulness", selection="global"),
        Panel("faithfulness", "integrated_gradients"),
    ]


def test_an_area_that_is_missing_leaves_no_mean() -> None:
    assert mean_area([0.2, 0.4]) == pytest.approx(0.3)
    assert np.isnan(mean_area([0.2, float("nan")]))
    assert np.isnan(mean_area([]))
