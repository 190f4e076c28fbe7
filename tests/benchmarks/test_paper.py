"""The figures of the paper hang together as they do in print."""

import pytest

from benchmarks import paper


def test_percentages_of_table_7_follow_from_its_seconds() -> None:
    for shape, rows in paper.TABLE_7.items():
        ours, _ = rows["gplws"]
        assert len(rows) == 6
        for network, (seconds, percent) in rows.items():
            if network == "gplws":
                assert percent is None
            elif (shape, network) == ("10x512x512", "defocusnet"):
                assert 100 * (1 - ours / seconds) == pytest.approx(49.0, abs=0.01)
                assert percent == 46.59  # so it is printed
            else:
                assert 100 * (1 - ours / seconds) == pytest.approx(percent, abs=0.021)


def test_the_network_itself_is_the_same_in_tables_1_and_3() -> None:
    assert paper.TABLE_1["add"] == paper.TABLE_3["reparameterised"]
    assert paper.TABLE_4["4D Light Field"]["gplws"]["mse"] == paper.TABLE_1["add"][2]


def test_columns_of_all_networks_are_complete() -> None:
    peers = {"fvnet", "dfvnet", "aifdepthnet", "ddffnet", "gplws"}
    for rows in paper.TABLE_4.values():
        assert set(rows) == {*peers, "defocusnet"}
    for rows in paper.TABLE_5.values():
        assert set(rows) == peers
    assert set(paper.TABLE_6) == {"Middlebury", "DefocusNet", "4D Light Field"}
    for rows in paper.TABLE_6.values():
        assert set(rows) == peers
        for errors in rows.values():
            assert set(errors) == {"mae", "mse", "rmse", "abs_rel", "sq_rel"}
    assert len(paper.TABLE_2) == 6
