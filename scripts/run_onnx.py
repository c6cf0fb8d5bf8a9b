"""What `lmtrain export` has written, run by onnxruntime and numpy alone: greedy text of a char or word model.

lmtrain export runs/NAME -o exported && python scripts/run_onnx.py exported "a beginning"
"""

import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import onnxruntime

BOS, EOS, UNKNOWN, FIRST = 1, 2, 3, 4  # a vocabulary's own tokens follow the special ones

folder, prompt = Path(sys.argv[1]), unicodedata.normalize("NFC", sys.argv[2])
tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
tokens, words = tokenizer["tokens"], tokenizer["kind"] == "word"
if tokenizer.get("split") == "words":
    sys.exit(
        "this script cuts words at white space alone, and this model at Unicode's word boundaries: lmtrain generate"
    )
if tokenizer.get("lowercase"):
    prompt = unicodedata.normalize("NFC", prompt.lower())
ids = {token: FIRST + place for place, token in enumerate(tokens)}
session = onnxruntime.InferenceSession(folder / "model.onnx")
kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
state = {each.name: np.zeros((1, each.shape[1]), kinds[each.type]) for each in session.get_inputs()[1:]}

lines = [line.split() if words else list(line) for line in prompt.split("\n")]
text = [part for number, line in enumerate(lines) for part in (["\n"] * (number > 0 and "\n" in ids) + line)]
for token in [BOS, *(ids.get(part, UNKNOWN) for part in text)]:
    log_probabilities, *after = session.run(None, {"token": np.array([token]), **state})
    state = dict(zip(state, after, strict=True))
while (token := int(log_probabilities[0].argmax())) != EOS and len(text) < 1000:
    text.append(tokens[token - FIRST] if token >= FIRST else "<unk>")
    log_probabilities, *after = session.run(None, {"token": np.array([token]), **state})
    state = dict(zip(state, after, strict=True))
print(" ".join(text).replace(" \n ", "\n") if words else "".join(text))
