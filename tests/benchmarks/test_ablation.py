"""The ablation builds, counts, times and trains the variants of the paper."""

import json

from benchmarks import ablation

SMALL = (
    "--shape 3 16 16 --engines gplws --seconds 0.1 --batch-size 2 --crop 16 --frames 3 --count 1 "
    "--side 16 --variants 'add, group parallel, plain' 'add, depthwise, reparameterised'"
)


def test_parameters_are_those_of_the_paper_and_macs_those_of_the_layers(call, tmp_path) -> None:
    options = f"--shape 10 256 256 --no-training --no-latency --out {tmp_path}"
    assert call(ablation, options) == ""
    content = json.loads((tmp_path / "ablation.json").read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert len(rows) == 7
    for row in rows.values():
        for table in row["printed"].keys() & {"1", "3"}:
            assert row["parameters"] == row["printed"][table]["parameters"]
    ours = rows["add, group parallel, reparameterised"]
    assert ours["training_parameters"] == 555_513
    assert round(ours["gmac"], 3) == 13.612
    # A dense conv has four times the products of one in four groups, and channels times those of a
    # depthwise one; all modules but the first have four groups in the network.
    channels = {12: 3, 24: 2, 48: 4, 96: 4}  # 3x3x3 convs in modules, by width
    voxels = {12: 655_360, 24: 163_840, 48: 40_960, 96: 10_240}
    grouped = sum(27 * n * c * c / 4 * voxels[c] for c, n in channels.items()) / 1e9
    dense = sum(27 * n * c * c * voxels[c] for c, n in channels.items()) / 1e9
    first = 27 * 3 * 3 * voxels[12] / 1e9
    depthwise = sum(27 * n * c * voxels[c] for c, n in channels.items()) / 1e9 + first / 3
    rest = ours["gmac"] - grouped - first
    assert abs(rows["add, conv, reparameterised"]["gmac"] - rest - dense - first) < 1e-6
    assert abs(rows["add, depthwise, reparameterised"]["gmac"] - rest - depthwise) < 1e-6
    assert (
        rows["concat, conv, reparameterised"]["gmac"] > rows["add, conv, reparameterised"]["gmac"]
    )


def test_an_ablation_that_was_stopped_goes_on_and_does_nothing_twice(
    call, tmp_path, capsys
) -> None:
    small = f"{SMALL} --out {tmp_path}/RUN --checkpoints {tmp_path}/runs"
    one, two = small.replace("RUN", "one"), small.replace("RUN", "two")
    assert call(ablation, f"{one} --steps 2 --no-latency") == ""
    assert capsys.readouterr().out.count("training in") == 2
    assert call(ablation, f"{one} --steps 2 --resume") == ""
    assert "training in" not in capsys.readouterr().out
    assert "another recipe" in call(ablation, f"{two} --steps 3 --no-latency")

    content = json.loads((tmp_path / "one" / "ablation.json").read_text())
    assert {"processor", "cpu_isa", "torch", "commit"} <= content["machine"].keys()
    errors = []
    for row in content["rows"]:
        (trained,) = row["trained"]
        assert trained["steps"] == 2 and trained["seed"] == 0
        errors.append(trained["depth"]["mse"])
        assert set(row["seconds"]) == {"gplws"} and min(row["seconds"]["gplws"]) > 0
    assert 0 < errors[0] != errors[1] > 0


def test_rows_that_are_not_asked_for_stay_and_all_times_are_of_one_shape(call, tmp_path) -> None:
    plain, depthwise, concat = (
        "add, group parallel, plain",
        "add, depthwise, reparameterised",
        "concat, group parallel, reparameterised",
    )
    assert call(ablation, f"{SMALL} --no-training --out {tmp_path}") == ""
    content = json.loads((tmp_path / "ablation.json").read_text())
    first = {row["variant"]: row for row in content["rows"]}
    errors = {"seed": 0, "steps": 9, "depth": {"mse": 0.5}, "frames": {"mae_frames": 0.5}}
    recipe = dict.fromkeys(("batch_size", "frames", "crop", "loss", "count"), 7)
    first[depthwise] |= {"recipe": recipe, "trained": [errors]}
    for name in ("kept", "wider", "untimed", "refused"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ablation.json").write_text(json.dumps(content))

    again = f"{SMALL} --resume --out {tmp_path}"
    for options in (
        f"{again}/kept --no-training --variants '{plain}'",
        f"{again}/wider --no-training --variants '{concat}' --shape 3 16 32",
        f"{again}/untimed --no-training --variants '{plain}' --shape 3 16 32 --no-latency",
    ):
        assert call(ablation, options) == ""
    options = f"{again}/refused --variants '{plain}' --steps 1 --checkpoints {tmp_path}/runs"
    assert "errors of another recipe" in call(ablation, options)
    kept, wider, untimed, refused = (
        {
            row["variant"]: row
            for row in json.loads((tmp_path / name / "ablation.json").read_text())["rows"]
        }
        for name in ("kept", "wider", "untimed", "refused")
    )
    assert kept == refused == first
    assert wider.keys() == {plain, depthwise, concat}
    for name, row in wider.items():
        assert row["shape"] == "3x16x32" and set(row["seconds"]) == {"gplws"}
        if name in first:
            assert row["gmac"] > first[name]["gmac"]
            assert row["seconds"] != first[name]["seconds"]
    assert wider[depthwise]["trained"] == [errors]
    assert untimed.keys() == first.keys()
    assert not any(row.keys() & {"shape", "seconds"} for row in untimed.values())
