"""A two-layer Llama drawn at random: NumPy reference, lowered graph and bundle, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import tokenizers
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from accel.bundle import Bundle, BundleWriter
from accel.kv_quantization import KvQuantization
from accel.manifest import GraphEntry, Manifest, ParameterEntry, Variant
from accel.spec import ArchSpec, AttentionSpec, TensorSpec

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, LAYERS, POSITIONS = 61, 32, 4, 2, 16, 48, 2, 512
SCALE, EPSILON, THETA = HEAD_DIM**-0.5, 1e-6, 10000.0
EOS = 60

ARCH = ArchSpec(
    family="llama",
    architecture="LlamaForCausalLM",
    kind="decoder",
    task="text-generation",
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    max_positions=POSITIONS,
    parameters=0,
    tied_embeddings=False,
    layers=(AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, SCALE, causal=True),) * LAYERS,
)
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": EPSILON,
    "rope_theta": THETA,
    "tie_word_embeddings": False,
    "eos_token_id": EOS,
}


def draw_weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Every parameter of LlamaForCausalLM, in PyTorch's layout [out, in]."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float = 1.5) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) * scale / columns**0.5).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN, HIDDEN**0.5)}
    for i in range(LAYERS):
        prefix = f"model.layers.{i}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}self_attn.k_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}self_attn.v_proj.weight": matrix(KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": matrix(HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}mlp.gate_proj.weight": matrix(MLP, HIDDEN),
            f"{prefix}mlp.up_proj.weight": matrix(MLP, HIDDEN),
            f"{prefix}mlp.down_proj.weight": matrix(HIDDEN, MLP),
            f"{prefix}input_layernorm.weight": 1 + matrix(1, HIDDEN)[0],
            f"{prefix}post_attention_layernorm.weight": 1 + matrix(1, HIDDEN)[0],
        }
    weights |= {"model.norm.weight": 1 + matrix(1, HIDDEN)[0], "lm_head.weight": matrix(VOCAB, HIDDEN, 3.0)}
    return weights


def rotary_tables() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """cos and sin [POSITIONS, HEAD_DIM / 2]."""
    frequencies = 1.0 / THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)


def reference_logits(
    weights: dict[str, NDArray[np.float32]], ids: list[int], kv: KvQuantization | None = None
) -> NDArray[np.float64]:
    """Logits [S, V] of one sequence in float64, without a cache; ``kv``: keys and values rounded as a cache's are."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    cos, sin = (table[: len(ids), None] for table in rotary_tables())

    def norm(x: NDArray, name: str) -> NDArray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[name]

    def rotate(x: NDArray) -> NDArray:
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    x = w["model.embed_tokens.weight"][ids]
    future = np.triu(np.ones((len(ids), len(ids)), bool), 1)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        h = norm(x, f"{p}input_layernorm.weight")
        q, k, v = ((h @ w[f"{p}self_attn.{n}_proj.weight"].T).reshape(len(ids), -1, HEAD_DIM) for n in ("q", "k", "v"))
        k = rotate(k)
        if kv is not None:
            k, v = rounded(k, kv.keys[i], kv.bits), rounded(v, kv.values[i], kv.bits)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", rotate(q), k) * SCALE
        scores[:, future] = -np.inf
        weight = np.exp(scores - scores.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        attended = np.einsum("hqk,khd->qhd", weight, v).reshape(len(ids), -1)
        x = x + attended @ w[f"{p}self_attn.o_proj.weight"].T
        h = norm(x, f"{p}post_attention_layernorm.weight")
        gate = h @ w[f"{p}mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{p}mlp.up_proj.weight"].T)) @ w[f"{p}mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def rounded(x: NDArray, scales: NDArray[np.float32], bits: int) -> NDArray:
    """[S, KV, D] cut off and rounded to integers times their scales."""
    limit = 1 << bits - 1
    return np.clip(np.round(x / scales), -limit, limit - 1) * scales


def draw_scales(bits: int, reach: float = 6.0) -> KvQuantization:
    """Scales per channel of every layer that reach to some ``reach`` in an integer's largest value."""
    spread = np.random.default_rng(bits).uniform(0.8, 1.2, (2, LAYERS, KV_HEADS, HEAD_DIM))
    keys, values = (spread * reach / ((1 << bits - 1) - 1)).astype(np.float32)
    return KvQuantization(bits, tuple(keys), tuple(values))


def greedy(weights: dict[str, NDArray[np.float32]], prompt: list[int], count: int, eos: int | None = None) -> list[int]:
    """The reference's greedy continuation."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(reference_logits(weights, ids)[-1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


class _Graph:
    """Collects nodes and initializers; ``add`` returns the node's first output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: object) -> str:
        outputs = outputs or (f"n{len(self.nodes)}",)
        node = helper.make_node(
            op, list(inputs), list(outputs), name=f"n{len(self.nodes)}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return outputs[0]

    def constant(self, name: str, value: NDArray) -> str:
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def lowered_graph(weights: dict[str, NDArray[np.float32]], kv: KvQuantization | None = None) -> onnx.ModelProto:
    """The ``ort-cpu`` form: packed tokens, padded around GroupQueryAttention alone."""
    g = _Graph()
    for name, table in zip(("cos", "sin"), rotary_tables(), strict=True):
        g.constant(name, table.astype(np.float32))
    flat = g.constant("flat_shape", np.array([-1, HEADS * HEAD_DIM], np.int64))

    def linear(x: str, name: str) -> str:
        return g.add("MatMul", x, g.constant(name, weights[name].T))

    def norm(x: str, name: str) -> str:
        return g.add("RMSNormalization", x, g.constant(name, weights[name]), epsilon=EPSILON, axis=-1)

    x = g.add("Gather", g.constant("embed", weights["model.embed_tokens.weight"]), "input_ids")
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        h = norm(x, f"{p}input_layernorm.weight")
        packed = np.concatenate([weights[f"{p}self_attn.{n}_proj.weight"] for n in ("q", "k", "v")]).T
        qkv = g.add("Gather", g.add("MatMul", h, g.constant(f"{p}qkv", packed)), "pad_index")
        scales, types = ["", ""], {}
        if kv is not None:
            scales = [g.constant(f"{p}key_scale", kv.keys[i]), g.constant(f"{p}value_scale", kv.values[i])]
            types = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": kv.bits}
        attention = g.add(
            "GroupQueryAttention", qkv, "", "", f"past.{i}.key", f"past.{i}.value", "seqlens_k", "total_length",
            "cos", "sin", "", "", "", *scales, "", "", "query_seqlens",
            outputs=(f"attention.{i}", f"present.{i}.key", f"present.{i}.value"), domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=KV_HEADS, scale=SCALE, do_rotary=1, **types,
        )  # fmt: skip
        tokens = g.add("Gather", g.add("Reshape", attention, flat), "unpad_index")
        x = g.add("Add", x, linear(tokens, f"{p}self_attn.o_proj.weight"))
        h = norm(x, f"{p}post_attention_layernorm.weight")
        gate = linear(h, f"{p}mlp.gate_proj.weight")
        silu = g.add("Mul", gate, g.add("Sigmoid", gate))
        up = g.add("Mul", silu, linear(h, f"{p}mlp.up_proj.weight"))
        x = g.add("Add", x, linear(up, f"{p}mlp.down_proj.weight"))
    chosen = g.add("Gather", norm(x, "model.norm.weight"), "logits_positions")
    g.add("MatMul", chosen, g.constant("lm_head", weights["lm_head.weight"].T), outputs=("logits",))
    return _finish(g, kv.bits if kv is not None else 32)


CACHES = {32: ("float32", HEAD_DIM), 8: ("int8", HEAD_DIM), 4: ("uint8", HEAD_DIM // 2)}  # type, width of a position


def _finish(g: _Graph, bits: int) -> onnx.ModelProto:
    def value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    dtype, width = CACHES[bits]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    cache: list[int | str] = ["B", KV_HEADS, "C", width]
    names = [f"{i}.{part}" for i in range(LAYERS) for part in ("key", "value")]
    inputs = [
        value("input_ids", TensorProto.INT64, ["T"]),
        value("pad_index", TensorProto.INT64, ["B", "S"]),
        value("unpad_index", TensorProto.INT64, ["T"]),
        value("seqlens_k", TensorProto.INT32, ["B"]),
        value("total_length", TensorProto.INT32, []),
        value("query_seqlens", TensorProto.INT32, ["B"]),
        value("logits_positions", TensorProto.INT64, ["R"]),
        *(value(f"past.{name}", kind, cache) for name in names),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["R", VOCAB])]
    outputs += [value(f"present.{name}", kind, cache) for name in names]
    graph = helper.make_graph(g.nodes, "tiny", inputs, outputs, g.initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def write_bundle(
    out: Path,
    weights: dict[str, NDArray[np.float32]],
    generation: dict[str, object] | None = None,
    tokenizer: bool = False,
    caches: Mapping[str, KvQuantization] = {},
) -> Bundle:
    """A bundle that both engines can open; ``caches``: variants with integer caches, by name."""
    with BundleWriter(out) as writer:
        kinds: dict[str, KvQuantization | None] = {"fp32": None, **caches}
        variants = {name: _write_variant(writer.path, name, weights, kv) for name, kv in kinds.items()}
        (writer.path / "config.json").write_text(json.dumps(CONFIG))
        if generation is not None:
            (writer.path / "generation_config.json").write_text(json.dumps(generation))
        if tokenizer:
            _write_tokenizer(writer.path)
        parameters, offset = {}, 0
        with (writer.path / "fp32.weights").open("wb") as stream:
            for name, value in weights.items():
                parameters[name] = ParameterEntry("fp32.weights", offset, value.shape, "float32")
                offset += stream.write(value.tobytes())
        manifest = Manifest(
            schema_version=1,
            accel_version="0",
            source="tiny",
            arch=ARCH,
            variants=variants,
            files={},
            versions={},
            parameters=parameters,
        )
        return writer.commit(manifest)


def _write_variant(
    folder: Path, name: str, weights: dict[str, NDArray[np.float32]], kv: KvQuantization | None
) -> Variant:
    file = "ort-cpu.onnx" if kv is None else f"{name}.ort-cpu.onnx"
    onnx.save(lowered_graph(weights, kv), folder / file)
    dtype, width = CACHES[kv.bits if kv is not None else 32]
    parts = [f"past.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    pasts = [TensorSpec(part, dtype, ("B", KV_HEADS, "C", width)) for part in parts]
    graph = GraphEntry(file, 23, (TensorSpec("input_ids", "int64", ("T",)), *pasts), (), ())
    return Variant("float32", ("fp32.weights",), {"ort-cpu": graph})


def _write_tokenizer(folder: Path) -> None:
    """Words w0 to w59 and <eos>; a chat is the words of all its messages."""
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<eos>": EOS}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": template}))
