"""What the README says of speed and memory is what was measured."""

import json
from pathlib import Path

import pytest
from repository_runs import run

from benchmarks.readme import sections
from benchmarks.summary import flatness, quartiles

pytestmark = pytest.mark.no_cpu_kernels


def test_the_figures_of_the_readme_are_those_of_the_results(repository: Path) -> None:
    ended = run(repository, "-m", "benchmarks.readme", "--check")
    assert ended.returncode == 0, ended.stderr


def test_the_fastest_setting_and_the_ratios_come_from_the_medians(tmp_path) -> None:
    machine = {"processor": "Z80", "threads": 1, "cpu_isa": "avx2"}
    seconds = {"gplws": [9.0, 1.0, 2.0], "eager": [8.0, 8.0, 8.0], "openvino": [3.0]}
    peers = {"eager": [10.0], "eager channels_last": [6.0]}
    shape = {"precision": "float32", "shape": "10x512x512"}
    rows = [
        {"network": "gplws", "seconds": seconds, **shape},
        {"network": "fvnet", "seconds": peers, **shape},
        {"network": "gplws", "seconds": {"gplws": [99.0]}, **shape, "shape": "5x256x256"},
    ]
    write(tmp_path, "latency", machine=machine, rows=rows)
    shown = section(tmp_path)
    assert "one core of an Z80 with AVX2" in shown
    assert "| | gplws | torch eager | OpenVINO |" in shown
    assert "| float32 | **2.00** | 8.00 (4.0x) | 3.00 (1.5x) |" in shown
    assert "| FVNet | 6.00 (3.0x) |" in shown
    assert "99" not in shown


def test_flatness_is_the_largest_deviation_from_the_median_cost_per_voxel(tmp_path) -> None:
    times = {
        f"{frames}x256x256": [cost * 1e-9 * frames * 256 * 256]
        for frames, cost in ((10, 120), (5, 100), (50, 90))
    }
    found = flatness(times)
    assert found["median_ns_per_voxel"] == pytest.approx(100)
    assert found["largest_deviation"] == pytest.approx(0.2)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 4.0)

    write(tmp_path, "flatness", rows=[{"precision": "float32", "over": "frames", **found}])
    expected = "at most 20.0% over number of frames (5x256x256 to 50x256x256)."
    assert expected in " ".join(section(tmp_path).split())


def test_a_network_is_set_against_the_gplws_of_its_own_turns(tmp_path) -> None:
    shape = {"precision": "float32", "shape": "10x512x512"}
    rows = [
        {"network": "gplws", "seconds": {"gplws": [2.0]}, **shape},
        {"network": "fvnet", "seconds": {"eager": [6.0]}, "gplws_beside": [4.0, 1.0], **shape},
    ]
    machine = {"processor": "Z80", "threads": 1, "cpu_isa": "avx2"}
    write(tmp_path, "latency", machine=machine, rows=rows)
    assert "| FVNet | 6.00 (2.4x) |" in section(tmp_path)


def test_the_tables_of_the_paper_come_with_its_figures(tmp_path) -> None:
    machine = {"processor": "Z80", "threads": 1, "cpu_isa": "avx2"}
    names = ["gplws", "fvnet", "dfvnet", "aifdepthnet", "ddffnet", "defocusnet"]
    rows = [
        {
            "network": name,
            "precision": "float32",
            "shape": shape,
            "seconds": {"gplws": [2.0]} if name == "gplws" else {"eager": [8.0], "openvino": [5.0]},
        }
        for shape in ("10x512x512", "5x256x256")
        for name in names
        if (shape, name) != ("5x256x256", "ddffnet")  # a shape that is not complete
    ]
    write(tmp_path, "latency", machine=machine, rows=rows)
    row = {
        "variant": "add, conv, plain",
        "printed": {"2": {"parameters": 1000, "seconds": 1.0, "mse": 0.5}},
        "parameters": 2000,
        "gmac": 3.14,
        "seconds": {"gplws": [0.5], "eager channels_last": [1.0, 3.0]},
    }
    write(tmp_path, "ablation", machine=machine, shape="1x2x3", rows=[row])
    run_of = {"network": "gplws", "steps": 1200, "minutes": 3.0}
    mean = {"data": "simulated", "method": "gplws", "frames": {"mae_frames": 0.25}}
    recipe = {"steps": 1200, "minutes": None, "batch_size": 2, "frames": 7, "crop": 32}
    write(
        tmp_path,
        "accuracy_trained",
        machine=machine,
        runs=[run_of],
        means=[mean, {**mean, "method": "rdf", "frames": {"mae_frames": 0.75}}],
        recipe={**recipe, "loss": "l1"},
        count=5,
    )
    shown = section(tmp_path)
    assert "| | 10 x 512 x 512 |" in shown
    assert "| DefocusNet | 60% (47%) |" in shown
    assert "| add, conv, plain | 2,000 (1,000) | 3.1 | 0.50 | 2.00 |" in shown
    assert "720" not in shown and "full training" not in shown
    assert "on 5 stacks of each level" in " ".join(shown.split())
    assert "| GPLWS-Net | 1,200 | 0.25 |" in shown and "| rdf |  | 0.75 |" in shown

    row["trained"] = [{"steps": 9, "depth": {"mse": error}} for error in (0.1, 0.3)]
    write(tmp_path, "ablation", machine=machine, shape="1x2x3", rows=[row])
    shown = section(tmp_path)
    assert "| add, conv, plain | 2,000 (1,000) | 3.1 | 0.50 | 2.00 | 0.2000 (0.5000) |" in shown
    assert "after 9 steps" in shown


def test_the_most_accurate_method_of_a_level_is_in_bold(tmp_path) -> None:
    errors = {
        ("easy", "gplws"): 0.25,
        ("easy", "rr"): 0.5,
        ("new", "gplws"): 0.75,
        ("new", "rr"): 0.7,
    }
    means = [
        {"data": data, "method": method, "frames": {"mae_frames": error}}
        for (data, method), error in errors.items()
    ]
    share = {"best": "rr", "share": 0.5, "interval": [0.444, 0.556]}
    shares = [
        {"data": "easy", "method": "gplws", "mae_frames": share},
        {
            "data": "new",
            "method": "gplws",
            "mae_frames": {**share, "share": 1.07, "interval": None},
        },
        {"data": "new", "method": "other", "mae_frames": {**share, "share": 9.0}},
    ]
    write(tmp_path, "accuracy", count=12, means=means, against_classical=shares)
    shown = section(tmp_path)
    assert "| | gplws | rr | best classical | gplws / best |" in shown
    assert "12 simulated stacks" in " ".join(shown.split())
    assert "| easy | **0.250** | 0.500 | 0.500 `rr` | 0.50 (0.44 to 0.56) |" in shown
    assert "| new | 0.750 | **0.700** | **0.700** `rr` | 1.07 |" in shown


def test_accelerated_networks_are_compared_with_the_faster_stock_format(tmp_path) -> None:
    machine = {"processor": "Z80", "threads": 1, "cpu_isa": "avx2"}
    seconds = {
        "eager": [4.0, 4.0],
        "eager channels_last": [3.0] * 2,
        "accelerated": [9.0, 1.0, 2.0],
    }
    row = {"network": "fvnet", "seconds": seconds, "error": 3.2e-05}
    rows = [{**row, "shape": "10x512x512"}, {**row, "shape": "10x256x256", "network": "gplws"}]
    write(tmp_path, "accelerate", machine=machine, rows=rows)
    shown = section(tmp_path)
    assert "| FVNet | 3.00 | **2.00** (1.50x) |  | 3e-05 |" in shown
    assert "GPLWS-Net" not in shown and "timed once" not in shown
    once = {**rows[0], "seconds": {"eager": [4.0], "accelerated": [2.0]}}
    write(tmp_path, "accelerate", machine=machine, rows=[once])
    other = {"network": "fvnet", "precision": "float32", "shape": "10x512x512"}
    other["seconds"] = {"openvino": [1.5]}
    write(tmp_path, "latency", machine=machine, rows=[other])
    shown = section(tmp_path)
    assert "| FVNet | 4.00 | **2.00** (2.00x) | 1.50 | 3e-05 |" in shown
    assert "FVNet was timed once:" in " ".join(shown.split())


def test_whole_reconstructions_have_a_column_for_each_method(tmp_path) -> None:
    machine = {"processor": "Z80", "threads": 1, "cpu_isa": "avx2"}
    rows = [
        {"shape": "10x512x512", "seconds": {"rdf": [0.3, 0.1, 0.2], "gplws": [1.0]}},
        {"shape": "5x64x64", "seconds": {"rdf": [0.04], "gplws": [0.5]}},
    ]
    write(tmp_path, "methods", machine=machine, rows=rows)
    shown = section(tmp_path)
    assert "| | `rdf` | `gplws` |" in shown
    assert "| 10 x 512 x 512 | 0.20 | 1.00 |" in shown and "| 5 x 64 x 64 | 0.04 | 0.50 |" in shown


def test_figures_of_a_gpu_are_shown_with_its_name(tmp_path) -> None:
    row = {"shape": "10x512x512", "precision": "bfloat16"}
    exact = {**row, "precision": "float32"}
    seconds = {
        "gplws": [1e-5],
        "gplws graph": [5e-4],
        "eager": [4e-3, 2e-3, 3e-3],
        "eager graph": [2e-3],
    }
    tf32 = {"gplws graph": [1e-3], "eager": [4e-3], "eager graph tf32": [3e-3], "eager tf32": [9.0]}
    other = {"gplws graph": [9.0], "compile max-autotune": [1e-3]}
    peer = {"eager": [9e-3], "autocast": [6e-3]}
    to_depth = {"eager": [7e-3], "gplws graph": [7e-4]}
    write(
        tmp_path,
        "gpu",
        machine={"torch": "2.11"},
        device={"gpu": "NVIDIA Z80", "driver": "580.1", "cuda": "13.0", "cudnn": 91900},
        shape="10x512x512",
        rows=[
            {**exact, "part": "network", "seconds": tf32},
            {**row, "part": "network", "seconds": seconds},
            {**row, "part": "network", "seconds": {"gplws graph": [7.0]}, "shape": "1x2x3"},
            {**row, "part": "compile", "seconds": other},
            {**row, "part": "peers", "what": "fvnet", "seconds": peer},
            {**row, "part": "peers", "what": "ddffnet", "seconds": to_depth},
            {**row, "part": "peers", "what": "dfvnet", "seconds": {"eager graph": [5e-3]}},
            {**row, "part": "peers", "what": "defocusnet", "seconds": {}},
            {
                **row,
                "part": "stream",
                "what": "network",
                "rates": {
                    "a": {"stacks_per_second": 400.4},
                    "reconstruct": {"stacks_per_second": 250.0},
                },
            },
        ],
    )
    shown = section(tmp_path)
    lines = [" ".join(line.split()) for line in shown.split("\n\n")]
    assert "### On a GPU" in lines
    facts = "(driver 580.1, CUDA 13.0, cuDNN 91900, torch 2.11)"
    assert f"on one NVIDIA Z80 {facts}; milliseconds" in " ".join(lines)
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert table == [
        "| | gplws, CUDA graph | stock torch, fastest eager setting | the same with TF32 "
        "| torch.compile, max-autotune | fastest published network |",
        "|---" * 6 + "|",
        "| bfloat16 | **0.50** | 2.00 (4.0x), eager graph |  | 1.00 (2.0x) "
        "| 5.00 (10.0x), DFVNet |",
        "| float32 | **1.00** | 4.00 (4.0x), eager | 3.00 (3.0x), eager graph |  |  |",
    ]
    assert "DFVNet 5.0 ms (10.0x), FVNet 6.0 ms (12.0x), DDFFNet 7.0 ms (10.0x). Their" in " ".join(
        lines
    )
    assert "400 a second with the network of the paper in bfloat16" in " ".join(lines)
    assert "250 a second one by one" in " ".join(lines)
    assert "No figure from a GPU" not in shown


def test_without_figures_of_a_gpu_the_readme_says_so(tmp_path) -> None:
    assert section(tmp_path).strip() == "No figure from a GPU is known yet."


def write(folder: Path, name: str, **content: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def section(folder: Path) -> str:
    return "\n\n".join(sections(folder).values())
