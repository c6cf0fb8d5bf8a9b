"""What a user asks of a model is checked once, for the library and the command line, before torch is imported."""

import math
import subprocess
import sys

import pytest

from lmtrain.errors import ConfigError
from lmtrain.inference.options import Beams, Sampling, check_export, check_generation, check_new
from lmtrain.inference.trained_model import load
from lmtrain.training.start import train

DRAWN = Sampling(temperature=1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -1.0}, "temperature: should be 0 or greater and finite, not -1.0"),
        ({"top_k": 0}, "top_k: should be 1 or greater"),
        ({"top_p": 0.0}, "top_p: should be greater than 0"),
        ({"top_p": 1.5}, "top_p: should be greater than 0 and at most 1"),
        ({"min_p": 1.5}, "min_p: should be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: should be greater than 0"),
        ({"temperature": math.nan}, "temperature: should be"),
        ({"seed": -1}, "seed: should be 0 or greater"),
    ],
)
def test_sampling_out_of_range_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((0,), "beams: should be from 1"),
        ((1 << 17,), "beams: should be from 1 to 65536"),
        ((2, -1.0), "length_penalty: should be from 0 to 10"),
        ((2, math.nan), "length_penalty: should be from 0"),
        ((2, 1e300), "length_penalty: should be from 0 to 10, not 1e\\+300"),
    ],
)
def test_beams_out_of_range_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Beams(*settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((None, None, 2, ()), "count 2: only one text is the most probable"),
        ((Sampling(temperature=0), None, 2, ()), "count 2: only one text is the most probable"),
        ((None, Beams(2), 3, ()), "count 3: a search with 2 beams finds at most 2 texts"),
        ((DRAWN, Beams(2), 1, ()), "beams: a search does not draw"),
        ((None, Beams(2), 1, ("x",)), "beams: a search does not draw"),
        ((None, None, 1, ("x", "")), "stop: an empty text occurs everywhere"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        check_generation(*settings)


def test_settings_that_go_together_are_taken():
    check_generation(None, None, 1, ("x",))
    check_generation(DRAWN, None, 5, ("x",))
    check_generation(None, Beams(5), 5, ())


def test_a_model_refuses_them_and_overwrites_nothing(small, tmp_path):
    model = load(train(small("training.max_steps=1")).run)
    with pytest.raises(ConfigError, match="count 2: only one text"):
        model.generate(["a"], count=2)
    with pytest.raises(ConfigError, match="stop: an empty text"):
        model.stream("a", stop=[""])
    (tmp_path / "link").symlink_to("nowhere")
    for call in (
        lambda: check_new(tmp_path / "link", "file"),
        lambda: model.export(tmp_path / "link"),
        lambda: model.embed(["a"], tmp_path / "link"),
    ):
        with pytest.raises(ConfigError, match="link: already exists; name a new f"):
            call()
    with pytest.raises(ConfigError, match="int8: safetensors holds the weights as they are"):
        check_export(tmp_path / "new", "safetensors", True)


def test_the_command_line_refuses_them_before_torch_is_imported(tmp_path):
    (tmp_path / "mine.npz").write_text("mine")
    commands = [
        ["generate", "run", "--count", "2"],
        ["generate", "run", "--beams", "2", "--count", "3"],
        ["generate", "run", "--beams", "2", "--stop", "x"],
        ["generate", "run", "--temperature", "-1"],
        ["generate", "run", "--beams", "0"],
        ["generate", "run", "--beams", "2", "--length-penalty", "1e300"],
        ["generate", "run", "--stop", ""],
        ["embed", "run", "-o", "mine.npz"],
        ["export", "run", "-o", "mine.npz"],
        ["export", "run", "-o", "new", "--format", "safetensors", "--int8"],
    ]
    code = f"""
import sys
from lmtrain.cli import _run
for command in {commands}:
    sys.argv[1:] = command
    assert _run() == 2, command
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert "run" not in done.stderr  # the directory was not even looked for
    assert len(done.stderr.splitlines()) == len(commands)
