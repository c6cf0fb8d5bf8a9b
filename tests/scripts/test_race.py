"""scripts/race.py: the mark is what the example had reached by then, and the ratio that of two commands."""

import re

from tests.conftest import ROOT, load_script

race = load_script("race")
EXAMPLE = """
import pathlib, sys, time
corpus = pathlib.Path(sys.argv[sys.argv.index("--data") + 1])
assert "--tied" in sys.argv and all((corpus / f"{part}.txt").is_file() for part in ("train", "valid", "test"))
for epoch, perplexity in enumerate((9000.0, 900.0, 950.0, 1.0), 1):
    print(f"| end of epoch {epoch:3d} | time: {1:5.2f}s | valid loss {5:5.2f} | valid ppl {perplexity:8.2f}")
    time.sleep(0 if epoch == 1 else 3)
"""
RECIPE = """
data: {train: x}
tokenizer: {kind: word, min_frequency: 1}
batching: {mode: stream, batch_size: 4, bptt: 8}
model: {cell: gru, embedding_size: 8, hidden_size: 8, num_layers: 1}
training: {max_epochs: 10000, precision: fp32}
validation: {every_steps: 1000000}
"""


def test_the_example_is_overtaken(tmp_path, capsys, monkeypatch):
    """It has 900 after the three seconds of its second epoch; what it would reach later does not count."""
    (tmp_path / "main.py").write_text(EXAMPLE)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for part in ("train", "valid", "test"):
        text = (ROOT / f"data/lesson/{'train' if part == 'train' else 'valid'}.txt").read_text()
        (tmp_path / f"{part}.txt").write_text(text)
    monkeypatch.setattr(race, "LEAST_S", 0.5)
    given = [str(tmp_path), "--corpus", str(tmp_path), "--recipe", str(tmp_path / "recipe.yaml"), "--minutes", "0.05"]
    given += ["model.hidden_size=6"]  # overrides the recipe
    assert race.main(given) == 0
    said = capsys.readouterr().out
    assert [float(found) for found in re.findall(r"example: perplexity ([\d.]+)", said)] == [9000.0, 900.0, 900.0]
    reached, taken_s = re.findall(r"lmtrain: perplexity ([\d.]+) after (\d+) s", said)[-1]
    assert float(reached) < 900
    assert said.splitlines()[-1].startswith("900.00 is reached ")
    assert int(taken_s) > 0
