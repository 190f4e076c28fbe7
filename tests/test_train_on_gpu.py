"""A preset is trained for a time, in several calls, and its weights are exported."""

import json
from pathlib import Path

from train_on_gpu import configured, run

import gplws

TINY = """
model: {name: gplws, arguments: {widths: [4, 8], depths: [1, 1], middle: 1, decoder_depths: [1]}}
data:
  sources: [{factory: "gplws.data.generator:StackGenerator", arguments: {seed: 0}}]
  validation: [{factory: "gplws.data.generator:StackGenerator", name: simulated, count: 1}]
  batch_size: 1
  frames: [4, 4]
  crop: 32
checkpoints: {log_steps: 1}
"""


def test_the_length_of_the_run_is_a_time_and_all_else_the_preset() -> None:
    config = configured("default", 24.0, 14, None)
    assert config.schedule.max_minutes == 24 and config.schedule.follow_time
    assert config.schedule.steps is None and config.schedule.warm_up == 0.03
    assert config.data.workers == 14 and config.data.ahead >= 14
    assert config.model.arguments["stem"] == "features" and config.data.batch_size == 4
    assert configured("default", 1.0, 1, 16).data.batch_size == 16


def test_several_calls_make_one_run_with_weights_after_each(tmp_path: Path) -> None:
    preset = tmp_path / "tiny.yaml"
    preset.write_text(TINY)
    folder = tmp_path / "run"
    config = configured(str(preset), 0.08, 0, None)
    first = run(config, folder, 0.04, "cpu")
    assert first.reason == "interrupted" and first.step > 0
    assert gplws.load_model("gplws", weights=folder / "gplws.safetensors") is not None
    second = run(config, folder, 5.0, "cpu")
    assert second.reason == "done" and second.step > first.step
    assert "| simulated |" in (folder / "gplws.md").read_text()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["validation"].keys() == {"simulated"}
