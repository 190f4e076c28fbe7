"""The figures of the paper hang together as they do in print."""

import json

import pytest
from repository_runs import run

SCRIPT = """
import json
from benchmarks import paper
tables = {n: getattr(paper, f"TABLE_{n}") for n in (1, 3, 4, 5, 6, 7)}
tables[2] = {"/".join(key): row for key, row in paper.TABLE_2.items()}
print(json.dumps(tables))
"""


@pytest.fixture(scope="module")
def tables(repository):
    ended = run(repository, "-c", SCRIPT)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_percentages_of_table_7_follow_from_its_seconds(tables) -> None:
    for shape, rows in tables["7"].items():
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


def test_the_network_itself_is_the_same_in_tables_1_and_3(tables) -> None:
    assert tables["1"]["add"] == tables["3"]["reparameterised"]
    assert tables["4"]["4D Light Field"]["gplws"]["mse"] == tables["1"]["add"][2]


def test_columns_of_all_networks_are_complete(tables) -> None:
    peers = {"fvnet", "dfvnet", "aifdepthnet", "ddffnet", "gplws"}
    for rows in tables["4"].values():
        assert set(rows) == {*peers, "defocusnet"}
    for rows in tables["5"].values():
        assert set(rows) == peers
    assert set(tables["6"]) == {"Middlebury", "DefocusNet", "4D Light Field"}
    for rows in tables["6"].values():
        assert set(rows) == peers
        for errors in rows.values():
            assert set(errors) == {"mae", "mse", "rmse", "abs_rel", "sq_rel"}
    assert len(tables["2"]) == 6
