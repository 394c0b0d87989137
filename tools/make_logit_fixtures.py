#!/usr/bin/env python3
"""Make the logit fixtures of src/read: tests/fixtures/read/FAMILY.safetensors.

For each model of tests/fixtures/model the logits that Hugging Face transformers gives for a few token sequences, in
float64, all positions. Those models have no LM head; of the families in TIED it is the embedding table, the others get a
random one, which the file holds as `lm_head`. Run with torch, transformers and safetensors installed:

    python tools/make_logit_fixtures.py
"""

import contextlib
import pathlib

import torch
import transformers
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "fixtures"
LENGTHS = [1, 7, 40]
TIED = {"qwen2", "qwen3", "llama_linear"}
SINGLE = torch.float32


@contextlib.contextmanager
def float64_everywhere():
    """transformers does norms, angles and softmax in torch.float32 even in a float64 model: let that mean float64."""
    torch.float = torch.float32 = torch.float64
    try:
        yield
    finally:
        torch.float = torch.float32 = SINGLE


def main():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    (ROOT / "read").mkdir(exist_ok=True)
    for folder in sorted((ROOT / "model").iterdir()):
        generator = torch.Generator().manual_seed(11)
        config = transformers.AutoConfig.from_pretrained(folder)
        config._attn_implementation = "eager"
        config.tie_word_embeddings = folder.name in TIED
        with float64_everywhere():
            model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
        state = {}
        for file in sorted(folder.glob("model*.safetensors")):
            state |= load_file(file)
        out = {}
        if folder.name in TIED:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        else:
            size = (config.vocab_size, config.hidden_size)
            out["lm_head"] = (torch.randn(size, generator=generator) / config.hidden_size**0.5).to(torch.bfloat16)
            state["lm_head.weight"] = out["lm_head"]
        missing, unexpected = model.load_state_dict({k: v.double() for k, v in state.items()}, strict=False)
        assert not missing and not unexpected, (missing, unexpected)
        for number, length in enumerate(LENGTHS):
            tokens = torch.randint(config.vocab_size, (length,), generator=generator)
            with torch.no_grad(), float64_everywhere():
                logits = model(input_ids=tokens[None]).logits[0]
            assert logits.dtype == torch.float64
            out[f"{number}.tokens"] = tokens.to(torch.int32)
            out[f"{number}.logits"] = logits.to(SINGLE)
        path = ROOT / "read" / f"{folder.name}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in out.items()}, path)
        path.chmod(0o644)
        print(f"{folder.name}: {path.stat().st_size} bytes")


main()
