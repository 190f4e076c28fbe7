"""Writes the figures of benchmarks/results into README.md; with --check only compares.

The text between the comments of each section is made from the JSON files and nothing else.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.paper import TABLE_7
from benchmarks.summary import (
    FEATURES,
    NAMES_OF_NETWORKS,
    NAMES_OF_TRAINED,
    fastest,
    load,
    lower_by,
    medians,
    times_gplws,
    voxels,
    with_interval,
)
from gplws.tiling import DEFAULT_MEMORY_MB

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- {}: made by python -m benchmarks.readme -->"
END = "<!-- end of {} -->"
SHAPE = "10x512x512"
DEFAULT_MB = int(DEFAULT_MEMORY_MB)
NAMES = {
    "gplws": "gplws",
    "eager": "torch eager",
    "eager channels_last": "torch eager, channels_last",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
GPU_PRECISIONS = ("bfloat16", "float16", "float32")
GPU_COLUMNS = {
    "gplws": "gplws, CUDA graph",
    "stock": "stock torch, fastest eager setting",
    "tf32": "the same with TF32",
    "compile": "torch.compile, max-autotune",
    "peer": "fastest published network",
}
_SHOWN = ("gplws", "rdf", "rr")  # methods with a column of their own in the table of errors
_WITHOUT_SEARCH = " Their times end at the depth map, those of gplws at the focus volume."
ISAS = {"baseline": "no AVX", "avx2": "AVX2", "avx512": "AVX-512"}


def sections(folder: Path | None = None) -> dict[str, str]:
    """The parts of the README that come from the results of ``folder``, by name."""
    found = {"speed": _speed(folder), "accuracy": _accuracy(folder)}
    # Neither tables, titles nor shapes are broken.
    wrap = textwrap.TextWrapper(100, break_on_hyphens=False, break_long_words=False)
    return {
        name: "\n\n".join(p if p.startswith(("|", "#")) else wrap.fill(p) for p in parts)
        for name, parts in found.items()
    }


def _speed(folder: Path | None) -> list[str]:
    parts = []
    latency = load("latency", folder)
    if latency:
        rows = [row for row in latency["rows"] if row["shape"] == SHAPE and row["seconds"]]
        ours = [row for row in rows if row["network"] == "gplws"]
        machine = latency["machine"]
        parts.append(
            f"One stack of {SHAPE.replace('x', ' x ')} through the network of the paper, 540,273 "
            f"parameters, from frames to focus volume, {_words(machine)}; seconds, median of "
            "candidates taking turns in one run, and times gplws:"
        )
        parts.append(_engines_table(ours))
        if len(rows) > len(ours):
            parts.append(
                "Published networks, to the depth map, each in the fastest of its settings; "
                "seconds, and times gplws, to the depth map as well, in turns with it:"
            )
            parts.append(_networks_table(rows))
        parts += _table_7(latency)
    methods = load("methods", folder)
    if methods:
        parts += _whole(methods)
    flat = load("flatness", folder)
    if flat:
        parts.append(_flatness_sentence(flat))
    memory = load("memory", folder)
    if memory:
        parts.append(_memory_sentence(memory))
    accelerated = load("accelerate", folder)
    if accelerated:
        parts += _accelerated(accelerated, latency)
    ablation = load("ablation", folder)
    if ablation:
        parts += _ablation(ablation)
    gpu = load("gpu", folder)
    parts += _gpu(gpu) if gpu else ["No figure from a GPU is known yet."]
    return parts


def _whole(found: dict[str, Any]) -> list[str]:
    """Seconds of whole reconstructions."""
    times = [medians(row["seconds"]) for row in found["rows"]]
    names = [name for name in times[0] if all(name in one for one in times)]
    lines = [["", *(f"`{name}`" for name in names)]]
    for row, one in zip(found["rows"], times, strict=True):
        lines.append([row["shape"].replace("x", " x "), *(f"{one[name]:.2f}" for name in names)])
    said = (
        "Whole reconstructions, from frames in memory to maps in memory, "
        f"{_words(found['machine'])}; seconds, all methods taking turns (`python -m "
        "benchmarks.methods`). `gplws` is the network that ships, with its features and classical "
        "steps, which stay in float32:"
    )
    return [said, _table(lines)]


def _accuracy(folder: Path | None) -> list[str]:
    parts = []
    methods = load("accuracy", folder)
    if methods:
        parts += _methods(methods)
    trained = load("accuracy_trained", folder)
    if trained:
        parts += _trained(trained)
    return parts


def _methods(found: dict[str, Any]) -> list[str]:
    """Mean errors of the shipped network, of some classical methods and of the best of all."""
    means = {(row["data"], row["method"]): row["frames"]["mae_frames"] for row in found["means"]}
    sets = list(dict.fromkeys(data for data, _ in means))
    methods = list(dict.fromkeys(method for _, method in means))
    shares = {
        row["data"]: row["mae_frames"]
        for row in found.get("against_classical", ())
        if row["method"] == "gplws"
    }
    shown = [method for method in _SHOWN if method in methods]
    others = [method for method in methods if method != "gplws"]
    lines = [["", *shown, "best classical", *(["gplws / best"] if shares else [])]]
    for data in sets:
        errors = {m: round(means[data, m], 3) for m in methods if means.get((data, m)) is not None}
        best = min((m for m in others if m in errors), key=errors.__getitem__)
        least = min(errors.values())
        bold = {m: f"**{e:.3f}**" if e == least else f"{e:.3f}" for m, e in errors.items()}
        cells = [bold.get(method, "") for method in shown] + [f"{bold[best]} `{best}`"]
        if data in shares:
            cells.append(with_interval(shares[data], 2))
        lines.append([data, *cells])
    said = (
        f"Mean error in frames, every pixel counted, the smallest in bold; the best of "
        f"{len(others)} classical methods. The levels are "
        f"{found['count']} simulated stacks each, of surfaces and textures that the weights have "
        "never seen, under conditions that training draws as well: three in five of its last "
        "steps saw noisy or weak stacks. benchmarks/README.md has the command and the data. "
        "The others are stacks rendered from Middlebury scenes and the generated stacks of Cou and "
        "Guennebaud (2023). The last column has 95% intervals over the stacks:"
    )
    return [said, _table(lines)]


def _gpu(found: dict[str, Any]) -> list[str]:
    """The network and whole reconstructions on a GPU, under a title of their own."""
    device, shape = found["device"], found["shape"]
    versions = {"driver": device["driver"], "CUDA": device["cuda"], "cuDNN": device.get("cudnn")}
    versions["torch"] = found["machine"]["torch"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    rows = [row for row in found["rows"] if row["shape"] == shape]
    measured = {p: _on_gpu(rows, p) for p in GPU_PRECISIONS}
    measured = {precision: mine for precision, mine in measured.items() if "gplws" in mine}
    parts = ["### On a GPU"]
    where = f"{device['gpu']} ({said})"
    if measured:
        columns = [c for c in GPU_COLUMNS if any(c in mine for mine in measured.values())]
        lines = [["", *(GPU_COLUMNS[column] for column in columns)]]
        for precision, mine in measured.items():
            cells = [_milliseconds(mine.get(c), mine["gplws"][1]) for c in columns]
            lines.append([precision, *cells])
        parts.append(
            f"The same network at {shape.replace('x', ' x ')} on one {where}; milliseconds, and "
            "times gplws:"
        )
        parts.append(_table(lines))
    else:
        parts.append(f"On one {where}:")
    for precision, mine in measured.items():
        peers = _peers_on_gpu(rows, precision)
        listed = ", ".join(
            f"{name} {1e3 * seconds:.1f} ms ({seconds / (beside or mine['gplws'][1]):.1f}x)"
            for seconds, name, beside in peers
        )
        if listed:
            parts.append(
                f"Published networks there, {precision}, each in its fastest setting: {listed}."
                + ("" if all(beside for *_, beside in peers) else _WITHOUT_SEARCH)
            )
    rates = []
    for row in rows:
        if row["part"] == "stream" and row["rates"]:
            what = "the network of the paper" if row["what"] == "network" else row["what"]
            each = {name: rate["stacks_per_second"] for name, rate in row["rates"].items()}
            said = f"{max(each.values()):.0f} a second with {what} in {row['precision']}"
            single = each.get("reconstruct")
            rates.append(said + (f" ({single:.0f} a second one by one)" if single else ""))
    if rates:
        parts.append(
            "Stacks from 8-bit frames on the host to a height map on the host "
            f"(`reconstruct_stream`): {', '.join(rates)}."
        )
    lacking = _lacking_on_gpu(found)
    return [*parts, lacking] if lacking else parts


def _lacking_on_gpu(found: dict[str, Any]) -> str:
    """Which goals were not reached, and whether torch.compile was not measured, in a sentence."""
    missed: dict[str, list[str]] = {}
    for goal in found.get("goals", ()):
        if goal["met"]:
            continue
        subject, *case = goal["what"].split(", ")  # op and precision, layer, shape
        form = "{:.0%}" if goal["against"].startswith("share") else "{:.2f}"
        aim = f"{subject} missed the goal of {form.format(goal['goal'])} ({goal['against']}"
        reached = form.format(goal["reached"])
        missed.setdefault(aim, []).append(" ".join((*case[:1], reached)))
    said = [f"{aim}: {', '.join(reached)})" for aim, reached in missed.items()]
    if any(one["unit"].startswith("compile") for one in found.get("failed", ())):
        said.append("torch.compile was not measured")
    return f"In that run {'; '.join(said)}." if said else ""


def _on_gpu(rows: list[dict[str, Any]], precision: str) -> dict[str, tuple[str, float]]:
    """Setting and seconds for each column of the table."""
    found: dict[str, tuple[str, float]] = {}

    def fastest_of(column: str, times: dict[str, float]) -> None:
        if times:
            name = min(times, key=lambda name: times[name])
            found[column] = (name, times[name])

    for row in rows:
        if row["part"] not in ("network", "compile") or row["precision"] != precision:
            continue
        times = medians(row["seconds"])
        if row["part"] == "compile":
            fast = [s for n, s in times.items() if n.startswith("compile") and "tf32" not in n]
            if fast:
                found["compile"] = ("", min(fast))
            continue
        stock = {name: s for name, s in times.items() if not name.startswith("gplws")}
        if "gplws graph" in times:
            found["gplws"] = ("", times["gplws graph"])
        fastest_of("stock", {n: s for n, s in stock.items() if not n.endswith("tf32")})
        fastest_of("tf32", {n.removesuffix(" tf32"): s for n, s in stock.items() if "tf32" in n})
    fastest_of("peer", {name: seconds for seconds, name, _ in _peers_on_gpu(rows, precision)})
    return found


def _peers_on_gpu(
    rows: list[dict[str, Any]], precision: str
) -> list[tuple[float, str, float | None]]:
    """Published networks in their fastest settings, the fastest first; gplws to depth beside."""
    found = []
    for row in rows:
        if row["part"] != "peers" or row["precision"] != precision:
            continue
        times = medians(row["seconds"])
        ours = times.pop("gplws graph", None)
        if times:
            found.append((min(times.values()), NAMES_OF_NETWORKS[row["what"]], ours))
    return sorted(found, key=lambda peer: peer[0])


def _milliseconds(measured: tuple[str, float] | None, ours: float) -> str:
    """A cell: the setting, milliseconds, times gplws; empty where nothing was measured."""
    if measured is None:
        return ""
    name, seconds = measured
    text = f"{1e3 * seconds:.2f}"
    if seconds == ours:
        return f"**{text}**"
    return f"{text} ({seconds / ours:.1f}x)" + (f", {name}" if name else "")


def _words(machine: dict[str, Any]) -> str:
    threads = "one core" if machine["threads"] == 1 else f"{machine['threads']} cores"
    return f"{threads} of an {machine['processor']} with {ISAS[machine['cpu_isa']]}"


def _engines_table(rows: list[dict[str, Any]]) -> str:
    engines = [name for name in NAMES if any(name in row["seconds"] for row in rows)]
    lines = [["", *(NAMES[engine] for engine in engines)]]
    for row in rows:
        found = medians(row["seconds"])
        cells = [row["precision"]]
        for engine in engines:
            cells.append(_cell(found.get(engine), found["gplws"]))
        lines.append(cells)
    return _table(lines)


def _networks_table(rows: list[dict[str, Any]]) -> str:
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    found = {p: (fastest(rows, p), times_gplws(rows, p)) for p in precisions}
    lines = [["", *precisions]]
    for network, name in NAMES_OF_NETWORKS.items():
        cells = []
        for seconds, ratios in found.values():
            own = seconds.get(SHAPE, {}).get(network)
            ratio = ratios.get(SHAPE, {}).get(network)
            if own is None or ratio is None:
                cells.append("")
            else:
                best = network == "gplws"
                cells.append(f"**{own:.2f}**" if best else f"{own:.2f} ({ratio:.1f}x)")
        if any(cells):
            lines.append([name + (" on gplws" if network == "gplws" else ""), *cells])
    return _table(lines)


def _table_7(latency: dict[str, Any]) -> list[str]:
    """Time saved against each network, for the shapes at which all of them were measured."""
    ratios = times_gplws(latency["rows"], "float32")
    shapes = [
        shape for shape in TABLE_7 if NAMES_OF_NETWORKS.keys() <= ratios.get(shape, {}).keys()
    ]
    if not shapes:
        return []
    lines = [["", *(shape.replace("x", " x ") for shape in shapes)]]
    for network, name in NAMES_OF_NETWORKS.items():
        if network != "gplws":
            cells = []
            for shape in shapes:
                percent = lower_by(ratios[shape][network])
                cells.append(f"{percent:.0f}% ({TABLE_7[shape][network].lower_by:.0f}%)")
            lines.append([name, *cells])
    said = (
        "How much less time GPLWS-Net takes (float32), and in brackets what Table 7 of the paper "
        "prints, on a Xeon Silver 4210:"
    )
    return [said, _table(lines)]


def _ablation(ablation: dict[str, Any]) -> list[str]:
    """What each choice of the paper's ablation costs, and what it does to the error."""
    rows = ablation["rows"]
    timed = all(row.get("seconds") for row in rows)
    trained = all(row.get("trained") for row in rows)
    engines = [name for name in NAMES if timed and all(name in row["seconds"] for row in rows)]
    head = ["", "parameters (paper)", "GMAC", *(f"{NAMES[engine]}, s" for engine in engines)]
    head += ["MSE (paper)"] if trained else []
    lines = [head]
    for row in rows:
        # Table 2 is of another layout, so it comes last.
        printed = row["printed"].get("1") or row["printed"].get("3") or row["printed"]["2"]
        cells = [f"{row['parameters']:,} ({printed['parameters']:,})", f"{row['gmac']:.1f}"]
        found = medians(row["seconds"]) if timed else {}
        cells += [f"{found[engine]:.2f}" for engine in engines]
        if trained:
            errors = [run["depth"]["mse"] for run in row["trained"]]
            cells.append(f"{sum(errors) / len(errors):.4f} ({printed['mse']:.4f})")
        lines.append([row["variant"], *cells])
    said = (
        f"The ablation of the paper's Tables 1 to 3 at {ablation['shape'].replace('x', ' x ')}, "
        f"float32, {_words(ablation['machine'])}. The paper prints the counts of dense and "
        f"depthwise convs for a smaller layout; concatenation and the 1x1x1 conv behind it run on "
        f"stock torch in all forms:"
    )
    if trained:
        runs = rows[0]["trained"]
        said = said[:-1] + (
            f". Errors are those after {runs[0]['steps']} steps on simulated stacks, the paper's "
            f"those after its full training on 4D Light Field:"
        )
    return [said, _table(lines)]


def _trained(accuracy: dict[str, Any]) -> list[str]:
    """Errors of the networks that were trained with one budget."""
    means = {(row["data"], row["method"]): row for row in accuracy["means"]}
    sets = list(dict.fromkeys(data for data, _ in means))
    runs = {run["network"]: run for run in accuracy["runs"] if "steps" in run}
    methods = [*runs, *(m for m in dict.fromkeys(m for _, m in means) if m not in runs)]
    lines = [["", "steps", *sets]]
    for method in methods:
        cells = []
        for data in sets:
            row = means.get((data, method))
            cells.append("" if row is None else f"{row['frames']['mae_frames']:.2f}")
        steps = f"{runs[method]['steps']:,}" if method in runs else ""
        lines.append([NAMES_OF_TRAINED.get(method, method), steps, *cells])
    recipe = accuracy["recipe"]
    budget = (
        f"{recipe['steps']:,} steps"
        if recipe["steps"] is not None
        else f"{recipe['minutes']:g} minutes"
    )
    said = (
        f"Mean error in frames of networks trained with one budget, {budget} of "
        f"{recipe['batch_size']} simulated stacks {recipe['frames']}x{recipe['crop']}x"
        f"{recipe['crop']} and the loss {recipe['loss']}, {_words(accuracy['machine'])}, on "
        f"{accuracy['count']} stacks of each level; in the form of the paper's Tables 4 to 6 by "
        f"`python -m benchmarks.accuracy`. GPLWS-Net is that of the paper, it sees the frames as "
        f"they are; {NAMES_OF_TRAINED[FEATURES]} is that of the preset `default`, whose weights "
        'after a longer training are those of `method="gplws"`:'
    )
    return [said, _table(lines)]


def _cell(seconds: float | None, ours: float) -> str:
    if seconds is None:
        return ""
    return f"**{seconds:.2f}**" if seconds == ours else f"{seconds:.2f} ({seconds / ours:.1f}x)"


def _table(lines: list[list[str]]) -> str:
    header, *body = ("| " + " | ".join(line).lstrip() + " |" for line in lines)
    return "\n".join([header, "|---" * len(lines[0]) + "|", *body])


def _flatness_sentence(flat: dict[str, Any]) -> str:
    what = {"frames": "number of frames", "size": "size"}
    said = []
    for row in flat["rows"]:
        if row["precision"] == "float32":
            shapes = sorted(row["ns_per_voxel"], key=voxels)
            share = f"{100 * row['largest_deviation']:.1f}%"
            said.append(f"{share} over {what[row['over']]} ({shapes[0]} to {shapes[-1]})")
    return f"The cost per voxel (float32) strays from its median by at most {' and '.join(said)}."


def _memory_sentence(memory: dict[str, Any]) -> str:
    rows = [row for row in memory["rows"] if row["precision"] == "float32"]
    parts = [
        f"{row['candidate']} {row['peak_mib']:.0f} MiB"
        + (f" with `memory_mb={row['memory_mb']}`" if row["memory_mb"] else "")
        for row in rows
        if row["memory_mb"] in (DEFAULT_MB, None)
    ]
    shape = rows[0]["shape"].replace("x", " x ")
    return (
        f"Peak memory of `reconstruct` at {shape}, gplws with the weights that ship, against one "
        f"forward pass of that network on stock torch: {', '.join(parts)}."
    )


def _accelerated(found: dict[str, Any], latency: dict[str, Any] | None) -> list[str]:
    rows = [row for row in found["rows"] if row["shape"] == SHAPE]
    if not rows:
        return []
    engines = {
        row["network"]: medians(row["seconds"]).get("openvino")
        for row in (latency or {"rows": ()})["rows"]
        if row["shape"] == SHAPE and row["precision"] == "float32"
    }
    single = [
        NAMES_OF_NETWORKS[row["network"]]
        for row in rows
        if min(map(len, row["seconds"].values())) < 2
    ]
    lines = [["", "stock torch", "accelerated", "OpenVINO", "difference"]]
    for row in sorted(rows, key=lambda row: list(NAMES_OF_NETWORKS).index(row["network"])):
        seconds = medians(row["seconds"])
        ours = seconds.pop("accelerated")
        best = min(seconds.values())
        after = f"**{ours:.2f}** ({best / ours:.2f}x)"
        name = NAMES_OF_NETWORKS[row["network"]]
        other = engines.get(row["network"])
        exported = "" if other is None else f"{other:.2f}"
        lines.append([name, f"{best:.2f}", after, exported, f"{row['error']:.0e}"])
    said = (
        f"`gplws.accelerate` on one stack of {SHAPE.replace('x', ' x ')}, float32, "
        f"{_words(found['machine'])}: seconds on stock torch in the faster of its memory formats, "
        "seconds after, seconds on OpenVINO (which needs an export; measured in another run), and "
        "the largest difference of the results to stock torch as a share of the largest value"
        + (f". {', '.join(single)} was timed once:" if single else ":")
    )
    return [said, _table(lines)]


def with_sections(text: str, made: dict[str, str]) -> str:
    """``text`` of the README with what is between the comments of each section replaced."""
    for name, content in made.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise SystemExit(f"README.md must hold {begin} and {end}")
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the README differs")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    made = with_sections(text, sections())
    if options.check:
        sys.exit(0 if made == text else "README.md differs: run python -m benchmarks.readme")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
