#!/usr/bin/env python3
"""Make the parity fixtures of src/model: tests/fixtures/model/FAMILY/.

Each is a tiny model directory with random weights (config.json, safetensors) and expected.safetensors: what Hugging
Face transformers gives for it in float64. Run with torch, transformers and safetensors installed:

    python tools/make_model_fixtures.py [FAMILY...]

What is computed by transformers: q and k before RoPE (outputs of q_proj and k_proj, or of q_norm and k_norm), K after
RoPE and V (the KV cache). What this script computes itself: selection weights from q and k, as the formula says.
Seeds are tried until no selection hangs on a small difference, so that f32 must select the same tokens.
"""

import contextlib
import json
import pathlib
import shutil
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "model"
PREFIX = [1, 17, 5]
LENGTHS = [1, 5, 8, 37, 128]
SLOTS = 8
MARGIN = 1e-3  # least relative difference between the 8th and the 9th weight
SINGLE = torch.float32

COMMON = dict(vocab_size=160, hidden_size=64, intermediate_size=80, num_hidden_layers=6, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5)
SMALL = dict(COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=1, head_dim=16)
# family: model_type, config, memory layers (None: first half), weight format, spelling of RoPE, files
FAMILIES = {
    "llama": ("llama", COMMON, None, torch.bfloat16, "old", 1),
    "mistral": ("mistral", dict(COMMON, sliding_window=132, head_dim=24), [1, 3], torch.bfloat16, "new", 3),
    "qwen2": ("qwen2", dict(COMMON, num_key_value_heads=4, sliding_window=16, use_sliding_window=False,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e6}), None, torch.float16, "old", 1),
    "qwen3": ("qwen3", dict(COMMON, head_dim=24, num_hidden_layers=4), None, SINGLE, "new", 1),
    "llama_linear": ("llama", dict(SMALL, attention_bias=True, mlp_bias=True, rope_parameters={
        "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), None, torch.bfloat16, "old", 1),
    "llama_llama3": ("llama", dict(SMALL, rope_parameters={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_theta": 5e5}), None, torch.bfloat16, "new", 1),
    "llama_yarn": ("llama", dict(SMALL, rope_parameters={
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}),
        None, torch.bfloat16, "old", 1),
    # The paper's model: 5 query heads to a key-value head, heads of 80, MLP as wide as the model.
    "paper": ("llama", dict(COMMON, hidden_size=40, intermediate_size=40, num_hidden_layers=4, num_attention_heads=5,
                            num_key_value_heads=1, head_dim=80), None, torch.bfloat16, "new", 1),
}


@contextlib.contextmanager
def float64_everywhere():
    """transformers does norms, angles and softmax in torch.float32 even in a float64 model: let that mean float64."""
    torch.float = torch.float32 = torch.float64
    try:
        yield
    finally:
        torch.float = torch.float32 = SINGLE


def make_model(model_type, config, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                noise = 1 + 0.2 * noise
            elif name.endswith("bias"):
                noise = 0.3 * noise
            elif "embed" not in name:
                noise = 1.3 * noise / parameter.shape[1] ** 0.5
            parameter.data = noise.to(dtype)
    return model


def write_model(folder, model, spelling, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if files == 1:
        save_file(weights, folder / "model.safetensors")
    else:
        weight_map = {}
        for number in range(files):
            name = f"model-{number + 1:05}-of-{files:05}.safetensors"
            part = dict(list(weights.items())[number::files])
            save_file(part, folder / name)
            weight_map.update(dict.fromkeys(part, name))
        size = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    config = {key: value for key, value in model.config.to_dict().items() if not isinstance(value, torch.dtype)}
    for key in ["dtype", "torch_dtype", "transformers_version", "_name_or_path"]:
        config.pop(key, None)
    if spelling == "old":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] == "default":
            config["rope_scaling"] = None
        else:
            config["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def read_model(folder):
    """The model as transformers reads it from the files just written, in float64."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    with float64_everywhere():
        model = transformers.AutoModel.from_config(config).double().eval()
    state = {}
    for file in sorted(folder.glob("model*.safetensors")):
        state |= load_file(file)
    state = {name.removeprefix("model."): tensor.double() for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    rotary = model.rotary_emb
    assert rotary.inv_freq.dtype == torch.float64 and all(p.dtype == torch.float64 for p in model.parameters())
    return model


def run(model, tokens):
    """q, k before RoPE and k, v of the cache for all layers, each [layer, token, head, dim]."""
    seen = {}
    hooks = []
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn
        for key, projection in [("q", "q_proj"), ("k", "k_proj")]:
            module = getattr(attention, key + "_norm", None) or getattr(attention, projection)
            keep = lambda _, __, out, place=(key, number): seen.__setitem__(place, out.detach())  # noqa: E731
            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad(), float64_everywhere():
        cache = model(input_ids=torch.tensor([tokens]), use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    layers = range(len(model.layers))
    head_dim = model.layers[0].self_attn.head_dim
    before = {key: torch.stack([seen[key, l].reshape(len(tokens), -1, head_dim) for l in layers]) for key in "qk"}
    k_rotated = torch.stack([cache.layers[l].keys[0].transpose(0, 1) for l in layers])
    v = torch.stack([cache.layers[l].values[0].transpose(0, 1) for l in layers])
    for tensor in [*before.values(), k_rotated, v]:
        assert tensor.dtype == torch.float64
    return before["q"], before["k"], k_rotated, v


def selection_weights(q, k, score):
    """[layer, kv_head, token] from q, k [layer, token, head, dim] of the chunk alone."""
    layers, tokens, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(layers, tokens, kv_heads, heads // kv_heads, dim)
    logits = torch.einsum("lihgd,ljhd->lhgij", q, k) / dim**0.5
    if score == "softmax":
        return logits.softmax(-1).sum((2, 3))
    return (logits - logits.amax((2, 3, 4), keepdim=True)).exp().sum((2, 3))


def select(weights):
    count = min(SLOTS, weights.shape[-1])
    order = weights.sort(dim=-1, descending=True, stable=True)
    margin = 1.0
    if weights.shape[-1] > SLOTS:
        margin = (1 - order.values[..., SLOTS] / order.values[..., SLOTS - 1]).min().item()
    return order.indices[..., :count].sort(dim=-1).values, margin


def expected(model, layers, seed):
    generator = torch.Generator().manual_seed(seed)
    r = len(PREFIX)
    out = {"prefix": torch.tensor(PREFIX, dtype=torch.int32), "layers": torch.tensor(layers, dtype=torch.int32)}
    worst = 1.0
    for number, length in enumerate(LENGTHS):
        # No token twice: before RoPE the first layer cannot tell repetitions apart, and their weights would tie.
        chunk = torch.randperm(model.config.vocab_size, generator=generator)[:length].tolist()
        q, k, k_rotated, v = (tensor[layers] for tensor in run(model, PREFIX + chunk))
        out[f"{number}.tokens"] = torch.tensor(chunk, dtype=torch.int32)
        out[f"{number}.k"] = k_rotated[:, r:].to(SINGLE)
        out[f"{number}.v"] = v[:, r:].to(SINGLE)
        if number == 0:
            out["prefix.k"] = k_rotated[:, :r].transpose(1, 2).to(SINGLE)
            out["prefix.v"] = v[:, :r].transpose(1, 2).to(SINGLE)
        for score in ["softmax", "exp"]:
            weights = selection_weights(q[:, r:], k[:, r:], score)
            selected, margin = select(weights)
            worst = min(worst, margin)
            out[f"{number}.{score}"] = weights.to(SINGLE)
            out[f"{number}.{score}.selected"] = selected.to(torch.uint8)
    return {name: tensor.contiguous() for name, tensor in out.items()}, worst


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for family in sys.argv[1:] or FAMILIES:
        model_type, config, layers, dtype, spelling, files = FAMILIES[family]
        layers = layers or list(range(config["num_hidden_layers"] // 2))
        for seed in range(1000):
            write_model(OUT / family, make_model(model_type, config, seed, dtype), spelling, files)
            tensors, margin = expected(read_model(OUT / family), layers, seed)
            if margin >= MARGIN:
                break
        else:
            raise SystemExit(f"{family}: no seed keeps all selections apart")
        save_file(tensors, OUT / family / "expected.safetensors")
        for file in (OUT / family).iterdir():
            file.chmod(0o644)
        size = sum(file.stat().st_size for file in (OUT / family).iterdir())
        print(f"{family}: seed {seed}, margin {margin:.1e}, {size} bytes")


main()
