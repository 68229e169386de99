from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupsae.errors import InputError
from groupsae.grouping.cost import CostModel
from groupsae.grouping.matrix import Distances
from groupsae.grouping.methods import complete_linkage, even, optimal
from groupsae.grouping.partition import Partition, amad, diameters, largest_diameter
from groupsae.grouping.prediction import BASIS, predict
from groupsae.grouping.table import PartitionTable, choose, group_layers
from tests.grouping.matrices import any_matrix, arbitrary, robinson

COST = CostModel(d_model=64, n_layers=8, context_length=128, d_sae=1024)
DISTANCES = Distances.from_matrix(robinson(7, seed=3))
LOSS = "predicted_explained_variance_loss"


@given(any_matrix(), st.floats(0.001, 2), st.sampled_from(["linkage", "optimal", "even"]))
@settings(deadline=None, max_examples=60)
def test_the_threshold_takes_the_smallest_partition_below_it(
    matrix: np.ndarray, threshold: float, method: Any
) -> None:
    distances = Distances.from_matrix(matrix)
    table = group_layers(distances, method=method, threshold=threshold)
    below = [G for G, row in table.by_groups.items() if row.amad < threshold]
    assert table.chosen == min(below)
    assert table.threshold == threshold
    assert table.partition is table.by_groups[table.chosen].partition


def test_the_threshold_is_strict() -> None:
    amads = {1: 0.3, 2: 0.2, 3: 0.0}
    assert choose(amads, 0.2) == 3
    assert choose(amads, np.nextafter(0.2, 1)) == 2
    assert choose(amads, 5) == 1


@pytest.mark.parametrize("threshold", [0, -0.1, float("nan")])
def test_a_threshold_that_nothing_can_be_below_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=r"threshold is .*; it must be above 0"):
        choose({1: 0.0}, threshold)


def test_no_amad_below_the_threshold_is_an_error() -> None:
    with pytest.raises(InputError, match=r"threshold is 0\.1; .*smallest 0\.2"):
        choose({1: 0.3, 2: 0.2}, 0.1)


@pytest.mark.parametrize(
    ("method", "reference"), [("linkage", complete_linkage), ("optimal", optimal)]
)
def test_the_table_holds_every_number_of_groups_with_its_measures(
    method: Any, reference: Any
) -> None:
    table = group_layers(DISTANCES, method=method, cost=COST)
    assert {G: row.partition for G, row in table.by_groups.items()} == reference(DISTANCES)
    for G, row in table.by_groups.items():
        assert row.amad == amad(DISTANCES, row.partition)
        assert row.largest_diameter == largest_diameter(DISTANCES, row.partition)
        assert row.flops_per_token == COST.flops_per_token(G)


@given(any_matrix())
@settings(deadline=None, max_examples=40)
def test_optimal_is_never_wider_than_linkage_or_even_cuts(matrix: np.ndarray) -> None:
    distances = Distances.from_matrix(matrix)
    tables = {
        method: group_layers(distances, method=method, groups=1).by_groups
        for method in ("linkage", "optimal", "even")
    }
    for G, row in tables["optimal"].items():
        for other in ("linkage", "even"):
            assert row.largest_diameter <= tables[other][G].largest_diameter


def test_a_fixed_number_of_groups_needs_no_threshold() -> None:
    table = group_layers(DISTANCES, groups=4, threshold=0)
    assert (table.chosen, table.partition.G, table.threshold) == (4, 4, None)


def test_some_of_the_measured_layers_can_be_grouped() -> None:
    table = group_layers(DISTANCES, layers=[1, 2, 5], groups=2)
    assert table.layers == (1, 2, 5)
    assert table.partition == complete_linkage(DISTANCES.select([1, 2, 5]))[2]


@pytest.mark.parametrize("method", ["linkage", "optimal", "even"])
def test_a_single_layer_is_its_own_group(method: str) -> None:
    table = group_layers(Distances((3,), np.zeros((1, 1))), method=method)
    assert table.partition == Partition((3,), ((3,),))
    assert table.by_groups[1].amad == 0


@pytest.mark.parametrize(
    "partition", ["0-2,3-6", Partition(tuple(range(7)), ((0, 1, 2), (3, 4, 5, 6)))]
)
def test_an_explicit_partition_is_taken_as_it_is(partition: Any) -> None:
    table = group_layers(DISTANCES, method="explicit", partition=partition, cost=COST)
    assert (table.chosen, table.threshold) == (2, None)
    assert list(table.by_groups) == [2]
    assert table.partition.groups == ((0, 1, 2), (3, 4, 5, 6))
    assert table.by_groups[2].amad == amad(DISTANCES, table.partition)


def test_without_distances_even_and_explicit_groups_still_work() -> None:
    table = group_layers(None, layers=range(7), method="even", groups=3)
    assert table.partition == even(range(7))[3]
    assert table.by_groups[3].amad is None
    table = group_layers(None, layers=range(3), method="explicit", partition=[[0], [1, 2]])
    assert table.partition.groups == ((0,), (1, 2))
    whole = Partition((4, 5), ((4, 5),))
    assert group_layers(None, method="explicit", partition=whole).partition == whole


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"method": "kmeans"}, "method is 'kmeans'; expected one of linkage, optimal, even"),
        ({"method": "explicit"}, "partition: method 'explicit' needs the groups"),
        ({"partition": "0-6"}, "method is 'linkage'; set method to 'explicit'"),
        ({"method": "explicit", "partition": "0-2,4-6"}, "layers 3 are in no group"),
        ({"method": "explicit", "partition": "0-6", "groups": 2}, "explicit partition has 1"),
        ({"groups": 0}, "groups is 0; 7 layers make 1 to 7 groups"),
        ({"groups": 8}, "groups is 8; 7 layers make 1 to 7 groups"),
        ({"threshold": 0}, "threshold is 0"),
        ({"layers": [5, 9]}, "know no layer 9"),
        ({"layers": []}, "layers: the list is empty"),
        ({"distances": None}, "neither layers nor distances"),
        ({"distances": None, "layers": [0, 1]}, "method 'linkage' needs distances"),
        ({"distances": None, "layers": [0, 1], "method": "even"}, "no AMAD to choose by"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        group_layers(**({"distances": DISTANCES} | arguments))


def test_partition_json_has_the_keys_that_other_scripts_read() -> None:
    data = group_layers(DISTANCES, cost=COST).to_json()
    assert list(data) == ["layers", "method", "threshold", "chosen", "prediction", "by_groups"]
    assert list(data["by_groups"]) == [str(G) for G in range(1, 8)]
    for row in data["by_groups"].values():
        assert list(row) == [
            "groups",
            "amad",
            "largest_diameter",
            "flops_per_token",
            "predicted_explained_variance_loss",
            "predicted_ce_loss_score_loss",
        ]


def test_losses_are_predicted_from_the_diameters_of_centred_angles() -> None:
    distances = Distances.from_matrix(robinson(7, seed=3), center=True)
    table = group_layers(distances)
    assert table.prediction == BASIS
    for row in table.by_groups.values():
        sizes = [len(group) for group in row.partition.groups]
        assert row.prediction == predict(diameters(distances, row.partition), sizes)
    means = [row.prediction.ce_loss_score.mean for row in table.by_groups.values()]
    assert means == sorted(means, reverse=True)  # each partition refines the one before it
    data = table.to_json()["by_groups"]["2"]["predicted_ce_loss_score_loss"]
    assert list(data) == ["mean", "low", "high"]


@pytest.mark.parametrize("kind", [{}, {"center": False}, {"center": True, "similarity": "cka"}])
def test_other_distances_give_the_reason_instead_of_a_prediction(kind: dict[str, Any]) -> None:
    table = group_layers(Distances.from_matrix(robinson(7, seed=3), **kind))
    assert table.prediction.startswith("No loss is predicted")
    data = table.to_json()
    assert data["prediction"] == table.prediction
    for row in data["by_groups"].values():
        assert row["predicted_explained_variance_loss"] is None


def test_a_table_from_before_there_were_predictions_is_read() -> None:
    data = group_layers(Distances.from_matrix(robinson(7, seed=3), center=True)).to_json()
    del data["prediction"]
    for row in data["by_groups"].values():
        del row["predicted_explained_variance_loss"], row["predicted_ce_loss_score_loss"]
    table = PartitionTable.from_json(data)
    assert table.prediction is None
    assert all(row.prediction is None for row in table.by_groups.values())


@given(any_matrix(), st.booleans(), st.sampled_from([True, False, None]))
@settings(deadline=None, max_examples=30)
def test_a_table_survives_json(matrix: np.ndarray, costed: bool, center: bool | None) -> None:
    distances = Distances.from_matrix(matrix, center=center)
    table = group_layers(distances, threshold=0.1, cost=COST if costed else None)
    assert PartitionTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_a_table_without_measures_survives_json() -> None:
    table = group_layers(None, layers=[2, 4, 6], method="even", groups=2)
    assert (table.threshold, table.by_groups[2].largest_diameter) == (None, None)
    assert PartitionTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data.pop("layers"), "'layers' must be there and hold a list"),
        (lambda data: data.update(layers=[0, "x"]), "layers: 'x' is no layer number"),
        (lambda data: data.update(method="magic"), "method is 'magic'"),
        (lambda data: data.update(chosen=9), "chosen is 9 but by_groups has no such entry"),
        (lambda data: data.update(chosen=True), "'chosen' must be there and hold a int"),
        (lambda data: data.update(threshold="low"), "threshold is 'low'"),
        (lambda data: data.update(by_groups=[]), "'by_groups' must be there and hold a dict"),
        (lambda data: data["by_groups"].update({"2": 7}), r"by_groups\['2'\]: holds 7"),
        (lambda data: data["by_groups"]["2"].pop("groups"), "'groups' must be there"),
        (lambda data: data["by_groups"]["2"].update(groups=[[0, 1]]), "are in no group"),
        (lambda data: data["by_groups"]["2"].update(groups=[list(range(7))]), "must agree"),
        (lambda data: data["by_groups"]["2"].update(amad=float("nan")), "amad is nan"),
        (lambda data: data["by_groups"]["2"].update(flops_per_token="9"), "'flops_per_token'"),
        (lambda data: data.update(prediction=3), "'prediction' must be there and hold a str"),
        (lambda data: data["by_groups"]["2"][LOSS].pop("low"), f"{LOSS} is .*; expected mean, low"),
        (lambda data: data["by_groups"]["2"][LOSS].update(high="x"), f"{LOSS}: high is 'x'"),
    ],
)
def test_a_spoilt_table_is_refused_by_name(change: Any, problem: str) -> None:
    distances = Distances.from_matrix(arbitrary(7, seed=0), center=True)
    data = deepcopy(group_layers(distances, cost=COST).to_json())
    change(data)
    with pytest.raises(InputError, match=f"^mine.json: ?.*{problem}"):
        PartitionTable.from_json(data, "mine.json")


def test_what_is_no_table_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="expected a JSON object"):
        PartitionTable.from_json([1, 2])
