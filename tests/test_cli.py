from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tifffile
import yaml
from microscope_files import write_lif, write_zarr

import gplws.data
from gplws import __version__
from gplws.cli import main
from gplws.data import demo_scene
from gplws.io import read_stack
from gplws.models import save_weights
from gplws.models.registry import build_model
from gplws.reconstruct import Reconstruction, reconstruct


@pytest.fixture
def folder(tmp_path):
    """Six frames of random texture, blurred by their distance from frame 3."""
    texture = np.random.default_rng(0).integers(0, 255, (40, 50)).astype(np.float32)
    path = tmp_path / "frames"
    path.mkdir()
    for i in range(6):
        frame = cv2.GaussianBlur(texture, (0, 0), 0.3 + abs(i - 3))
        cv2.imwrite(str(path / f"f{i}.png"), frame.astype(np.uint8))
    return path


def run(*words):
    try:
        return main([str(w) for w in words])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", ["reconstruct", "convert", "evaluate", "benchmark"])
def test_help_names_types_by_words(command, capsys):
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    assert "type: words" in text
    assert "<function" not in text


def test_a_folder_becomes_a_height_map(folder, tmp_path, capsys):
    out = tmp_path / "out"
    calibration = ("--z-step", 2, "--pixel-size", 0.5)
    assert run("reconstruct", folder, "-o", out, *calibration, "--mesh", "stl") == 0
    assert (out / "mesh.stl").is_file()
    shown = capsys.readouterr()
    assert str(out / "height.tif") in shown.out and " um" in shown.out
    assert abs(np.nanmedian(tifffile.imread(out / "height.tif")) - 6) < 0.3
    assert json.loads((out / "info.json").read_text())["units"] == "um"


def test_without_a_step_it_says_that_heights_are_frames(folder, tmp_path, capsys):
    assert run("reconstruct", folder, "-o", tmp_path / "out", "--quiet") == 0
    assert "heights are in frames: pass --z-step" in capsys.readouterr().err


def test_where_nothing_comes_into_focus_it_says_so(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "blank.tif", np.full((6, 30, 40), 7, np.uint8))
    assert run("reconstruct", tmp_path / "blank.tif", "-o", tmp_path / "out", "--quiet") == 0
    assert "no pixel is valid" in capsys.readouterr().err


def test_results_do_not_go_among_the_frames(folder, capsys):
    before = sorted(folder.iterdir())
    assert run("reconstruct", folder, "-o", folder, "--overwrite") == 1
    assert "holds the frames" in capsys.readouterr().err and sorted(folder.iterdir()) == before


def test_several_meshes_and_surfaces_are_words_with_commas(folder, tmp_path, capsys):
    calibration = ("--z-step", 2, "--pixel-size", 0.5, "--quiet")
    assert run("reconstruct", folder, "-o", tmp_path / "a", *calibration, "--mesh", "ply,stl") == 0
    assert (
        run("reconstruct", folder, "-o", tmp_path / "b", *calibration, "--mesh", "[ply, stl]") == 0
    )
    for name in ("a", "b"):
        assert {"mesh.ply", "mesh.stl"} < {path.name for path in (tmp_path / name).iterdir()}


def test_focus_positions_come_as_numbers_or_from_a_file(folder, tmp_path, capsys):
    positions = [0, 1.5, 3, 4.5, 6, 8]
    (tmp_path / "positions.txt").write_text("0 1.5\n3;4.5\n6, 8\n")
    for name, given in (("a", "0,1.5,3,4.5,6,8"), ("b", tmp_path / "positions.txt")):
        words = ("reconstruct", folder, "-o", tmp_path / name, "--focus-positions-um", given)
        assert run(*words, "--quiet") == 0
        info = json.loads((tmp_path / name / "info.json").read_text())
        assert info["parameters"]["focus_positions_um"] == positions


def test_a_reader_that_stops_early_is_no_error(folder, tmp_path):
    command = f"{sys.executable} -m gplws.cli info | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr


def test_a_config_file_equals_the_options(folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"stack: {folder}\nz_step_um: 2.0\nz_direction: down\nmesh: [ply]\n"
        f"pixel_size_um: 0.5\nout: {tmp_path / 'out'}\n"
    )
    assert run("reconstruct", "--config", config) == 0
    assert abs(np.nanmedian(tifffile.imread(tmp_path / "out" / "height.tif")) + 6) < 0.3
    assert (tmp_path / "out" / "mesh.ply").is_file()


def test_info_is_json(capsys):
    assert run("info") == 0
    assert json.loads(capsys.readouterr().out)["cpu_isa"] in ("baseline", "avx2", "avx512")


def test_the_default_folder_is_named_after_the_stack(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("reconstruct", folder, "--quiet") == 0
    assert (tmp_path / "frames_gplws" / "height.tif").is_file()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("scan_2.5um", "scan_2.5um_gplws"),
        ("scan.tif", "scan.tif_gplws"),
        ("a.b.OME.TIF", "a.b_gplws"),
        ("1.5um.npy", "1.5um_gplws"),
        ("1.5um.lif", "1.5um_gplws"),
        ("scan.ome.zarr", "scan_gplws"),
    ],
)
def test_the_default_folder_has_the_full_name_of_the_stack(
    folder, tmp_path, monkeypatch, name, expected
):
    monkeypatch.chdir(tmp_path)
    stack = tmp_path / name
    if name.endswith(".TIF"):
        tifffile.imwrite(stack, read_stack(folder).frames, metadata={"axes": "ZYX"})
    elif name.endswith(".npy"):
        np.save(stack, read_stack(folder).frames)
    elif name.endswith(".lif"):
        pytest.importorskip("liffile")
        write_lif(stack, {"a": read_stack(folder).frames[:, None]})
    elif name.endswith(".zarr"):
        pytest.importorskip("zarr")
        write_zarr(stack, {"a": read_stack(folder).frames}, "zyx")
    else:
        folder.rename(stack)
    assert run("reconstruct", name, "--quiet") == 0
    assert (tmp_path / expected / "height.tif").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "obj"], "mesh must be among"),
        (["--mesh", "stl"], "pass z_step_um"),
        (["--mesh", "stl", "--z-step", 2], "pass pixel_size_um"),
        (["--mesh", "[ply, obj]", "--z-step", 2, "--pixel-size", 1], "got 'obj'"),
        (["--surface", "obj"], "surface must be among gwy, sdf, x3p"),
        (["--max-faces", 1], "max_faces must be at least 2"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused_before_the_work(
    folder, tmp_path, monkeypatch, capsys, words, message
):
    def never(*given, **options):
        raise AssertionError("nothing may be computed")

    monkeypatch.setattr(sys.modules["gplws.reconstruct"], "reconstructed", never)
    assert run("reconstruct", folder, "-o", tmp_path / "out", *words) == 1
    assert message in capsys.readouterr().err


def test_a_missing_package_of_an_extra_is_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run("reconstruct", folder, "-o", tmp_path / "out", "--surface", "sdf") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("gplws: error: a .sdf file needs the package sdfio: pip install")


def test_a_surface_file_is_written_where_lengths_are_known(folder, tmp_path, capsys):
    pytest.importorskip("gwyfile")
    out, words = tmp_path / "out", ("--surface", "gwy", "--z-step", 2, "--quiet")
    assert run("reconstruct", folder, "-o", out, *words) == 1
    assert "a surface file needs the size of a pixel" in capsys.readouterr().err
    assert run("reconstruct", folder, "-o", out, *words, "--pixel-size", 0.5) == 0
    assert "height.gwy" in json.loads((out / "info.json").read_text())["files"]


def test_x3p_is_the_same_when_converted(folder, tmp_path):
    pytest.importorskip("x3pio")
    out, copy = tmp_path / "out", tmp_path / "copy"
    scales = ("--z-step", 2, "--pixel-size", 0.5, "--quiet")
    assert run("reconstruct", folder, "-o", out, *scales, "--surface", "x3p") == 0
    assert run("convert", out, "-o", copy, "--surface", "x3p") == 0
    assert (copy / "height.x3p").read_bytes() == (out / "height.x3p").read_bytes()
    (copy / "height.x3p").write_bytes(b"old")
    assert run("convert", copy, "--mesh", "ply") == 0  # what is there already is written anew
    assert (copy / "height.x3p").read_bytes() == (out / "height.x3p").read_bytes()


@pytest.mark.parametrize("name", ["null", "~", "#1_sample", "&anchor", "002", "1.50"])
def test_names_of_folders_are_taken_as_they_are(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / name)
    (tmp_path / "out").mkdir()
    assert run("reconstruct", name, "-o", f"out/{name}", "--quiet") == 0
    monkeypatch.chdir(tmp_path / "out")
    assert run("convert", name, "-o", f"{name}x") == 0
    assert run("benchmark", f"../{name}", "--methods", "rdf", "--seconds", 0, "-o", "times") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [name, f"{name}x", "times"]
    )


def test_focus_positions_may_begin_below_zero_and_come_from_files_of_spreadsheets(
    folder, tmp_path, capsys
):
    out = tmp_path / "out"
    assert run("reconstruct", folder, "-o", out, "--focus-positions-um", "-3,-2,-1,0,1,2") == 0
    assert tifffile.imread(out / "height.tif").mean() == pytest.approx(0.0, abs=0.1)
    path = tmp_path / "positions.txt"
    path.write_bytes("0\r\n1\r\n2\r\n3\r\n4\r\n5\r\n".encode("utf-8-sig"))
    more = ("--overwrite", "--quiet")
    assert run("reconstruct", folder, "-o", out, "--focus-positions-um", path, *more) == 0
    path.write_bytes("1,2,x".encode("utf-16"))
    for given, message in ((path, "cannot read"), ("nowhere.txt", "a file of numbers that exists")):
        assert run("reconstruct", folder, "--focus-positions-um", given) == 2
        assert message in capsys.readouterr().err


def test_a_stack_is_not_replaced_by_its_results(folder, tmp_path, capsys):
    path = tmp_path / "here" / "height.tif"
    path.parent.mkdir()
    tifffile.imwrite(path, read_stack(folder).frames)
    before = path.read_bytes()
    assert run("reconstruct", path, "-o", path.parent, "--overwrite") == 1
    assert "holds the frames" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_sigterm_ends_a_command_as_ctrl_c_does(folder, tmp_path, monkeypatch, capsys):
    def killed(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Reconstruction, "save", killed)
    assert run("reconstruct", folder, "-o", tmp_path / "out") == 1
    assert "gplws: interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_focus_positions_may_be_those_of_the_names(folder, tmp_path):
    for index, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"z{0.5 * index}.png")
    out = tmp_path / "out"
    words = ("--focus-positions-um", "names", "--pixel-size", 1, "--mesh", "ply", "--quiet")
    assert run("reconstruct", folder, "-o", out, *words) == 0
    assert tifffile.imread(out / "height.tif").mean() == pytest.approx(3 * 0.5, abs=0.1)


def test_a_mesh_takes_its_calibration_from_the_file(folder, tmp_path):
    path = tmp_path / "stack.tif"
    frames = read_stack(folder).frames
    metadata = {"axes": "ZYX", "spacing": 2.0, "unit": "um"}
    tifffile.imwrite(path, frames, imagej=True, resolution=(2, 2), metadata=metadata)
    out = tmp_path / "out"
    assert run("reconstruct", path, "-o", out, "--mesh", "stl", "--quiet") == 0
    info = json.loads((out / "info.json").read_text())
    assert "mesh.stl" in info["files"] and info["source"]["path"] == str(path)


def test_results_are_converted_without_the_frames(folder, tmp_path, capsys):
    out, scales = tmp_path / "out", ("--z-step", 2, "--pixel-size", 0.5, "--quiet")
    assert run("reconstruct", folder, "-o", out, *scales, "--mesh", "stl") == 0
    (out / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("convert", out, "--mesh", "ply", "--max-faces", 500) == 0
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() - before.keys() == {"mesh.ply"} and not before.keys() - after.keys()
    assert b"mesh.stl" in after["info.json"] and len(after["mesh.stl"]) < 84 + 50 * 500
    same = before.keys() - {"info.json", "mesh.stl"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    info = json.loads(after["info.json"])
    assert {"mesh.ply", "mesh.stl"} < set(info["files"])
    capsys.readouterr()
    assert run("convert", out, "-o", tmp_path / "copy", "--mesh", "glb") == 0
    assert str(tmp_path / "copy" / "mesh.glb") in capsys.readouterr().out
    assert not (tmp_path / "copy" / "mesh.ply").exists()
    assert run("convert", out, "-o", tmp_path / "copy") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("convert", tmp_path / "nowhere") == 1
    assert "no such folder" in capsys.readouterr().err


def test_results_in_frames_become_no_mesh(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("reconstruct", folder, "-o", out, "--quiet") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run("convert", out, "--mesh", "stl") == 1
    assert "a mesh needs" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_one_channel_is_reconstructed(folder, tmp_path):
    frames = read_stack(folder).frames
    gray = frames if frames.ndim == 3 else frames[..., 0]
    path, out = tmp_path / "stack.tif", tmp_path / "out"
    channels = np.stack([np.full_like(gray, 9), gray], axis=1)
    tifffile.imwrite(path, channels, imagej=True, metadata={"axes": "ZCYX"})
    assert run("reconstruct", path, "-o", out, "--channel", 1, "--quiet") == 0
    found = tifffile.imread(out / "height.tif")
    np.testing.assert_array_equal(found, reconstruct(gray).height)
    assert json.loads((out / "info.json").read_text())["source"]["channel"] == 1


def test_existing_results_are_refused_before_the_work_and_replaced_on_request(
    folder, tmp_path, capsys
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert run("reconstruct", folder, "-o", out) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [f.name for f in out.iterdir()] == ["notes.txt"]
    assert run("reconstruct", folder, "-o", out, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine" and (out / "height.tif").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "subcommand"),
        (["reconstruct"], 2, "either the path of a stack or --demo"),
        (["reconstruct", ""], 2, "an argument is empty"),
        (["reconstruct", "FOLDER", "--demo"], 2, "either the path of a stack or --demo"),
        (["reconstruct", "FOLDER", "--z-step", "two"], 2, "z_step_um"),
        (["reconstruct", "FOLDER", "--z-direction", "left"], 2, "--z-direction"),
        (["reconstruct", "FOLDER", "--zstep", "2"], 2, "zstep"),
        (["reconstruct", "nowhere"], 1, "nowhere"),
        (["reconstruct", "FOLDER", "--z-step", "-2"], 1, "z_step_um must be positive"),
        (["reconstruct", "FOLDER", "--method", "magic"], 1, "method must be one of"),
        (
            ["reconstruct", "FOLDER", "--align", "rigid"],
            1,
            "align must be one of none, translation",
        ),
        (["reconstruct", "--demo", "--align", "affine"], 1, "--align does not go with --demo"),
        (["reconstruct", "--demo", "--z-step", "1"], 1, "--z-step-um does not go with --demo"),
        (["reconstruct", "FOLDER", "--mesh", "obj"], 1, "mesh must be among"),
        (["reconstruct", "FOLDER", "--mesh", "[ply]"], 1, "z_step_um"),
        (["reconstruct", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
    ],
)
def test_a_failure_says_why_and_leaves_nothing(
    words, code, message, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(*[folder if w == "FOLDER" else w for w in words]) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert shown.out == ""
    assert [f.name for f in tmp_path.iterdir()] == ["frames"]


def test_a_truncated_frame_is_named(folder, tmp_path, capsys):
    bad = folder / "f2.png"
    bad.write_bytes(bad.read_bytes()[:300])
    assert run("reconstruct", folder, "-o", tmp_path / "out") == 1
    assert "f2.png" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_and_the_module_are_the_same(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-m", "gplws.cli", "--version"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    from gplws import __version__

    assert __version__ in shown.stdout


def test_the_demo_reports_its_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gplws.data, "demo_scene", lambda: demo_scene(64, frames=12))
    assert run("reconstruct", "--demo", "--mesh", "[stl]", "--quiet") == 0
    said = re.search(r"known surface: mean (\S+) um.*mean (\S+) frames", capsys.readouterr().out)
    assert said is not None
    in_um, in_frames = map(float, said.groups())
    assert 0 < in_frames < 0.5 and 0 < in_um < 6
    files = {f.name for f in (tmp_path / "gplws_demo").iterdir()}
    assert {"height.tif", "preview.png", "all_in_focus.png", "info.json", "mesh.stl"} <= files
    assert run("reconstruct", "--demo", "--quiet") == 0  # again, without a word


TINY = (
    *(
        "--model.arguments",
        '{"widths": [4, 8], "depths": [1, 1], "middle": 1, "decoder_depths": [1]}',
    ),
    *("--data.sources", '[{factory: "toy_data:ToySource", arguments: {side: 16}}]'),
    *("--data.validation", '[{factory: "toy_data:ToySource", name: toy, count: 1}]'),
    *("--checkpoints.log_steps", 1),
)


def test_a_network_is_trained_resumed_exported_and_used(tmp_path, capsys, folder):
    out, weights = tmp_path / "run", tmp_path / "net.safetensors"
    assert run("train", "--config", "default", "-o", out, *TINY, "--schedule.steps", 2) == 0
    shown = capsys.readouterr()
    assert f"{out}/checkpoint.pt: done at step 2; mean error in frames: toy " in shown.out
    assert "gplws train" in shown.err  # the progress bar
    assert shown.err.count("\r") < 4  # where it is no terminal, few lines
    # Without --config the run goes on with its own configuration, and what is given here over it.
    assert run("train", "--resume", "-o", out, "--schedule.steps", 3, "--quiet") == 0
    shown = capsys.readouterr()
    assert "done at step 3" in shown.out and shown.err == ""
    assert len((out / "log.jsonl").read_text().splitlines()) == 5
    assert run("export", out, weights, "--licence", "CC0-1.0") == 0
    assert capsys.readouterr().out.splitlines()[:2] == [str(weights), str(tmp_path / "net.md")]
    assert "CC0-1.0" in (tmp_path / "net.md").read_text()


def test_of_several_processes_that_train_one_says_the_result(tmp_path, capsys, monkeypatch):
    from gplws import training

    result = training.TrainingResult(2, "out of time", {}, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(training, "train", lambda *arguments, **options: result)
    for rank, said in (("1", ""), ("0", f"{result.checkpoint}: out of time at step 2\n")):
        monkeypatch.setenv("RANK", rank)
        assert run("train", "-o", tmp_path / "run") == 0
        assert capsys.readouterr().out == said


def test_the_default_preset_trains_on_simulated_stacks(tmp_path, capsys):
    small = ("--data.crop", 16, "--data.frames", "[3, 3]", "--data.batch_size", 1)
    words = ("train", "-o", tmp_path / "run", *TINY[:2], *small, "--schedule.steps", 1, "--quiet")
    assert run(*words) == 0
    assert "done at step 1; mean error in frames: simulated " in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["data"]["sources"][0]["factory"] == "gplws.data.generator:StackGenerator"
    assert config["optimiser"]["kind"] == "adamw" and config["data"]["crop"] == 16


def test_the_stack_and_the_weights_may_be_named_in_files(tmp_path, capsys, folder):
    network = build_model(
        "gplws", {"widths": [4, 8], "depths": [1, 1], "middle": 1, "decoder_depths": [1]}
    )
    save_weights(network, tmp_path / "net.safetensors")
    (tmp_path / "config.yaml").write_text(f"path: {folder}\nmethod: {tmp_path}/net.safetensors\n")
    out = tmp_path / "out"
    assert run("reconstruct", "--config", tmp_path / "config.yaml", "-o", out, "--quiet") == 0
    assert json.loads((out / "info.json").read_text())["method"] == "net"
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    words = ("reconstruct", folder, "-o", tmp_path / "new", "--quiet")
    assert run(*words, "--method", tmp_path / "other.safetensors") == 1
    assert "other.safetensors" in capsys.readouterr().err


def test_several_stacks_are_reconstructed_whatever_becomes_of_the_others(folder, tmp_path, capsys):
    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    words = ("reconstruct", folder, tmp_path / "empty", other, "-o", out, "--quiet")
    assert run(*words, "--z-step", "2") == 1
    shown = capsys.readouterr().err
    assert "empty: the folder holds no frames" in shown and "1 of 3 stacks failed" in shown
    ends = [f"{path.parent.name}/{path.name}" for path in (folder, other)]
    heights = [tifffile.imread(out / end / "height.tif") for end in ends]
    assert np.array_equal(*heights, equal_nan=True) and not (out / "empty").exists()
    assert run(*words) == 1 and "--overwrite" in capsys.readouterr().err
    assert run("reconstruct", folder, folder) == 1
    assert "path: " in (said := capsys.readouterr().err) and "is given twice" in said


def test_results_of_two_stacks_never_meet(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder.rename("a")
    tifffile.imwrite("a.tif", np.zeros((4, 20, 30), np.uint8), photometric="minisblack")
    assert run("reconstruct", "a", "a.tif", "-o", "out") == 1
    assert "results of two stacks would be in out/a" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_methods_are_compared_on_stacks_with_known_depth(tmp_path, capsys, folder):
    y = np.broadcast_to(np.linspace(2, 4, 40)[:, None], (40, 50))
    np.savez(folder / "gt.npz", gt_index=y)
    out = tmp_path / "evaluation"
    generator = '[{factory: "toy_data:ToySource", name: toy, count: 1}]'
    words = ("evaluate", "--stacks", f"[{folder}]", "--data", generator, "-o", out, "--pictures")
    assert run(*words, "--methods", "[rdf, rr]") == 0
    shown = capsys.readouterr()
    table = [line.split()[:2] for line in shown.out.splitlines()]
    assert ["frames", "rdf"] in table and ["toy", "rdf"] in table and ["toy", "rr"] in table
    assert json.loads((out / "evaluation.json").read_text())["means"][0]["dataset"] == "frames"
    assert len(list((out / "pictures").iterdir())) == 6
    assert run(*words, "--quiet") == 1 and "--overwrite" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(*words, "--quiet", "--overwrite", "--methods", "[magic]") == 1
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(*words, "--quiet", "--overwrite", "--methods", "[rdf]") == 0
    names = {path.name for path in (out / "pictures").iterdir()}
    assert len(names) == 3 and all(name.endswith("_rdf.png") for name in names)


def test_methods_and_stacks_of_one_file_name_are_told_apart(tmp_path, capsys, folder):
    index = np.broadcast_to(np.linspace(2, 4, 40)[:, None], (40, 50))
    np.savez(folder / "gt.npz", gt_index=index)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "val").symlink_to(folder)
    for steps, name in ((1, "a"), (2, "b")):
        words = ("train", "-o", tmp_path / name / "run", *TINY, "--schedule.steps", steps)
        assert run(*words, "--quiet") == 0
    stacks = ("--stacks", f"[{tmp_path}/first/val, {tmp_path}/second/val]")
    files = [f"{tmp_path}/{name}/run/checkpoint.pt" for name in "ab"]
    generators = '[{factory: "toy_data:ToySource", count: 1}, {factory: "toy_data:ToySource"}]'
    capsys.readouterr()
    methods = ("--methods", f"[{', '.join(files)}, rdf]")
    assert run("evaluate", *methods, *stacks, "--data", generators, "--quiet") == 0
    table = [tuple(line.split()[:2]) for line in capsys.readouterr().out.splitlines()[2:]]
    sets = ("first/val", "second/val", "ToySource_1", "ToySource_2")
    assert table == [
        (data, method)
        for data in sets
        for method in ("a/run/checkpoint.pt", "b/run/checkpoint.pt", "rdf")
    ]
    assert run("evaluate", "--methods", "[rdf, rdf]", *stacks) == 1
    assert "--methods: rdf is given twice" in capsys.readouterr().err


def test_presets_say_what_they_promise(tmp_path, capsys):
    for preset in ("paper", "default"):
        with pytest.raises(SystemExit):
            main(["train", "--config", preset, "--print_config"])
        config = yaml.safe_load(capsys.readouterr().out)
        optimiser, schedule = config["optimiser"], config["schedule"]
        if preset == "paper":
            assert (optimiser["kind"], optimiser["learning_rate"]) == ("adam", 1e-3)
            assert (config["data"]["batch_size"], schedule["epochs"]) == (4, 720)
            assert schedule["steps"] is None
        else:
            assert (optimiser["kind"], optimiser["learning_rate"]) == ("adamw", 2.5e-3)
            assert (optimiser["clip"], schedule["shape"]) == (5.0, "cosine")


def printed_config(capsys, *words):
    assert run("train", *words) == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_methods_are_timed_on_a_stack_that_is_rendered_or_given(tmp_path, capsys):
    out = tmp_path / "times.json"
    size = ("--frames", 5, "--height", 48, "--width", 40)
    words = ("--methods", "[sml, gplws]", "--seconds", 0.1, "--quiet")
    assert run("benchmark", *size, *words, "-o", out) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "5 x 48 x 40 uint8, device cpu" and shown.err == ""
    assert [line.split()[0] for line in lines[1:]] == ["method", "sml", "gplws", str(out)]
    found = json.loads(out.read_text())
    assert found["shape"] == [5, 48, 40] and found["build"]["version"] == __version__
    for method, line in zip(("sml", "gplws"), lines[2:4], strict=True):
        seconds = found["seconds"][method]
        cells = [float(cell) for cell in line.split()[1:]]
        assert len(seconds) >= 3 and cells[-1] == len(seconds)
        median = statistics.median(seconds)
        expected = [median, min(seconds), 1 / median, 5 * 48 * 40 * 1e-6 / median]
        assert cells[:4] == pytest.approx(expected, rel=1e-3)
    assert run("benchmark", *size, *words, "-o", out) == 1
    assert "times.json exists" in capsys.readouterr().err
    np.save(tmp_path / "stack.npy", np.random.default_rng(0).random((4, 16, 16)))
    assert run("benchmark", tmp_path / "stack.npy", *words) == 0
    assert capsys.readouterr().out.startswith("4 x 16 x 16 float64, device cpu\n")
    assert run("benchmark", tmp_path / "stack.npy", "--frames", 5, *words) == 1
    assert "--frames is of a rendered stack" in capsys.readouterr().err
    config = tmp_path / "config.yaml"
    config.write_text(f"path: {tmp_path}/stack.npy\n")
    new = ("-o", tmp_path / "new" / "times.json")
    assert run("benchmark", "--config", config, *words, *new) == 0
    assert capsys.readouterr().out.startswith("4 x 16 x 16 float64, device cpu\n")
    both = ("--precisions", "float32,bfloat16")
    assert run("benchmark", tmp_path / "stack.npy", *words, *both) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == ["sml", "gplws", "gplws, bfloat16"]
    assert run("benchmark", *size, "--precisions", "float31", "--quiet") == 2
    assert "expected float32, bfloat16, float16, got 'float31'" in capsys.readouterr().err
    assert run("benchmark", *size, "--methods", "[magic]", "--quiet") == 1
    assert "method must be one of" in capsys.readouterr().err


def test_the_printed_configuration_is_the_one_that_is_used(tmp_path, capsys):
    preset = printed_config(capsys, "--config", "default", "--print_config")
    assert preset["model"]["arguments"]["stem"] == "features"
    assert printed_config(capsys, "--print_config") == preset
    steps = printed_config(capsys, "--print_config=skip_unset", "--schedule.steps", 7)
    assert steps["schedule"]["steps"] == 7
    assert steps["model"]["arguments"] == preset["model"]["arguments"]
    # A file is not laid over the preset.
    (tmp_path / "config.yaml").write_text("schedule: {steps: 5}\n")
    few = printed_config(capsys, f"--config={tmp_path}/config.yaml", "--print_config")
    assert few["schedule"]["steps"] == 5 and "stem" not in few["model"]["arguments"]
    over = printed_config(
        capsys, "--config", "default", "--config", tmp_path / "config.yaml", "--print_config"
    )
    assert over["schedule"]["steps"] == 5 and over["model"] == preset["model"]
    goes_on = printed_config(capsys, "--resume", "-o", tmp_path, "--print_config")
    assert goes_on["schedule"] == few["schedule"] and goes_on["model"] == few["model"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "--data.sources", "[]"], 1, "data.sources: expected at least one"),
        (["train", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "--optimiser.kind", "sgd"], 2, "optimiser"),
        (["train", "--loss.sigma", "-1", *TINY], 1, "loss.sigma must be positive"),
        (["train", "--resume", "--out", "nowhere"], 1, "no such file: nowhere/checkpoint.pt"),
        (["train", "--model.name", "unet", *TINY], 1, "unknown model 'unet'"),
        (["train", "--model.name", "fvnet"], 1, "--model.arguments '{}' takes none"),
        (["train", "--model.weights", "w.safetensors", *TINY], 1, "w.safetensors"),
        (["train", "--device", "tpu", *TINY], 1, "device 'tpu' cannot be used"),
        (["export", "nowhere", "w.safetensors"], 1, "no such file: nowhere"),
        (["export", "nowhere"], 2, "out"),
        (["evaluate"], 2, "give --stacks or --data"),
        (["evaluate", "--stacks", "[nowhere]"], 1, "nowhere"),
        (["evaluate", "--stacks", "[nowhere]", "--pictures"], 2, "--pictures needs --out"),
        (["evaluate", "--methods", "[magic]", "--data", TINY[3]], 1, "magic"),
        (
            ["evaluate", "--methods", "[gplws]", "--data", TINY[3], "--device", "tpu"],
            1,
            "device 'tpu' cannot be used",
        ),
        (["simulate", "sim", "--device", "tpu"], 1, "device 'tpu' cannot be used"),
    ],
)
def test_training_that_cannot_start_says_why(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert shown.out == "" and not list(tmp_path.iterdir())


def simulated(folder):
    """Truth and notes of a simulated stack."""
    info = json.loads((folder / "info.json").read_text())
    return tifffile.imread(folder / "height.tif"), info


def test_a_simulated_stack_is_reconstructed_to_its_true_height(tmp_path, capsys):
    out = tmp_path / "sim"
    size = ("--height", 96, "--width", 112, "--frames", 16, "--quiet")
    optics = ("--na", 0.3, "--pixel-size", 0.5, "--relief", 20, "--seed", 2)
    assert run("simulate", out, "--surface", "waves", *size, *optics) == 0
    assert capsys.readouterr().out.strip() == str(out / "stack.tif")
    truth, info = simulated(out)
    assert truth.shape == (96, 112) and np.ptp(truth) == pytest.approx(20, rel=1e-3)
    assert info["shape"] == [16, 96, 112] and info["scene"]["numerical_aperture"] == 0.3
    assert {f.name for f in out.iterdir()} == set(info["files"])
    # The stack carries its own calibration.
    assert run("reconstruct", out / "stack.tif", "-o", tmp_path / "found", "--quiet") == 0
    found = json.loads((tmp_path / "found" / "info.json").read_text())
    assert found["units"] == "um" and found["pixel_size_um"] == pytest.approx(0.5, rel=1e-4)
    height = tifffile.imread(tmp_path / "found" / "height.tif")
    # Positions in the file start at 0, those of the scene below its lowest point.
    error = height + info["height_of_first_frame_um"] - truth
    assert np.nanmedian(np.abs(error)) < 0.15 * info["z_step_um"]
    assert np.isfinite(error).mean() > 0.95


def test_a_falling_simulation_is_reconstructed_by_its_positions_or_its_direction(tmp_path, capsys):
    out = tmp_path / "sim"
    scene = ("--surface", "waves", "--height", 64, "--width", 72, "--frames", 12, "--relief", 20)
    assert run("simulate", out, *scene, "--z-direction", "down", "--quiet") == 0
    truth, info = simulated(out)
    positions = info["focus_positions_um"]
    words = ("reconstruct", out / "stack.tif", "--quiet")
    by_positions = ("--focus-positions-um", str(positions))
    by_direction = ("--z-direction", info["z_direction"])
    assert run(*words, *by_positions, "-o", tmp_path / "a") == 0
    assert run(*words, *by_direction, "-o", tmp_path / "b") == 0
    for name, offset in (("a", 0), ("b", info["height_of_first_frame_um"])):
        error = tifffile.imread(tmp_path / name / "height.tif") + offset - truth
        assert np.nanmedian(np.abs(error)) < 0.3 * info["z_step_um"]
    assert run(*words, *by_positions, *by_direction, "-o", tmp_path / "c") == 1
    assert "z_direction must be 'up'" in capsys.readouterr().err


def test_several_stacks_differ_and_a_seed_repeats(tmp_path, capsys):
    words = ("--height", 40, "--width", 40, "--frames", 3, "--quiet", "--format", "png")
    more = ("--bit-depth", 12, "--z-direction", "down", "--jitter-px", 0.3, "--gain-drift", 0.01)
    assert run("simulate", tmp_path / "a", "--count", 2, *words, *more) == 0
    shown = capsys.readouterr().out.split()
    assert shown == [str(tmp_path / "a" / name / "frames") for name in ("000", "001")]
    first, info = simulated(tmp_path / "a/000")
    assert not np.array_equal(first, simulated(tmp_path / "a/001")[0])
    assert info["z_direction"] == "down"
    frames = sorted((tmp_path / "a/000/frames").iterdir())
    assert [f.name for f in frames] == ["f000.png", "f001.png", "f002.png"]
    pixels = cv2.imread(str(frames[0]), cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.uint16 and pixels.shape == (40, 40)
    # The second of the first run is the first of a run with the next seed; and over it again.
    for _ in range(2):
        again = ("--seed", 1, "--overwrite")
        assert run("simulate", tmp_path / "b", *words, *more, *again) == 0
    for name in ("frames/f001.png", "height.tif", "all_in_focus.png"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a/001" / name).read_bytes()


def test_surfaces_and_pictures_from_files_are_simulated_at_their_scale(tmp_path):
    y, x = np.mgrid[:80, :100]
    np.savez(tmp_path / "bumps.npz", h_um=3 * np.sin(x / 9) * np.cos(y / 7), dx_um=2.0)
    cv2.imwrite(str(tmp_path / "picture.png"), ((x * 7 + y * 3) % 200).astype(np.uint8))
    config = tmp_path / "scene.yaml"
    config.write_text(
        f"surface: {tmp_path / 'bumps.npz'}\ntexture: {tmp_path / 'picture.png'}\n"
        "height: 64\nwidth: 64\nframes: 4\npixel_size_um: 2.0\nz_step_um: 1.5\npsf: wave\n"
        "light: ring\ngloss: 0.5\nvignetting: 0.2\nmagnification_change: 0.01\nquiet: true\n"
    )
    assert run("simulate", tmp_path / "out", "--config", config) == 0
    truth, info = simulated(tmp_path / "out")
    assert 5 < np.ptp(truth) < 6.5
    assert np.diff(info["focus_positions_um"]) == pytest.approx([1.5] * 3)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "out"),
        (["--psf", "box"], 2, "psf"),
        (["--surface", "moon"], 1, "surface: expected a file or one of cells"),
        (["--surface", "moon.npz"], 1, "moon.npz: no such file"),
        (["--texture", "wool"], 1, "texture: expected a picture or one of bare"),
        (["--na", 1.2], 1, "numerical_aperture: expected"),
        (["--frames", 1], 1, "frames: expected at least 2"),
        (["--count", 0], 1, "--count: expected at least 1"),
        (["--z-step", -1], 1, "z_step_um: expected a positive number"),
        (["--bit-depth", 20], 1, "bit_depth: expected 8..16"),
        (["--pixel-size", "null"], 1, "--pixel-size-um"),
    ],
)
def test_a_simulation_that_fails_says_why_and_leaves_nothing(
    words, code, message, tmp_path, capsys
):
    out = [tmp_path / "out"] if words else []
    assert run("simulate", *out, *words, "--quiet") == code
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err and shown.out == ""
    assert not list(tmp_path.iterdir())


def test_a_simulation_does_not_replace_what_is_there_unasked(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run("simulate", tmp_path, "--quiet") == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]
